"""The dashboard's entry: navigation, and the sidebar that picks model, data, device and group."""

from pathlib import Path

import streamlit as st

from pages.common.greeting import greet

LOGO = str(Path(__file__).parent / "assets" / "logo.svg")
st.set_page_config(page_title="intrafusion", page_icon=LOGO, layout="wide")
st.logo(LOGO, size="large")
page = st.navigation(
    [
        st.Page(
            "pages/overview.py",
            title="Overview",
            icon=":material/home:",
            help="The model: its card, its channel groups, which layers are coupled and why.",
        ),
        st.Page(
            "pages/importance.py",
            title="Importance",
            icon=":material/bar_chart:",
            help="Scores of one group's channels, and which of them a sparsity would cut.",
        ),
        st.Page(
            "pages/transport.py",
            title="Transport",
            icon=":material/conversion_path:",
            help="The transport plan of one group: cost, coupling, applied matrix, and each channel's story.",
        ),
        st.Page(
            "pages/curves.py",
            title="Curves",
            icon=":material/show_chart:",
            help="Accuracy against sparsity, fused against dropped, computed live.",
        ),
    ]
)

st.title(page.title)
if page.title == "Overview":
    greet()

# torch takes seconds to import, once a server: navigation and greeting do not wait for it
from intrafusion import IntrafusionError  # noqa: E402
from pages.common import shell  # noqa: E402

try:
    st.session_state.here = shell.choose()
    page.run()
except IntrafusionError as error:
    st.error(str(error), icon=":material/error:")
