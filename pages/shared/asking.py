"""Work that is too long to start unasked: a button, then a job's progress, then its results."""

from collections.abc import Callable, Iterator

import streamlit as st

from intrafusion.runtime.jobs import Job
from pages.shared import app_state, job_queue, messages

CHEAP = 1e11  # multiply-accumulates that a laptop does in about three seconds: such work starts unasked


def ask(key: tuple, label: str, total: int, work: Callable[[], Iterator], about: str, redraw: bool = False) -> None:
    """A button that starts a job, or the progress of the one that runs.

    total: how many results `work` yields. about: what it is good for, in words. redraw: the page, at each result.
    """
    job = app_state.jobs().get(key)
    if job is not None and job.active:
        _watch(key, job, about, redraw)
        return
    outcome = job and {"failed": messages.reason(job), "cancelled": "Cancelled; what is done stays"}.get(job.state)
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button(label, icon=":material/play_arrow:", key=f"ask {key}"):  # the label may change under the pointer
            app_state.start(key, total, work, f"{label}, {st.session_state.here.spec.model}")
            st.rerun()
        st.caption(outcome or about)


def _watch(key: tuple, job: Job, about: str, redraw: bool) -> None:
    drawn = len(job.results)

    @st.fragment(run_every=0.5)
    def watch() -> None:
        if not job.active or (redraw and len(job.results) > drawn):
            st.rerun()
        bar, button = st.columns([6, 1], vertical_alignment="center")
        bar.progress(job.share or 0.0, f"{about}; {job_queue.words(job)}")
        with button:
            job_queue.cancel_button(job, f"cancel {key}", icon=":material/stop:")

    watch()


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
