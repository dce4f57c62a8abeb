"""Parts of the Learn page: controls, clickable charts and questions."""

from collections.abc import Callable, Collection, Iterable, Sequence
from fractions import Fraction

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from streamlit.delta_generator import DeltaGenerator
from torch import nn

from intrafusion import IntrafusionError, registry
from intrafusion.pruning.transport.provenance import Story
from intrafusion.studies import toy_network
from pages.shared import messages
from pages.shared.links import BIND

KEYS = (
    "lesson_hidden", "lesson_stay", "lesson_seed", "lesson_criterion", "lesson_p", "lesson_changes", "lesson_neuron",
    "lesson_other", "lesson_many",
)  # fmt: skip
SIGNS = ("w₁", "w₂", "b", "v₁", "v₂")  # symbols of toy_network.WEIGHTS
_HIDDEN, _STAY, _SEEDS = 6, 3, range(24)


@st.cache_resource(max_entries=256, show_spinner=False)
def trained(seed: int, hidden: int) -> nn.Sequential:
    """Return the trained network before any manual change."""
    return toy_network.train_toy(seed, hidden)


@st.cache_resource(max_entries=256, show_spinner=False)
def opened_lesson(seed: int, hidden: int, changes: str, stay: int, criterion: str, p: int) -> toy_network.Lesson:
    dense = toy_network.changed(trained(seed, hidden), toy_network.parse_changes(changes, hidden))
    return toy_network.open_lesson(dense, stay, criterion, p)


@st.cache_data(max_entries=64, show_spinner="Training 24 networks")
def seed_accuracies(hidden: int, stay: int, criterion: str, p: int) -> list[tuple[int, float, float]]:
    """Return (seed, dropped accuracy, fused accuracy) of 24 networks."""
    lessons = [opened_lesson(seed, hidden, "", stay, criterion, p) for seed in _SEEDS]
    return [
        (seed, toy_network.measure_toy(made.dropped).accuracy, toy_network.measure_toy(made.fused).accuracy)
        for seed, made in zip(_SEEDS, lessons, strict=True)
    ]


@st.cache_resource
def _criteria() -> list[str]:
    return toy_network.criteria(trained(toy_network.SEED, _HIDDEN))


def lesson_chart(figure: go.Figure, key: str, *picks: str) -> None:
    """Draw a figure. A click on a mark writes its customdata into the widgets with the keys `picks`."""
    st.plotly_chart(
        figure,
        key=f"lesson-{key}",
        theme=None,
        alt=figure.layout.title.text,
        config={"displaylogo": False, "toImageButtonOptions": {"format": "svg", "filename": f"intrafusion-{key}"}},
        on_select=(lambda: _pick(f"lesson-{key}", picks)) if picks else "ignore",
        selection_mode="points",
    )


def _pick(key: str, picks: Sequence[str]) -> None:
    points = st.session_state[key].selection.points
    if not points or "customdata" not in points[0]:
        return
    data = points[0]["customdata"]
    for name, value in zip(picks, data if isinstance(data, list | tuple) else [data], strict=False):
        st.session_state[name] = int(value)
    if "lesson_other" in picks:  # both were chosen together: keep `other_control` from resetting the second
        st.session_state.lesson_followed = st.session_state.lesson_neuron


def _keep_within(key: str, options: Collection[int], default: int) -> None:
    """Reset a widget to its default if its value is no longer an option."""
    if key in st.session_state and st.session_state[key] not in options:
        st.session_state[key] = default


