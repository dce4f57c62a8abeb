"""The page Your own: upload and check a reader's network and images, and keep them on this machine for every page."""

import streamlit as st

from pages.panels import uploads
from pages.shared import open_model
from pages.shared.navigation import enter_app

enter_app()
here: open_model.Here = st.session_state.here
st.markdown(
    "Upload your own network and images. Every file is checked completely before it is saved, no code in it is run, and rejected "
    "files are deleted. Saved networks and images stay on the machine that runs this page, and every page can open them."
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
