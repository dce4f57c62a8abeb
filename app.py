"""The dashboard's entry point: navigation, the sidebar (model, data, device, group), and the server that runs the pages."""

from pathlib import Path

import streamlit as st

from pages.shared import links, server
from pages.shared.navigation import navigate, run
from pages.shared.welcome import greet

LOGO = str(Path(__file__).parent / "assets" / "logo.svg")


def look() -> None:
    """Draw the dashboard once, for one reader: the body of a Streamlit script run."""
    server.answer_errors()
    st.set_page_config(page_title="intrafusion", page_icon=LOGO, layout="wide")
    st.logo(LOGO, size="large")
    page = navigate()
    st.title(page.title)
    notice = st.container()
    if page.title == "Overview":
        greet()

    # importing torch takes seconds, once per server: draw the navigation and the greeting before it
    from intrafusion import IntrafusionError
    from pages.shared import background_jobs, job_queue, messages, sidebar

    controls = st.sidebar.container()
    background_jobs.arrive()
    job_queue.show_queue()  # below the controls, but before the page runs, since the page may stop early
    try:
        with links.noticed(page.title, notice):
            st.session_state.here = sidebar.choose(controls)
            run(page)
        server.import_slow_libraries()
    except IntrafusionError as error:
        messages.error(error)


if __name__ == "__main__":  # Streamlit runs this file as a script on every rerun
    look()
else:  # and imports it once to get the ASGI app
    app = st.App(__file__, **server.options())
