"""Error and notice boxes of one line each, without details of this machine that strangers must not see."""

import streamlit as st

from intrafusion.runtime import escaping
from intrafusion.runtime.access import public
from intrafusion.runtime.jobs import Job
from intrafusion.studies.sweeps import Failure


def error(said: object, icon: str = ":material/error:") -> None:
    st.error(escaping.sentence(public(str(said))), icon=icon)


def warning(said: object, icon: str = ":material/warning:") -> None:
    st.warning(escaping.sentence(public(str(said))), icon=icon)


def info(said: object, icon: str = ":material/info:") -> None:
    st.info(escaping.sentence(public(str(said))), icon=icon)


def failure_reason(failed: Job | Failure) -> str:
    """Return why a job or a point failed. For an unexpected error, return only its kind and the id of its log entry."""
    said, number = (failed.error, failed.error_id) if isinstance(failed, Job) else (failed.reason, failed.id)
    if number is None:
        return public(said or "")
    return f"{(said or '').partition(':')[0]} (id {number}). The details are in the server's log under this id."
