"""Work of a page in the background: a button that starts it, its progress, a way to stop it, its results as they get better."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from intrafusion.jobs import Job
from pages.common import queue, shell

_REDRAW = 1.5  # seconds between two drawings of what still comes, at least
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
        return shell.jobs().get((self.name, *self.key))

    @property
    def is_open(self) -> bool:
        """Whether there is something to start."""
        return self.job is None or self.job.state in ("failed", "cancelled")

    def start(self) -> None:
        title = f"{self.name} of {st.session_state.here.spec.model}"
        shell.start((self.name, *self.key), 1, self.run, title, part=lambda found: (0, found.share))

    def section(self, row: DeltaGenerator) -> Any:
        """Draw the button or the progress into a row, and what went wrong; the last result, None before the first."""
        job = self.job
        with row:
            if job is not None and job.active:
                _watch(job, self.name)
            elif self.is_open:
                label = self.label if job is None else f"{self.label} again"
                if st.button(label, key=f"ask {self.name}", icon=":material/play_arrow:", width=_WIDTH):
                    self.start()
                    st.rerun()
                st.caption("Nothing is computed before you ask." if job is None else f"{job.state}; what came stays")
        if job is not None and job.state == "failed":
            st.warning(job.error, icon=":material/warning:")
        return job.results[-1] if job is not None and job.results else None


def _watch(job: Job, name: str) -> None:
    drawn, done = time.monotonic(), job.done

    @st.fragment(run_every=1)
    def look() -> None:
        patience = max(_REDRAW, job.elapsed / 15)
        if not job.active or (job.done > done and time.monotonic() - drawn > patience):
            st.rerun()
        with st.container(horizontal=True, vertical_alignment="center"):
            queue.cancel_button(job, f"cancel {name}", icon=":material/stop:", width=_WIDTH)
            st.progress(job.share or 0.0, queue.words(job), width="stretch")

    look()


def ask_all(row: DeltaGenerator, works: Sequence[Work]) -> None:
    """The button that starts whatever has not been computed, in the order of the page."""
    with row:
        todo = [work for work in works if work.is_open]
        computing = any(work.job is not None and work.job.active for work in works)
        label = "Compute all" if len(todo) == len(works) else "Compute the rest" if todo else "All computed"
        label = label if todo or not computing else "Computing"
        if st.button(
            label, type="primary", icon=":material/play_arrow:", disabled=not todo, width=_WIDTH, key="ask all"
        ):
            for work in todo:
                work.start()
            st.rerun()
        st.caption("In the background, in turns; each can be cancelled, and a reload loses nothing.")
