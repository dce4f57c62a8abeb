"""The Landscape page: where dense, dropped and fused networks lie in weight space, and how their outputs differ."""

import streamlit as st

from intrafusion import PruneSpec
from intrafusion.reporting.snippets import landscape_line, landscape_snippet
from intrafusion.studies.output_distance import outputs
from intrafusion.studies.weight_space import networks_between, sharpness, slices
from pages.panels import landscape
from pages.shared import job_panel, open_model, parts, transport_controls
from pages.shared.navigation import Enough, enter_app

enter_app()
here: open_model.Here = st.session_state.here
st.markdown(
    "A network is a point in weight space. This page compares the **dropped** and the **fused** network, whose removed channels "
    "are zero, with the **dense** one, and measures the loss landscape around and between them on real images."
)
spec: PruneSpec = landscape.controls(here)
with st.expander("Transport options", icon=":material/tune:"):
    spec = spec.but(**transport_controls.transport_knobs())
session = open_model.measuring(here, spec.limit)
if session is None or not open_model.can_see(here, spec):
    raise Enough
made = landscape.solutions(session, (*here.key(), spec))
key = ("landscape", here.key(), spec)
top = st.container()

st.subheader("The plane through three networks")
row = st.container(horizontal=True, vertical_alignment="bottom")
what, size = landscape.plane_controls(row)
plane = job_panel.Work("plane", "Compute plane", (*key, size), lambda: slices(made, size))
found_plane = plane.section(row)
landscape.show_plane(found_plane, what)

st.subheader("Change of the outputs")
changes = job_panel.Work("outputs", "Compare outputs", key, lambda: outputs(made))
found_outputs = changes.section(st.container(horizontal=True, vertical_alignment="center"))
landscape.show_outputs(found_outputs, made)

st.subheader("A path between two networks")
ends, how, kept = landscape.path_controls(here)
path = job_panel.Work(
    "path",
    "Train path",
    (*key, ends, how, tuple(kept.items())),
    lambda: networks_between(made, ends, how.epochs, how.rate, how.training),
)
found_path = path.section(st.container(horizontal=True, vertical_alignment="center"))
landscape.show_path(found_path, ends)

st.subheader("Sharp directions")
sharp = job_panel.Work("directions", "Find directions", key, lambda: sharpness(made))
found_sharp = sharp.section(st.container(horizontal=True, vertical_alignment="center"))
landscape.show_sharp(found_sharp)

with top:
    job_panel.board((plane, changes, path, sharp))
tables = {"path": found_path, "directions": found_sharp, "outputs": found_outputs}
parts.take_away(
    "landscape",
    landscape.slice_table(found_plane),
    landscape_line(spec, size),
    landscape_snippet(spec, size),
    (*landscape.KEYS, *transport_controls.KEYS),
    lambda: landscape.part_files(tables),
)
