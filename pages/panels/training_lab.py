"""Parts of the Training lab: the controls, a running training, its outcome, and runs side by side."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pandas as pd
import streamlit as st

from intrafusion import IntrafusionError, registry
from intrafusion._registry import TRAINERS
from intrafusion.models.hub import architecture_of
from intrafusion.runtime.jobs import Job
from intrafusion.runtime.progress import in_words
from intrafusion.training.methods.masks import WEIGHTS
from intrafusion.training.methods.parallel import parts_of
from intrafusion.training.methods.runs import LabRun, run_training, runs
from intrafusion.training.methods.sdprun import without_zeroed
from intrafusion.training.methods.smooth import PENALTIES
from intrafusion.training.methods.spec import TrainSpec
from intrafusion.training.methods.task import PhaseProgress
from intrafusion.training.model_fusion import ALIGNED
from pages.shared import background_jobs, job_panel, messages, open_model, parts
from pages.shared.links import BIND
from pages.shared.open_model import Here

_KNOBS = (
    "epochs", "seed", "training", "lr", "batch", "reach", "c", "mu", "drawn", "penalty", "strength", "energy", "sparsity", "criterion",
    "merge", "rounds", "tune", "folds", "by",
)  # fmt: skip
KEYS = ("method", *(f"lab_{name}" for name in _KNOBS))
_REDRAW = 2.0  # least seconds between two redraws of a run
_LOOKS = 25  # approximate number of recorded steps per phase
_WIDTH = 160
_MOST_COMPARED = 12


def controls(here: Here) -> TrainSpec:
    """Draw the choice of the method and its settings and return their spec."""
    row = st.container(horizontal=True, vertical_alignment="bottom")
    method = row.selectbox(
        "Method",
        list(TRAINERS),
        index=list(TRAINERS).index("sdprun"),
        key="method",
        bind=BIND,
        width=260,
        help=parts.methods_help("trainer"),
    )
    given: dict[str, Any] = {"epochs": _number(row, "epochs", "Epochs", 20.0, 0.1, 1000.0, 5.0, width=130)}
    given["seed"] = _number(row, "seed", "Seed", 0, 0, 9999, 1, width=110)
    knobs = TRAINERS[method].knobs
    if knobs:
        grid = st.grid(4, min_column_width=180)
        given |= {name: _DRAWN[name](grid) for name in knobs}
    with st.expander("Training", icon=":material/tune:"):
        grid = st.grid(3, min_column_width=180)
        images = grid.selectbox(
            "Training images",
            ["1000", "5000", "20000", "all"],
            index=3,
            key="lab_training",
            bind=BIND,
            help="A tenth of them, at most 1,000, is held out and not used for training.",
        )
        given["training"] = None if images == "all" else int(images)
        given["lr"] = grid.number_input(
            "Peak learning rate",
            1e-5,
            1000.0,
            None,
            0.1,
            format="%g",
            key="lab_lr",
            bind=BIND,
            placeholder="method default",
        )
        given["batch"] = grid.number_input(
            "Batch size", 1, 4096, None, 32, key="lab_batch", bind=BIND, placeholder="method default"
        )
    return TrainSpec(
        model=architecture_of(here.spec.model),
        method=method,
        data_path=here.spec.data_path,
        **given,
    )


def _number(place: Any, name: str, label: str, value: Any, least: Any, most: Any, step: Any, **options: Any) -> Any:
    form = {} if isinstance(value, int) else {"format": "%g"}
    return place.number_input(label, least, most, value, step, key=f"lab_{name}", bind=BIND, **form, **options)


def _choice(place: Any, name: str, label: str, choices: Sequence[str], default: str | None, help: str) -> Any:
    index = list(choices).index(default) if default else None
    return place.selectbox(
        label, list(choices), index=index, key=f"lab_{name}", bind=BIND, help=help, placeholder="method default"
    )


_DRAWN = {
    "reach": lambda g: _number(
        g, "reach", "Final threshold", 1.4, 0.0, 100.0, 0.1,
        help="In units of the initial median norm of the shrunk weights. Above 1 only weights that grow remain, so short runs "
        "need a lower value.",
    ),
    "c": lambda g: g.number_input(
        "Strength c", 0.0, 1000.0, None, 0.0005, format="%g", key="lab_c", bind=BIND, placeholder="automatic",
        help="The paper's parameter. If set, it replaces the final threshold.",
    ),
    "mu": lambda g: _number(
        g, "mu", "Growth µ", 0.51, 0.01, 0.99, 0.05, help="The threshold grows with this power of the number of steps."
    ),
    "drawn": lambda g: _choice(
        g, "drawn", "Frozen weights", WEIGHTS, "kaiming", "kaiming: normal, fan-in; signed: their signs times one constant; "
        "keep: the weights of the model.",
    ),
    "penalty": lambda g: _choice(
        g, "penalty", "Penalty", PENALTIES, None, "The nuclear norm favours low-rank weights; first and second differences "
        "favour weights that are smooth along channels.",
    ),
    "strength": lambda g: g.number_input(
        "Penalty weight", 0.0, 1000.0, None, 0.1, format="%g", key="lab_strength", bind=BIND,
        placeholder="method default",
    ),
    "energy": lambda g: _number(
        g, "energy", "Energy kept", 0.98, 0.5, 1.0, 0.01, help="Share of each layer's squared singular values that is kept."
    ),
    "sparsity": lambda g: _number(g, "sparsity", "Sparsity", 0.5, 0.05, 0.95, 0.05),
    "criterion": lambda g: _choice(g, "criterion", "Criterion", list(registry("criterion")), "l1", "Determines which channels are kept."),
    "merge": lambda g: _choice(g, "merge", "Merge", list(registry("merge")), "fusion", "How removed channels are merged."),
    "rounds": lambda g: _number(g, "rounds", "Pruning rounds", 2, 1, 20, 1),
    "tune": lambda g: _number(g, "tune", "Epochs per round", 5.0, 0.0, 200.0, 1.0),
    "folds": lambda g: _number(
        g, "folds", "Folds", 2, 2, 6, 2, help="2: one network per half of the images. k: one network per choice of k/2 folds."
    ),
    "by": lambda g: _choice(g, "by", "Align by", ALIGNED, "activations", "What the matching of channels compares."),
}  # fmt: skip


def steps_so_far(found: LabRun | None, job: Job | None) -> list[PhaseProgress]:
    """Return the steps of a run so far."""
    if found is not None:
        return list(found.steps)
    return [told for told in (job.results if job else ()) if isinstance(told, PhaseProgress)]


def start_training(key: tuple, spec: TrainSpec, device: str) -> Job:
    """Train in the background. Rerun the page afterwards."""

    def part(told: PhaseProgress | LabRun) -> tuple[Any, float]:
        return ("run", 0.0) if isinstance(told, LabRun) else ((told.phase, told.moment.step), 1.0 if told.moment.steps else 0.0)

    total = _LOOKS * len(phases(spec))
    return background_jobs.start_job(
        key, total, lambda: run_training(spec, device), f"{spec.method} of {spec.model}", part=part
    )


def phases(spec: TrainSpec) -> list[str]:
    """Return the approximate list of a run's training phases."""
    rounds = [f"pruned {number}" for number in range(spec.rounds)] if "rounds" in TRAINERS[spec.method].knobs else []
    if spec.method not in ("fap", "paf"):
        return ["training", *rounds]
    members = len(parts_of(spec))
    return ["training"] * members + rounds * (members if spec.method == "paf" else 1) + ["fused"]


