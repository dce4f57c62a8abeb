"""What goes wrong, on the page: one line, without what a stranger must not see of this machine."""

from typing import Any

import streamlit as st

from intrafusion.access import public


def error(said: object, icon: str = ":material/error:", **look: Any) -> None:
    st.error(public(str(said)), icon=icon, **look)


def warning(said: object, icon: str = ":material/warning:", **look: Any) -> None:
    st.warning(public(str(said)), icon=icon, **look)


def info(said: object, icon: str = ":material/info:", **look: Any) -> None:
    st.info(public(str(said)), icon=icon, **look)
