"""The process's background jobs, and the readers who started them."""

import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import streamlit as st
from streamlit.runtime import exists, get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx

from intrafusion.runtime.access import GRACE, check_computations, is_public
from intrafusion.runtime.jobs import Job, Jobs

_admission = threading.Lock()


@st.cache_resource
def jobs() -> Jobs:
    """Return the process's jobs. They survive a page reload."""
    return Jobs()


def start_job(key: Hashable, total: int, work: Callable[[], Iterator], title: str, lasts: bool = False, **options: Any) -> Job:
    """Call `Jobs.start` and record which reader started the job, who may then cancel it anywhere. Rerun the page afterwards.

    lasts: whether the job keeps running after this session has left a public server, as a named study does. Raises
    IntrafusionError if a public server already has enough jobs, of this reader or of all readers.
    """
    who = reader_address()
    with _admission:
        active = [job for job in jobs().queue() if job.key != key and job.state != "stopping"]
        check_computations(sum(job.who == who for job in active), len(active))
        known = jobs().get(key)
        job = jobs().start(key, total, work, title, who=who, **options)
        if lasts:
            job.askers.clear()
        elif job is not known or job.askers:  # a lasting job has no askers
            job.askers.add(_session())
    return job


def reader_address() -> str:
    """Return the reader's address, as `pages.shared.client_address` determines it."""
    found = st.context.ip_address
    return found if isinstance(found, str) else ""  # no address for this machine, or without a browser


def is_mine(job: Job) -> bool:
    """Return whether this reader started the job, even before a reload."""
    return job.who == reader_address()


def may_cancel(job: Job) -> bool:
    """Return whether this reader may cancel the job. On a public server only the reader who started it may."""
    return not is_public() or is_mine(job)


def arrive() -> None:
    """Take over the reader's jobs from sessions that have ended, since a reload starts a new session."""
    if not is_public() or st.session_state.get("arrived"):
        return
    st.session_state.arrived = True
    for job in jobs().queue():
        if is_mine(job) and job.askers and not any(map(_is_here, job.askers)):
            job.askers.add(_session())


def tend() -> None:
    """Cancel the jobs of sessions that have ended. Call it every few seconds. It only acts on a public server."""
    if is_public():
        jobs().tend(_is_here, GRACE)


def _session() -> str:
    context = get_script_run_ctx()
    return context.session_id if context is not None else ""


def _is_here(session: str) -> bool:
    return exists() and get_instance().is_active_session(session)
