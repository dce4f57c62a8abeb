"""Studies in the background: started by a page, stored point by point, and watched by every page with the same settings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import streamlit as st

from intrafusion import IntrafusionError, PruneSpec
from intrafusion.runtime.jobs import Job
from intrafusion.runtime.paths import store_path
from intrafusion.runtime.progress import in_words
from intrafusion.studies.measurement import Result
from intrafusion.studies.session import Session
from intrafusion.studies.store.in_memory import StoreOrMemory
from intrafusion.studies.store.sqlite import StudyRow
from intrafusion.studies.study_file import Study
from intrafusion.studies.sweeps import Failure, origin, sweep
from pages.shared import background_jobs, job_panel, messages

_REDRAW = 4.0  # least seconds between two redraws of a running study
_WIDTH = 160  # width of the button in pixels, whatever its label
Found = dict[PruneSpec, Result]


@dataclass(frozen=True)
class State:
    """The known results of a page's points.

    running: whether the job was running before the store was read; if so, the page reruns later. stored: the store's
    results. known: the same with the job's newer results. settled: whether running the points again would yield nothing
    new.
    """

    key: tuple
    specs: Sequence[PruneSpec]
    job: Job | None
    running: bool
    stored: Found
    known: Found
    settled: bool

    @property
    def label(self) -> str | None:
        """The button's label if some points are known; None for the page's own label."""
        return "Continue" if self.known and not self.settled else None


def state(key: tuple, specs: Sequence[PruneSpec], session: Session, kept: StoreOrMemory | None) -> State:
    """Return the state of one study of a page. key: the key of the study's job."""
    job = background_jobs.jobs().get(key)
    running = job is not None and job.active
    found = stored(kept, specs, session)
    known = points(found, specs, job)
    return State(key, specs, job, running, found, known, is_settled(known, specs, job))


def store() -> StoreOrMemory | None:
    """Return the server's results store, or None if its file could not be opened. Show on the page why it cannot be used."""
    try:
        kept = _store(str(store_path().absolute()))
    except IntrafusionError as error:
        messages.warning(f"Results will be lost when the server stops: {error}.", icon=":material/database_off:")
        return None
    if kept.problem:
        messages.warning(
            f"Jobs continue, and their results are held in memory: {kept.problem}.", icon=":material/database_off:"
        )
    return kept


@st.cache_resource(max_entries=4, show_spinner=False)
def _store(path: str) -> StoreOrMemory:
    return StoreOrMemory(path)


def stored(kept: StoreOrMemory | None, specs: Sequence[PruneSpec], session: Session) -> Found:
    """Return the stored results of these points; none, with a warning on the page, if the store cannot be read."""
    try:
        return kept.get((spec, origin(spec, session)) for spec in specs) if kept else {}
    except IntrafusionError as error:
        messages.warning(error, icon=":material/database_off:")
        return {}


def points(known: Found, specs: Sequence[PruneSpec], job: Job | None) -> Found:
    """Return the results of these points so far, in order: the job's where it has seen at least as many images as `known`."""
    found = dict(known)
    for result in job.results if job else ():
        if isinstance(result, Result) and result.count >= (found[result.spec].count if result.spec in found else 0):
            found[result.spec] = result
    return {spec: found[spec] for spec in specs if spec in found}


def studies(kept: StoreOrMemory | None) -> dict[str, StudyRow]:
    """Return the stored studies by name, newest first. Return none while results are held in memory, see `store`."""
    try:
        return {row.name: row for row in kept.studies()} if kept and not kept.problem else {}
    except IntrafusionError as error:
        messages.warning(error, icon=":material/database_off:")
        return {}


def save_study(kept: StoreOrMemory | None, study: Study, specs: Sequence[PruneSpec], session: Session) -> None:
    """Save a study under its name, replacing any other. Do nothing while results are held in memory."""
    try:
        if kept and not kept.problem:
            kept.save_study(study.name, study.to_toml(), [(spec, origin(spec, session)) for spec in specs])
    except IntrafusionError as error:
        messages.warning(error, icon=":material/database_off:")


