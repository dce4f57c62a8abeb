"""The dashboard's entry: navigation, and the sidebar that picks model, data, device and group."""

from pathlib import Path

import streamlit as st

from pages.common import links, literal
from pages.common.greeting import greet
from pages.common.navigation import navigate, run

LOGO = str(Path(__file__).parent / "assets" / "logo.svg")
st.set_page_config(page_title="intrafusion", page_icon=LOGO, layout="wide")
st.logo(LOGO, size="large")
page = navigate()
st.title(page.title)
notice = st.container()
if page.title == "Overview":
    greet()

# torch takes seconds to import, once a server: navigation and greeting do not wait for it
from intrafusion import IntrafusionError  # noqa: E402
from pages.common import queue, shell  # noqa: E402

controls = st.sidebar.container()
queue.show()  # below the controls, and before the page, which may stop early
try:
    with links.noticed(page.title, notice):
        st.session_state.here = shell.choose(controls)
        run(page)
    shell.warm()
except IntrafusionError as error:
    st.error(literal.sentence(error), icon=":material/error:")