def setting() -> tuple[int, int, str, int, str, int]:
    """Draw the control row and return (seed, hidden, changes, stay, criterion, p)."""
    with st.grid(5, min_column_width=150, gap=("xsmall", "medium")):
        hidden = st.slider("Neurons", 4, 8, _HIDDEN, key="lesson_hidden", bind=BIND)
        _keep_within("lesson_stay", range(1, hidden + 1), _STAY)
        stay = st.slider("Kept neurons", 1, hidden, _STAY, key="lesson_stay", bind=BIND)
        seed = st.number_input(
            "Seed", 0, 9999, toy_network.SEED, key="lesson_seed", bind=BIND, help="Seed of the initial weights."
        )
        entries = registry("criterion")
        criterion = st.selectbox(
            "Criterion",
            _criteria(),
            index=_criteria().index("l1"),
            key="lesson_criterion",
            bind=BIND,
            help="Scores the importance of a neuron. " + "; ".join(f"**{n}**: {entries[n].summary}" for n in _criteria()),
        )
        p = st.segmented_control(
            "Cost p-norm",
            [1, 2],
            default=1,
            required=True,
            key="lesson_p",
            bind=BIND,
            help="Norm of the difference between two neurons, in step 3.",
        )
    return int(seed), hidden, _changes(hidden), stay, criterion, p or 1


def _changes(hidden: int) -> str:
    """Return the manual weight changes as text. For a text that cannot be parsed, show the error and return "".

    The text is stored in the session state, apart from the widgets: during a drag a browser may send an outdated state of
    a widget that shows it.
    """
    text = st.session_state.setdefault("lesson_changes", st.query_params.get("lesson_changes", ""))
    if text:
        st.query_params["lesson_changes"] = text
    else:
        st.query_params.pop("lesson_changes", None)
    st.session_state.lesson_text = text
    with st.form("lesson_changes_form", border=False), st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input(
            "Your changes",
            key="lesson_text",
            placeholder="none: drag a weight at the bottom, or enter 3.w1=0.5 3.b=-1",
        )
        st.form_submit_button("Apply", on_click=lambda: _change(st.session_state.lesson_text))
    try:
        return toy_network.write_changes(toy_network.parse_changes(text, hidden))
    except IntrafusionError as error:
        messages.error(error)
        return ""


def _change(text: str) -> None:
    """Replace all changes and reset the sliders."""
    st.session_state.lesson_changes = text
    st.session_state.lesson_turn = st.session_state.get("lesson_turn", 0) + 1


def neuron_bar(seed: int, hidden: int, changes: str) -> int:
    """Draw the bar at the bottom, with the choice of a neuron and sliders for its weights. Return the neuron."""
    now, was = toy_network.parse_changes(changes, hidden), toy_network.numbers(trained(seed, hidden))
    default = int(was.abs().sum(1).argmin())
    _keep_within("lesson_neuron", range(hidden), default)
    grid = st.bottom.container(border=True).grid(5, min_column_width=130, gap=("xsmall", "medium"))
    with grid.cell(column_span=2):
        neuron = st.segmented_control(
            "Neuron",
            list(range(hidden)),
            default=default,
            required=True,
            key="lesson_neuron",
            bind=BIND,
            help="You can also click a neuron in a figure.",
        )
    neuron = default if neuron is None else neuron
    with grid.cell(column_span=3):
        columns = st.columns([3] * 5 + [2], vertical_alignment="bottom")
    for column, name, sign, value in zip(columns[:5], toy_network.WEIGHTS, SIGNS, was[neuron].tolist(), strict=True):
        key = f"lesson_{name} {seed} {hidden} {neuron} {st.session_state.get('lesson_turn', 0)}"
        column.slider(
            sign,
            -toy_network.LIMIT,
            toy_network.LIMIT,
            now.get((neuron, name), value),
            0.01,
            key=key,
            on_change=_drag,
            args=(key, (neuron, name), value, hidden),
        )
    columns[5].button(
        ":material/undo:", key="lesson_undo", on_click=_change, args=("",), disabled=not now, help="Undo all changes"
    )
    return neuron


def _drag(key: str, place: tuple[int, str], trained_value: float, hidden: int) -> None:
    try:
        changes = toy_network.parse_changes(st.session_state.lesson_changes, hidden)
    except IntrafusionError:
        changes = {}
    changes[place] = st.session_state[key]
    if changes[place] == trained_value:
        del changes[place]
    st.session_state.lesson_changes = toy_network.write_changes(changes)


def other_control(neuron: int, kept: Sequence[int], default: int) -> int:
    """Return the kept neuron that `neuron` is compared with. It is reset to `default` when another neuron is chosen."""
    if st.session_state.get("lesson_followed", neuron) != neuron:
        st.session_state.lesson_other = default
    st.session_state.lesson_followed = neuron
    _keep_within("lesson_other", kept, default)
    return st.selectbox("Compare with neuron", kept, index=kept.index(default), key="lesson_other", bind=BIND, width=200)


