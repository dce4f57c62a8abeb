"""Background jobs on a page: start a job, show its progress and its results so far, and cancel it.

`watch` is the only place where a page polls a job. `ask` and `results` are for work with one result; `Work` and `board`
are for several computations on one page whose results improve over time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from intrafusion.runtime.jobs import Job
from intrafusion.runtime.progress import in_words
from pages.shared import background_jobs, messages

CHEAP = 1e11  # multiply-accumulates that a laptop does in about three seconds: work below this starts automatically
_LOOK = 1.5  # seconds between two polls of the running jobs
_REDRAW = 3.0  # least seconds between two redraws of improving results
_WIDTH = 210  # width of a button in pixels, whatever its label


def watch(
    draw: Callable[[], None], is_active: Callable[[], bool], news: Callable[[float], bool] | None = None, every: float = 1.0
) -> None:
    """Call `draw` every `every` seconds while `is_active` returns true.

    The whole page reruns when the work is over, or when `news` returns true. news: called with the seconds since the page
    was drawn.
    """
    drawn = time.monotonic()

    @st.fragment(run_every=every)
    def look() -> None:
        if not is_active() or (news is not None and news(time.monotonic() - drawn)):
            st.rerun()
        draw()

    look()


def watch_job(job: Job, draw: Callable[[], None], redraw: float = float("inf"), every: float = 1.0) -> None:
    """Watch one job. redraw: least seconds before the page reruns for new results; the time grows with the job's duration.

    Each redraw interrupts a reader who points at a picture, and the longer a job runs, the less a redraw adds.
    """
    watch(draw, lambda: job.active, lambda age: age > max(redraw, job.elapsed / 20), every)


def progress_row(job: Job, said: str, key: str, width: int | None = None) -> None:
    """Draw a button that cancels a job, and its progress bar. said: the text of the progress bar."""
    with st.container(horizontal=True, vertical_alignment="center"):
        cancel_button(job, key, icon=":material/stop:", **({} if width is None else {"width": width}))
        st.progress(job.share or 0.0, said, width="stretch")


def cancel_button(job: Job, key: str, **look: Any) -> None:
    """Draw a button that cancels the job. Call it inside a fragment, so that the next redraw shows the job as stopped.

    Draw nothing for a reader who may not cancel the job.
    """
    if background_jobs.may_cancel(job):
        st.button("Cancel", key=key, on_click=_cancel, args=(job,), disabled=job.state == "stopping", **look)


def _cancel(job: Job) -> None:
    job.cancel()
    job.wait(0.5)


def words(job: Job) -> str:
    """Return the progress of an active job as text: "7 of 18 done, about 12 s left"."""
    if job.state == "stopping":
        return "stopping"
    if job.started is None:
        ahead = background_jobs.jobs().ahead(job)
        return f"waiting, {ahead} ahead" if ahead > 1 else "waiting, next in line"
    said = f"{int(job.done)} of {job.total} done" if job.total > 1 else f"{job.share:.0%} done" if job.share else ""
    left = background_jobs.jobs().seconds_left(job)
    return ", ".join(filter(None, (said, left is not None and f"about {in_words(left)} left"))) or "computing"


def ask(key: tuple, label: str, total: int, work: Callable[[], Iterator], about: str, redraw: bool = False) -> None:
    """Draw a button that starts a job, or the progress of the running job.

    total: how many results `work` yields. about: what the work is for, as text. redraw: whether to redraw the page after
    each result.
    """
    job = background_jobs.jobs().get(key)
    if job is not None and job.active:
        _watch_asked(key, job, about, redraw)
        return
    outcome = job and {"failed": messages.failure_reason(job), "cancelled": "Cancelled; finished results are kept"}.get(
        job.state
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button(label, icon=":material/play_arrow:", key=f"ask {key}"):  # a fixed key, because the label may change
            background_jobs.start_job(key, total, work, f"{label}, {st.session_state.here.spec.model}")
            st.rerun()
        st.caption(outcome or about)


def _watch_asked(key: tuple, job: Job, about: str, redraw: bool) -> None:
    seen = len(job.results)

    def draw() -> None:
        bar, button = st.columns([6, 1], vertical_alignment="center")
        bar.progress(job.share or 0.0, f"{about}; {words(job)}")
        with button:
            cancel_button(job, f"cancel {key}", icon=":material/stop:")

    watch(draw, lambda: job.active, lambda age: redraw and len(job.results) > seen, every=0.5)


def results(key: tuple, macs: float, label: str, total: int, work: Callable[[], Iterator], about: str) -> list | None:
    """Return what `work` yields. Compute it at once if `macs` is below CHEAP; else draw `ask` and return None until done."""
    if macs < CHEAP:
        return _computed(key, work)
    job = background_jobs.jobs().get(key)
    if job is not None and job.state == "done":
        return job.results
    ask(key, label, total, work, about)
    return None


@st.cache_resource(max_entries=128, show_spinner="Computing")
def _computed(key: tuple, _work: Callable[[], Iterator]) -> list:
    return list(_work())


@dataclass(frozen=True)
class Work:
    """One of a page's computations. key: what its results depend on.

    run: yields results of increasing quality; each result's `share` is the fraction of the work that is done.
    """

    name: str
    label: str
    key: tuple
    run: Callable[[], Iterator]

    @property
    def job(self) -> Job | None:
        return background_jobs.jobs().get((self.name, *self.key))

    @property
    def is_open(self) -> bool:
        """Whether the work can be started: it has no job, or its job failed or was cancelled."""
        return self.job is None or self.job.state in ("failed", "cancelled")

    def start(self) -> None:
        title = f"{self.name} of {st.session_state.here.spec.model}"
        background_jobs.start_job((self.name, *self.key), 1, self.run, title, part=lambda found: (0, found.share))

    def section(self, row: DeltaGenerator) -> Any:
        """Draw the button into a row, and any error. Return the latest result, or None before the first."""
        job = self.job
        again = job is not None and self.is_open
        with row:
            if st.button(
                f"{self.label} again" if again else self.label,
                key=f"ask {self.name}",
                icon=":material/play_arrow:",
                disabled=not self.is_open,
                width=_WIDTH,
            ):
                self.start()
                st.rerun()
            if job is None:
                st.caption("Not computed yet.")
        if job is not None and job.state == "failed":
            messages.warning(messages.failure_reason(job))
        return job.results[-1] if job is not None and job.results else None


def board(works: Sequence[Work]) -> None:
    """Draw the button that starts all open works in page order, and the progress and a cancel button of each work.

    The page reruns after a work's first and last result, and every few seconds in between if results have improved.
    """
    todo = [work for work in works if work.is_open]
    computing = any(work.job is not None and work.job.active for work in works)
    with st.container(horizontal=True, vertical_alignment="center"):
        label = "Compute all" if len(todo) == len(works) else "Compute remaining" if todo else "All computed"
        if st.button(
            label if todo or not computing else "Computing",
            type="primary",
            icon=":material/play_arrow:",
            disabled=not todo,
            width=_WIDTH,
            key="ask all",
        ):
            for work in todo:
                work.start()
            st.rerun()
        st.caption("Jobs run in the background, in turns. You can cancel each one; reloading the page loses nothing.")
    if computing:
        _watch_all(works)
    else:
        _states(works)


def _watch_all(works: Sequence[Work]) -> None:
    # one fragment for all works, because every script run costs the server a garbage collection
    seen, before = _seen(works), _done(works)

    def news(age: float) -> bool:
        longest = max(work.job.elapsed for work in works if work.job is not None)
        return _seen(works) != seen or (age > max(_REDRAW, longest / 15) and _done(works) > before)

    watch(lambda: _states(works), lambda: True, news, _LOOK)


def _seen(works: Sequence[Work]) -> list[tuple[bool, bool]]:
    """Return, for each work, whether it is running and whether it has a result."""
    jobs = [work.job for work in works]
    return [(job is not None and job.active, bool(job is not None and job.results)) for job in jobs]


def _done(works: Sequence[Work]) -> float:
    return sum(work.job.done for work in works if work.job is not None)


def _states(works: Sequence[Work]) -> None:
    """Draw a row of constant height: the progress of each work, and a cancel button for each running one."""
    for column, work in zip(st.columns(len(works)), works, strict=True):
        job = work.job
        said = "not started" if job is None else words(job) if job.active else job.state
        with column, st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.progress((job and job.share) or 0.0, f"{work.name}  \n:gray[{said}]", width="stretch")
            if job is not None and job.active:
                cancel_button(job, f"cancel {work.name}", type="tertiary")
