"""The page Your own: upload and check a reader's network and images, and keep them on this machine for every page."""

import streamlit as st

from pages.panels import uploads
from pages.shared import open_model
from pages.shared.navigation import enter_app

enter_app()
here: open_model.Here = st.session_state.here
st.markdown(
    "Bring a network and images of your own. A file is checked from end to end before it is kept, nothing in it is run, and of "
    "one that is refused nothing stays. Kept things lie on the machine that runs this page, and every page opens them."
)
left, right = st.columns(2, gap="large")
with left:
    uploads.program()
    uploads.weights(here)
with right:
    uploads.images()
    uploads.from_code()
uploads.kept()
uploads.same_steps()