def start_study(
    key: tuple,
    specs: Sequence[PruneSpec],
    session: Session,
    kept: StoreOrMemory | None,
    title: str,
    run: Callable[..., Iterator[Result | Failure]] = sweep,
    decide: bool = False,
    lasts: bool = False,
) -> Job:
    """Measure the specs in the background. Rerun the page afterwards. lasts: see `background_jobs.start`."""
    return background_jobs.start_job(
        key,
        len(specs),
        lambda: run(specs, session, kept, decide=decide),
        title,
        lasts,
        part=lambda result: (result.spec, share(result)),
    )


def share(result: Result | Failure) -> float:
    """Return the fraction of a point's images that are measured; 1 for a failed point."""
    return result.count / result.total if isinstance(result, Result) else 1.0


def is_settled(found: Found, specs: Sequence[PruneSpec], job: Job | None) -> bool:
    """Return whether running these points again would yield nothing new."""
    if job is not None and job.state == "done" and not _failed(job):
        return True
    return len(found) == len(specs) and all(result.complete for result in found.values())


def run_row(label: str, about: str | None, settled: bool, state: State, images: int) -> bool:
    """Draw the button that starts a study, its progress, and any errors. Return whether the button was pressed.

    settled: whether there is nothing to start. While the study runs, the button cancels it, and the page reruns every few
    seconds to show new points.
    """
    job = state.job
    if job is not None and state.running:
        _watch(state, job, images)
        problems(job)
        return False
    with st.container(horizontal=True, vertical_alignment="center"):
        asked = st.button(
            label,
            help=about,
            type="primary",
            icon=":material/play_arrow:",
            disabled=settled,
            key="run_points",
            width=_WIDTH,
        )
        _progress(points(state.stored, state.specs, job), state.specs, job, images)
    if job is not None:
        problems(job)
    return asked


def _watch(state: State, job: Job, images: int) -> None:
    def draw() -> None:
        with st.container(horizontal=True, vertical_alignment="center"):
            job_panel.cancel_button(job, "cancel_points", icon=":material/stop:", width=_WIDTH)
            _progress(points(state.stored, state.specs, job), state.specs, job, images)

    job_panel.watch_job(job, draw, _REDRAW)


def _progress(found: Found, specs: Sequence[PruneSpec], job: Job | None, images: int) -> None:
    finished = job is not None and job.state == "done"
    done = sum(finished or result.complete for result in found.values())
    failed = len(_failed(job)) if job else 0
    early = sum(not result.complete for result in found.values())
    said = [
        _state(job, found, len(specs)),
        *([f"{early} decided early" if finished else f"{early} on a sample so far"] if early else []),
        *([f"{failed} failed"] if failed else []),
    ]
    behind = sum(1.0 if finished else share(result) for result in found.values()) / len(specs)
    words = f"{done} of {len(specs)} points on {images:,} images: {'; '.join(said)}"
    st.progress(min(behind, 1.0), words, width="stretch")


def _state(job: Job | None, found: Found, total: int) -> str:
    active = job is not None and job.active
    if not active and len(found) == total and all(result.complete for result in found.values()):
        return "done"
    if job is None:
        return "not complete yet" if found else "not computed yet"
    if not active:
        return {"cancelled": "cancelled; finished points are kept"}.get(job.state, job.state)
    if job.started is None or job.state == "stopping":
        return job_panel.words(job)
    left = background_jobs.jobs().seconds_left(job)
    return "computing" if left is None else f"computing, about {in_words(left)} left"


def problems(job: Job) -> None:
    """Show why the study or some of its points failed, one line per reason."""
    if job.state == "failed":
        messages.error(messages.failure_reason(job))
    by_reason: dict[str, list[Failure]] = {}
    for failure in _failed(job).values():
        by_reason.setdefault(failure.reason, []).append(failure)
    for alike in by_reason.values():
        points = _points([failure.spec for failure in alike])
        messages.warning(f"{points} could not be measured: {messages.failure_reason(alike[0])}")


def _failed(job: Job) -> dict[PruneSpec, Failure]:
    return {result.spec: result for result in job.results if isinstance(result, Failure)}


def _points(specs: Sequence[PruneSpec]) -> str:
    """Describe some points as text: the first point, and how many more there are."""
    first = specs[0]
    where = "All groups" if isinstance(first.groups, str) else f"Group {', '.join(first.groups[:3])}"
    said = f"{where} at {first.sparsity:.0%}, {first.criterion}, {first.merge}"
    said += f", {first.recovery}" if first.recovery != "none" else ""
    return f"{said}, and {len(specs) - 1} more points" if len(specs) > 1 else said
