"""Downloads in the background: a button, the progress, and any error."""

from collections.abc import Callable, Iterator

import streamlit as st

from intrafusion.runtime.access import is_public
from intrafusion.runtime.jobs import Job
from pages.shared import background_jobs, job_panel, messages


def download(label: str, key: tuple, work: Callable[[], Iterator[tuple[int, int]]]) -> None:
    """Draw a button that downloads in the background, the progress, and any error. A public server offers no button."""
    if is_public():
        st.caption("The operator of this server can download it from the command line.")
        return
    job = background_jobs.jobs().get(key)
    if st.button(label, icon=":material/download:", disabled=bool(job and job.active)):
        background_jobs.start_job(
            key, 1, work, label, part=lambda bytes: ("file", bytes[0] / bytes[1] if bytes[1] else 0.0), computes=False
        )
        st.rerun()
    if job is not None:
        _watch_download(job)


def _watch_download(job: Job) -> None:
    def draw() -> None:
        done, total = job.results[-1] if job.results else (0, 0)
        st.progress(done / total if total else 0.0, f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB")
        if background_jobs.may_cancel(job) and st.button("Cancel download"):
            job.cancel()

    if job.active:
        job_panel.watch_job(job, draw, every=0.5)
    elif job.error:
        messages.error(messages.failure_reason(job))
    elif job.state == "done":
        st.rerun()
