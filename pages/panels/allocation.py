"""A smaller network on the Sensitivity page: sparsities for a target, and the measured accuracy of the network they give."""

from collections.abc import Mapping

import streamlit as st

from intrafusion import PruneSpec
from intrafusion.pruning.importance import needs_images
from intrafusion.reporting.figures.fragility import suggestion_bars
from intrafusion.reporting.snippets import curve_line
from intrafusion.runtime.jobs import Job
from intrafusion.studies.allocation import Shapes, Suggestion, shapes, suggest
from intrafusion.studies.measurement import Result
from intrafusion.studies.sensitivity import Matrix
from intrafusion.studies.session import Session
from intrafusion.studies.store.sqlite import Store
from pages.panels import export
from pages.panels.sensitivity import clickable, with_interval
from pages.shared import background_jobs, job_panel, messages, parts, studying
from pages.shared.links import BIND
from pages.shared.open_model import Here

KEYS = ("budget", "share", "least", "suggest_merge")
_TARGETS = {"parameters": "params", "MACs": "macs", "accuracy": "accuracy"}
_CHEAP = 2e10  # multiply-accumulates that a laptop does within a second: a cheaper network is measured automatically
_PATIENCE = 1.0  # seconds that the page waits for that measurement


@st.cache_resource(max_entries=6, show_spinner=False)
def _shapes(_here: Here, key: tuple) -> Shapes:
    return shapes(_here.session.model, _here.session.groups, _here.session.example)


def suggestion(here: Here, session: Session, base: PruneSpec, made: Mapping[str, Matrix], kept: Store | None) -> None:
    """Draw the suggested sparsities of all groups for a target, and the measured accuracy of the network they give.

    made: the sensitivity matrix of each merge, from which the sparsities are found.
    """
    st.markdown(
        "These sparsities lose the least accuracy according to the heatmap above, **if the losses of the groups add up**. They "
        "rarely add up exactly, so measure the pruned network to confirm."
    )
    left, middle, right = st.columns([1.4, 3, 1.4])
    target = left.selectbox("Target", list(_TARGETS), index=1, key="budget", bind=BIND)
    with middle:
        value = _value(target, made)
    merge = right.selectbox("Merge", list(made), index=len(made) - 1, key="suggest_merge", bind=BIND)
    found = suggest(made[merge], _shapes(here, here.key()), _TARGETS[target], value)
    if not found.met:
        messages.warning(found.note)
    clickable(suggestion_bars(found, parts.is_dark()), "suggestion")
    if found.dense.note:
        st.caption(f"{found.dense.note}.")
    if not all(cell.complete for cell in made[merge].cells.values()):
        st.caption("The study is not complete: some losses are measured on a sample of the images.")
    losing = {group: share for group, share in found.sparsities.items() if share > 0}
    if not losing:
        st.info("This target needs no pruning.")
        return
    spec = base.but(groups=tuple(losing), sparsities=tuple(losing.values()), merge=found.merge)
    _verified(here, session, spec, found, value if target == "accuracy" else None, kept)
    st.caption("Command line that measures the same network:")
    line = curve_line(spec, criterion=[spec.criterion], merge=[spec.merge], sparsity=[0.0])
    st.code(line, language="bash", wrap_lines=True)
    st.page_link(
        "pages/export.py",
        label="Export this network",
        icon=":material/archive:",
        query_params=export.query(spec),
    )


def _value(target: str, made: Mapping[str, Matrix]) -> float:
    """Draw the slider of the target and return its value as a fraction."""
    if target != "accuracy":
        about = f"Share of the {target} of the dense network."
        return st.slider(f"Maximum {target}, %", 5, 100, 70, key="share", bind=BIND, help=about) / 100
    dense = 100 * max(matrix.dense for matrix in made.values())
    words = f"Minimum accuracy, % (dense: {dense:.1f})"
    return st.slider(words, 1.0, 100.0, max(1.0, float(int(dense) - 2)), 0.5, "%.1f", key="least", bind=BIND) / 100


def _verified(
    here: Here, session: Session, spec: PruneSpec, found: Suggestion, least: float | None, kept: Store | None
) -> None:
    """Draw the expected accuracy beside the measured one. If measuring takes long, draw a button for it."""
    key = ("verify", here.key(), spec)
    known, job = studying.stored(kept, [spec], session), background_jobs.jobs().get(key)
    measured = studying.points(known, [spec], job).get(spec)
    complete = measured is not None and measured.complete
    count = min(spec.limit or len(session.images()), len(session.images()))
    if not complete and job is None and session.size.macs * count < _CHEAP and not needs_images(spec):
        job = studying.start_study(key, [spec], session, kept, f"pruned {spec.model}")
        job.wait(_PATIENCE)
        measured = studying.points(known, [spec], job).get(spec)
        complete = measured is not None and measured.complete
    if measured:
        st.markdown(in_words(found, measured, least))
    _numbers(found, measured)
    if job is not None and job.active:
        _wait(job)
    elif not complete and st.button("Prune and measure", icon=":material/content_cut:"):
        studying.start_study(key, [spec], session, kept, f"pruned {spec.model}")
        st.rerun()
    if job is not None:
        studying.problems(job)


def in_words(found: Suggestion, measured: Result, least: float | None = None) -> str:
    """Say as text whether the measured accuracy meets the expected one. least: the target accuracy, None if not given."""
    low, high = measured.interval
    said = f"Expected {found.accuracy:.1%}, measured **{with_interval(measured.accuracy, measured.interval)}**"
    if low <= found.accuracy <= high:
        said += f": the losses add up within the interval on {measured.count:,} images"
    else:
        compared = "more" if found.accuracy > high else "less"
        said += f": pruned together, the groups lose {compared} than the sum of their separate losses"
    if least is not None:
        said += f". The target of {least:.1%} is {'met' if measured.accuracy >= least else 'not met'}"
    return said + "."


def _numbers(found: Suggestion, measured: Result | None) -> None:
    """Draw four metrics of the network: parameters, MACs, and the expected and the measured accuracy."""
    dense, size = found.dense, found.size
    numbers = {
        "Parameters": (f"{size.params / dense.params:.0%}", f"{size.params:,} of {dense.params:,}"),
        "MACs": (f"{size.macs / dense.macs:.0%}", f"{_millions(size.macs)} of {_millions(dense.macs)} million"),
        "Expected accuracy": (f"{found.accuracy:.1%}", "if the losses add up"),
        "Measured accuracy": ("not yet", "prune and measure"),
    }
    if measured:
        so_far = "" if measured.complete else f" of {measured.total:,}"
        numbers["Measured accuracy"] = (
            with_interval(measured.accuracy, measured.interval),
            f"{measured.count:,}{so_far} images, dense {measured.dense_accuracy:.1%}",
        )
    row = st.grid(4, min_column_width=190, gap="small")
    for name, (value, about) in numbers.items():
        with row.container():
            st.metric(name, value, about, delta_color="off", delta_arrow="off", border=True)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count < 1e8 else f"{count / 1e6:,.0f}"


def _wait(job: Job) -> None:
    def draw() -> None:
        st.progress(job.share or 0.0, f"Pruning all groups, from output to input, and measuring: {job_panel.words(job)}")

    job_panel.watch_job(job, draw, every=0.5)