def training_row(found: LabRun | None, job: Job | None, running: bool, begun: bool) -> bool:
    """Draw the button that starts training, its progress, and any error. Return whether the button was pressed."""
    if job is not None and running:
        _watch(job)
        return False
    with st.container(horizontal=True, vertical_alignment="center"):
        label = "Continue" if begun and found is None else "Train"
        asked = st.button(
            label,
            type="primary",
            icon=":material/play_arrow:",
            disabled=found is not None,
            key="train",
            width=_WIDTH,
            help="Trains in the background. You can leave the page and come back.",
        )
        if found is not None:
            st.progress(1.0, f"trained in {in_words(sum(found.outcome.seconds.values()))}", width="stretch")
        elif job is not None and job.state == "cancelled":
            st.progress(job.share or 0.0, "stopped; the progress so far is saved", width="stretch")
        else:
            st.progress(0.0, "not trained yet", width="stretch")
    if job is not None and job.state == "failed":
        messages.error(messages.failure_reason(job))
    return asked


def _watch(job: Job) -> None:
    def draw() -> None:
        last = next((told for told in reversed(job.results) if isinstance(told, PhaseProgress)), None)
        told = f"{last.phase}, epoch {last.moment.epoch:.3g}; " if last else ""
        said = told + job_panel.words(job).partition("done, ")[2] or "computing"
        job_panel.progress_row(job, said, "cancel_training", _WIDTH)

    job_panel.watch_job(job, draw, _REDRAW)


