"""Work of a page in the background: a button that starts it, its progress, a way to stop it, its results as they get better."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from intrafusion.runtime.jobs import Job
from pages.shared import app_state, job_queue, messages

_LOOK = 1.5  # seconds between two looks at what computes
_REDRAW = 3.0  # seconds between two drawings of what gets better, at least
_WIDTH = 210  # pixels of a button, whatever it says


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
        _watch(works)
    else:
        _states(works)


def _watch(works: Sequence[Work]) -> None:
    # one fragment for all: every run of a script costs the server a garbage collection
    drawn, seen, before = time.monotonic(), _seen(works), _done(works)

    @st.fragment(run_every=_LOOK)
    def look() -> None:
        longest = max(work.job.elapsed for work in works if work.job is not None)
        is_old = time.monotonic() - drawn > max(_REDRAW, longest / 15)
        if _seen(works) != seen or (is_old and _done(works) > before):
            st.rerun()
        _states(works)

    look()


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
        said = "not asked for" if job is None else job_queue.words(job) if job.active else job.state
        with column, st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.progress((job and job.share) or 0.0, f"{work.name}  \n:gray[{said}]", width="stretch")
            if job is not None and job.active:
                job_queue.cancel_button(job, f"cancel {work.name}", type="tertiary")