def quiz(
    name: str,
    question: str,
    is_right: Callable[..., bool],
    why: str,
    hint: str,
    options: Sequence[str] | None = None,
) -> None:
    """Draw a question with a Check button, which shows `why` for a right answer and `hint` for a wrong one.

    options: the answers to choose from; None if the answer is a number.
    """
    with st.form(f"lesson_ask_{name}"):
        st.markdown(f"**Question.** {question}")
        key = f"lesson_answer_{name}: {question}"  # a new question has a new key, so it starts unanswered
        answer: float | str | None
        if options is None:
            answer = st.number_input("Answer, two decimals", value=None, step=0.01, format="%.2f", key=key)
        else:
            answer = st.radio("Answer", options, index=None, horizontal=True, key=key)
        if not st.form_submit_button("Check", icon=":material/check:"):
            return
        if answer is None:
            st.info("Enter an answer first.")
        elif is_right(answer):
            st.success(f"Correct. {why}", icon=":material/check_circle:")
        else:
            st.error(f"{answer} is not correct. {hint}", icon=":material/error:")


def step(title: str, sentence: str) -> None:
    st.divider()
    st.subheader(title)
    st.markdown(sentence)


def onwards(page: str, about: str) -> None:
    """Draw a link from a step to the page that does the same with a real network."""
    st.page_link(f"pages/{page}.py", label=f"See this on a real network: {about}", icon=":material/arrow_forward:")


def two() -> tuple[DeltaGenerator, DeltaGenerator]:
    """Return two cells side by side, or one above the other on a narrow screen."""
    grid = st.grid(2, min_column_width=400, gap="medium")
    return grid.container(), grid.container()


def number_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Draw a small table of numbers as Markdown text, which does not wrap and follows the theme."""
    rows = [head, ["---:"] * len(head), *lines]
    st.markdown("\n".join("| " + " | ".join(row) + " |" for row in rows))


def numbered(values: Iterable[float], bold: bool = False) -> list[str]:
    """Format numbers as table cells."""
    return [f"**{value:.2f}**" if bold else f"{value:.2f}" for value in values]


def plus(values: Iterable[float], pattern: str = "{:.2f}") -> str:
    """Format a sum of numbers as text, each number with `pattern`."""
    return " + ".join(pattern.format(value) for value in values)


def fraction(value: float) -> str:
    """Format a number as a small fraction: 1/6 -> "1/6". Use two decimals if no small fraction fits."""
    near = Fraction(value).limit_denominator(99)
    return str(near) if abs(value - near) < 1e-9 else f"{value:.2f}"


def fate(told: Story) -> str:
    """Describe as text what the plan does with a neuron."""
    pairs = told.absorbs if told.kept else told.goes_to
    listed = " and ".join(f"neuron {other} (weight {fraction(weight)})" for other, weight in pairs)
    if told.kept:
        return f"Neuron {told.channel} is kept" + (f" and absorbs {listed}." if listed else ".")
    return f"Neuron {told.channel} is merged into {listed}."


def neuron_table(made: toy_network.Lesson) -> pd.DataFrame:
    """Return one row per neuron: its weights, its part in the plan, and its weights after fusion."""
    rows = toy_network.numbers(made.dense)
    data = pd.DataFrame(rows.numpy(), columns=list(toy_network.WEIGHTS))
    data.insert(0, "neuron", range(len(rows)))
    data["score"], data["stays"] = made.scores.numpy(), [i in made.kept for i in range(len(rows))]
    for column, target in enumerate(made.kept):
        data[f"cost to {target}"] = made.plan.cost[:, column].numpy()
        data[f"mass to {target}"] = made.plan.coupling[:, column].numpy()
        data[f"weight in {target}"] = made.plan.matrix[column].numpy()
    fused = toy_network.numbers(made.fused).numpy()
    return data.join(pd.DataFrame(fused, made.kept, [f"fused {name}" for name in toy_network.WEIGHTS]))
