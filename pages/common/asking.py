"""Work that is too long to start unasked: a button, then a job's progress, then its results."""

from collections.abc import Callable, Iterator

import streamlit as st

from intrafusion.jobs import Job
from pages.common import shell

CHEAP = 1e11  # multiply-accumulates that a laptop does in about three seconds: such work starts unasked


def ask(key: tuple, label: str, total: int, work: Callable[[], Iterator], about: str, redraw: bool = False) -> None:
    """A button that starts a job, or the progress of the one that runs.

    total: how many results `work` yields. about: what it is good for, in words. redraw: the page, at each result.
    """
    job = shell.jobs().get(key)
    if job is not None and job.active:
        _watch(key, job, about, redraw)
        return
    outcome = job and {"failed": job.error, "cancelled": "Cancelled; what is done stays"}.get(job.state)
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button(label, icon=":material/play_arrow:", key=f"ask {key}"):  # the label may change under the pointer
            shell.jobs().start(key, total, work)
            st.rerun()
        st.caption(outcome or about)


def _watch(key: tuple, job: Job, about: str, redraw: bool) -> None:
    drawn = len(job.results)

    @st.fragment(run_every=0.5)
    def watch() -> None:
        done = len(job.results)
        if not job.active or (redraw and done > drawn):
            st.rerun()
        bar, button = st.columns([6, 1], vertical_alignment="center")
        state = "waiting for another study" if job.state == "waiting" else f"{done} of {job.total} done"
        bar.progress(done / job.total, f"{about}; {state}")
        if button.button("Cancel", icon=":material/stop:", key=f"cancel {key}", help="After the step at hand."):
            job.cancel()

    watch()


def results(key: tuple, macs: float, label: str, total: int, work: Callable[[], Iterator], about: str) -> list | None:
    """What `work` yields: computed at once where its multiply-accumulates are few, else None until asked for and done."""
    if macs < CHEAP:
        return _computed(key, work)
    job = shell.jobs().get(key)
    if job is not None and job.state == "done":
        return job.results
    ask(key, label, total, work, about)
    return None


@st.cache_resource(max_entries=128, show_spinner="Looking at the images")
def _computed(key: tuple, _work: Callable[[], Iterator]) -> list:
    return list(_work())
