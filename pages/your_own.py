"""A reader's own network and images: uploaded, checked, kept on this machine, and opened on every page."""

import streamlit as st

from pages.common import own_parts, shell
from pages.common.navigation import enter_app

enter_app()
here: shell.Here = st.session_state.here
st.markdown(
    "Bring a network and images of your own. A file is checked from end to end before it is kept, nothing in it is run, and of "
    "one that is refused nothing stays. Kept things lie on the machine that runs this page, and every page opens them."
)
left, right = st.columns(2, gap="large")
with left:
    own_parts.program()
    own_parts.weights(here)
with right:
    own_parts.images()
    own_parts.from_code()
own_parts.kept()
own_parts.take_away()
