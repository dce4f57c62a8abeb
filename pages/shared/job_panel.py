"""Background jobs on a page: what starts one, how far it is, what it has found so far, and a way to stop it.

`watch` is the one place where a page looks at a job again and again. `ask` and `results` are for work with one result,
`Work` and `board` for several computations of one page whose results get better.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from intrafusion.runtime.jobs import Job
from intrafusion.runtime.progress import in_words
from pages.shared import app_state, messages

CHEAP = 1e11  # multiply-accumulates that a laptop does in about three seconds: such work starts unasked
_LOOK = 1.5  # seconds between two looks at what computes
_REDRAW = 3.0  # seconds between two drawings of what gets better, at least
_WIDTH = 210  # pixels of a button, whatever it says


def watch(
    draw: Callable[[], None], is_active: Callable[[], bool], news: Callable[[float], bool] | None = None, every: float = 1.0
) -> None:
    """Draw again and again, every few seconds, while something computes.

    The whole page runs again once it is over, and where there is news for it. news: gets the seconds since the page was drawn.
    """
    drawn = time.monotonic()

    @st.fragment(run_every=every)
    def look() -> None:
        if not is_active() or (news is not None and news(time.monotonic() - drawn)):
            st.rerun()
        draw()

    look()


def watch_job(job: Job, draw: Callable[[], None], redraw: float = float("inf"), every: float = 1.0) -> None:
    """`watch` one job. redraw: seconds after which the page shows what is new, at least; more where the job takes long.

    Each drawing takes the picture away from under the pointer, and the longer a job takes, the less is new.
    """
    watch(draw, lambda: job.active, lambda age: age > max(redraw, job.elapsed / 20), every)


def progress_row(job: Job, said: str, key: str, width: int | None = None) -> None:
    """A button that stops a job, and how far it is. said: in words."""
    with st.container(horizontal=True, vertical_alignment="center"):
        cancel_button(job, key, icon=":material/stop:", **({} if width is None else {"width": width}))
        st.progress(job.share or 0.0, said, width="stretch")


def cancel_button(job: Job, key: str, **look: Any) -> None:
    """A button that stops the job; inside a fragment, so that what it draws next shows that the job has stopped.

    None for somebody who may not stop it.
    """
    if app_state.may_cancel(job):
        st.button("Cancel", key=key, on_click=_cancel, args=(job,), disabled=job.state == "stopping", **look)


def _cancel(job: Job) -> None:
    job.cancel()
    job.wait(0.5)


def words(job: Job) -> str:
    """How far an active job is and how long it takes: "7 of 18 done, about 12 s left"."""
    if job.state == "stopping":
        return "stopping"
    if job.started is None:
        ahead = app_state.jobs().ahead(job)
        return f"waiting, {ahead} ahead" if ahead > 1 else "waiting, next in line"
    said = f"{int(job.done)} of {job.total} done" if job.total > 1 else f"{job.share:.0%} done" if job.share else ""
    left = app_state.jobs().seconds_left(job)
    return ", ".join(filter(None, (said, left is not None and f"about {in_words(left)} left"))) or "computing"


def ask(key: tuple, label: str, total: int, work: Callable[[], Iterator], about: str, redraw: bool = False) -> None:
    """A button that starts a job, or the progress of the one that runs.

    total: how many results `work` yields. about: what it is good for, in words. redraw: the page, at each result.
    """
    job = app_state.jobs().get(key)
    if job is not None and job.active:
        _watch_asked(key, job, about, redraw)
        return
    outcome = job and {"failed": messages.reason(job), "cancelled": "Cancelled; what is done stays"}.get(job.state)
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button(label, icon=":material/play_arrow:", key=f"ask {key}"):  # the label may change under the pointer
            app_state.start(key, total, work, f"{label}, {st.session_state.here.spec.model}")
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
    """What `work` yields: computed at once where its multiply-accumulates are few, else None until asked for and done."""
    if macs < CHEAP:
        return _computed(key, work)
    job = app_state.jobs().get(key)
    if job is not None and job.state == "done":
        return job.results
    ask(key, label, total, work, about)
    return None


@st.cache_resource(max_entries=128, show_spinner="Looking at the images")
def _computed(key: tuple, _work: Callable[[], Iterator]) -> list:
    return list(_work())


@dataclass(frozen=True)
class Work:
    """One of a page's computations. key: what its results depend on.

    run: yields them, better and better; `share` of each says how much of the work is done.
    """

    name: str
    label: str
    key: tuple
    run: Callable[[], Iterator]

    @property
    def job(self) -> Job | None:
        return app_state.jobs().get((self.name, *self.key))

    @property
    def is_open(self) -> bool:
        """Whether there is something to start."""
        return self.job is None or self.job.state in ("failed", "cancelled")

    def start(self) -> None:
        title = f"{self.name} of {st.session_state.here.spec.model}"
        app_state.start((self.name, *self.key), 1, self.run, title, part=lambda found: (0, found.share))

    def section(self, row: DeltaGenerator) -> Any:
        """Draw the button into a row, and what went wrong; the last result, None before the first."""
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
                st.caption("Nothing is computed before you ask.")
        if job is not None and job.state == "failed":
            messages.warning(messages.reason(job))
        return job.results[-1] if job is not None and job.results else None


def board(works: Sequence[Work]) -> None:
    """The button that starts whatever has not been computed, in the order of the page; how far each is, and a way to stop it.

    The page runs again whenever a first or a last result has come, and every few seconds for better ones in between.
    """
    todo = [work for work in works if work.is_open]
    computing = any(work.job is not None and work.job.active for work in works)
    with st.container(horizontal=True, vertical_alignment="center"):
        label = "Compute all" if len(todo) == len(works) else "Compute the rest" if todo else "All computed"
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
        st.caption("In the background, in turns; each can be cancelled, and a reload loses nothing.")
    if computing:
        _watch_all(works)
    else:
        _states(works)


def _watch_all(works: Sequence[Work]) -> None:
    # one fragment for all: every run of a script costs the server a garbage collection
    seen, before = _seen(works), _done(works)

    def news(age: float) -> bool:
        longest = max(work.job.elapsed for work in works if work.job is not None)
        return _seen(works) != seen or (age > max(_REDRAW, longest / 15) and _done(works) > before)

    watch(lambda: _states(works), lambda: True, news, _LOOK)


def _seen(works: Sequence[Work]) -> list[tuple[bool, bool]]:
    """Of each, whether it computes, and whether there is a result."""
    jobs = [work.job for work in works]
    return [(job is not None and job.active, bool(job is not None and job.results)) for job in jobs]


def _done(works: Sequence[Work]) -> float:
    return sum(work.job.done for work in works if work.job is not None)


def _states(works: Sequence[Work]) -> None:
    """A row, of one height whatever it says: how far each is, and a button to stop what computes."""
    for column, work in zip(st.columns(len(works)), works, strict=True):
        job = work.job
        said = "not asked for" if job is None else words(job) if job.active else job.state
        with column, st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.progress((job and job.share) or 0.0, f"{work.name}  \n:gray[{said}]", width="stretch")
            if job is not None and job.active:
                cancel_button(job, f"cancel {work.name}", type="tertiary")
