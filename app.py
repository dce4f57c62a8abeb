"""The dashboard's entry: navigation, and the sidebar that picks model, data, device and group; and the server around it."""

from pathlib import Path

import streamlit as st

from pages.shared import links, server
from pages.shared.navigation import navigate, run
from pages.shared.welcome import greet

LOGO = str(Path(__file__).parent / "assets" / "logo.svg")


def look() -> None:
    """One look at the dashboard: what Streamlit draws for one reader."""
    server.answer_errors()
    st.set_page_config(page_title="intrafusion", page_icon=LOGO, layout="wide")
    st.logo(LOGO, size="large")
    page = navigate()
    st.title(page.title)
    notice = st.container()
    if page.title == "Overview":
        greet()

    # torch takes seconds to import, once a server: navigation and greeting do not wait for it
    from intrafusion import IntrafusionError
    from pages.shared import app_state, job_queue, messages

    controls = st.sidebar.container()
    app_state.arrive()
    job_queue.show()  # below the controls, and before the page, which may stop early
    try:
        with links.noticed(page.title, notice):
            st.session_state.here = app_state.choose(controls)
            run(page)
        app_state.warm()
    except IntrafusionError as error:
        messages.error(error)


if __name__ == "__main__":  # Streamlit runs this file at every look
    look()
else:  # and imports it once, to serve it
    app = st.App(__file__, **server.options())
