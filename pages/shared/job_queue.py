"""The list of active jobs at the bottom of the sidebar: all readers' jobs with progress, and a button to cancel one's own."""

import streamlit as st

from intrafusion.runtime import escaping
from pages.shared import background_jobs, job_panel


def show_queue() -> None:
    """List the active jobs and watch them until none is left. Draw nothing if no job is active."""
    if background_jobs.jobs().queue():
        with st.sidebar:
            job_panel.watch(_list, lambda: bool(background_jobs.jobs().queue()))


def _list() -> None:
    # the queue rotates, but the rows keep their places
    active = sorted(background_jobs.jobs().queue(), key=lambda job: job.asked)
    st.markdown("**Running jobs**")
    for job in active:
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            title = job.title or "Untitled job"
            st.progress(job.share or 0.0, f"{escaping.markdown(title)}  \n:gray[{job_panel.words(job)}]", width="stretch")
            if background_jobs.is_mine(job):
                job_panel.cancel_button(job, f"stop {id(job)}", type="tertiary")
    if len(active) > 1:
        st.caption("Jobs share the processor in turns.")