def outcome(found: LabRun) -> None:
    """Draw the accuracy, the zeros and the size of the trained network."""
    o = found.outcome
    with st.container(horizontal=True):
        st.metric("Top-1 accuracy", f"{o.accuracy:.1%} ± {50 * (o.interval[1] - o.interval[0]):.1f}", border=True)
        st.metric("Zero weights", f"{o.zero:.1%}", border=True)
        st.metric("Remaining parameters", f"{o.params:,}", f"{o.params / o.dense_params - 1:.0%}", "off", border=True)
        st.metric("Multiply-accumulates", f"{o.macs:,}", f"{o.macs / o.dense_macs - 1:.0%}", "off", border=True)
    spent = ", ".join(f"{phase} {in_words(seconds)}" for phase, seconds in o.seconds.items())
    removed = (
        f"Removing channels without incoming weights changed no logit by more than {o.difference:.0e} of the largest. "
        if o.zero and o.params < 0.99 * o.dense_params
        else ""
    )
    st.caption(f"Measured on all {o.count:,} test images, which were not used for model selection. {removed}Training: {spent}.")


def keep_run_form(found: LabRun) -> None:
    """Draw a form that keeps the network under a name, so that every page can open it."""
    with st.form("keep", border=False), st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.text_input("Save network as", f"{found.spec.method}-{found.spec.model}", width=320)
        small = st.checkbox(
            "Remove channels without input",
            value=False,
            width=320,
            help="Removes channels without incoming weights and folds BatchNorm. The outputs stay the same.",
        )
        asked = st.form_submit_button("Save", icon=":material/save:")
    if asked:
        model = found.model
        if small:
            card = model.card
            model = without_zeroed(model, card.example())
            model.card = card
        try:
            kept = open_model.keep_network(model, name.strip())
        except IntrafusionError as error:
            messages.error(error)
        else:
            st.success(f"Saved. Choose **{kept}** as the model in the sidebar of any page.", icon=":material/check:")


def chosen(model: str) -> tuple[list[LabRun], list[str]]:
    """Draw the choice of runs to compare. Return the runs, and a name for each that shows how it differs."""
    newest: dict[tuple[TrainSpec, bool], LabRun] = {}
    for one in runs():
        if one.spec.model == model and not one.spec.part:
            newest.setdefault((one.spec, one.older), one)
    found = list(newest.values())
    names = [
        f"{name}, other code version" if one.older else name
        for name, one in zip(names_of([one.spec for one in found]), found, strict=True)
    ]
    by_name = dict(zip(names, found, strict=True))
    if not by_name:
        return [], []
    picked = st.multiselect("Runs", list(by_name), default=list(by_name)[:_MOST_COMPARED])
    return [by_name[name] for name in picked], picked


def names_of(specs: Sequence[TrainSpec]) -> list[str]:
    """Return a name for each spec: its method, and the settings that differ among the specs of that method."""
    named = []
    for spec in specs:
        peers = [other for other in specs if other.method == spec.method]
        told = [
            f"{field.name} {getattr(spec, field.name)}"
            for field in fields(spec)
            if len({getattr(peer, field.name) for peer in peers}) > 1
        ]
        named.append(f"{spec.method} ({', '.join(told)})" if told else spec.method)
    return named


def run_table(found: Sequence[LabRun], names: Sequence[str]) -> pd.DataFrame:
    """Return a table of runs, one row per run."""
    return pd.DataFrame(
        [
            {
                "run": name,
                "accuracy": f"{one.outcome.accuracy:.1%} ± {50 * (one.outcome.interval[1] - one.outcome.interval[0]):.1f}",
                "epochs": f"{one.spec.epochs:g}",
                "zero weights": f"{one.outcome.zero:.1%}",
                "parameters": f"{one.outcome.params:,}",
                "MACs": f"{one.outcome.macs:,}",
                "seconds": f"{sum(one.outcome.seconds.values()):.1f}",
                "precision, device": one.outcome.where,
            }
            for name, one in zip(names, found, strict=True)
        ]
    )
