"""What the server computes now, at the sidebar's bottom: everybody's jobs, how far they are, and a way to stop one's own."""

from typing import Any

import streamlit as st

from intrafusion.runtime import escaping
from intrafusion.runtime.jobs import Job
from intrafusion.runtime.progress import in_words
from pages.shared import app_state


def show() -> None:
    """List the active jobs, and watch them until there are none; draw nothing while nobody computes."""
    if app_state.jobs().queue():
        with st.sidebar:
            _watch()


@st.fragment(run_every=1)
def _watch() -> None:
    active = sorted(app_state.jobs().queue(), key=lambda job: job.asked)  # turns go round, rows stay where they are
    if not active:
        st.rerun()  # which draws what came, and ends the watching
    st.markdown("**Computing now**")
    for job in active:
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            title = job.title or "A computation"
            st.progress(job.share or 0.0, f"{escaping.markdown(title)}  \n:gray[{words(job)}]", width="stretch")
            if app_state.is_mine(job):
                cancel_button(job, f"stop {id(job)}", type="tertiary")
    if len(active) > 1:
        st.caption("They take turns.")


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
