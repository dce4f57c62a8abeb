"""The Export page: make the smaller network, time it, write it in several formats, verify each file, and report."""

import pandas as pd
import streamlit as st

from intrafusion import IntrafusionError, PruneSpec
from intrafusion.reporting import FORMATS, Report, comparing, making
from intrafusion.reporting.snippets import prune_line, prune_snippet
from intrafusion.studies.relevant_fields import trains
from pages.panels import export, recovery
from pages.shared import job_panel, messages, open_model, parts, transport_controls
from pages.shared.navigation import Enough, enter_app

enter_app()
here: open_model.Here = st.session_state.here
st.markdown(
    "Prune a network, **time** it against the dense network on this machine, and **export** it in standard formats. Every file "
    "is read back, and its logits are compared with the network's."
)
try:
    spec: PruneSpec = export.controls(here)
except IntrafusionError as error:
    messages.warning(error)
    raise Enough from error
if trains(spec):
    with st.expander("Training", icon=":material/tune:"):
        spec = spec.but(**recovery.training_controls())
with st.expander("Transport options", icon=":material/tune:"):
    spec = spec.but(**transport_controls.transport_knobs(merges=[spec.merge]))
measuring = open_model.measuring(here, spec.limit)
session = here.session if measuring is None else measuring
if not open_model.can_see(here, spec):
    raise Enough
if measuring is None:
    st.caption("Without images, the network can be pruned, timed and exported, but its accuracy is not measured.")
key = ("export", here.key(), spec, measuring is None)
top = st.container()

st.subheader("Before and after")
network = job_panel.Work("network", "Prune network", key, lambda: making(spec, session))
found = network.section(st.container(horizontal=True, vertical_alignment="center"))
made = found and found.result
export.show_network(made, spec.merge)

st.subheader("Speed")
speed = job_panel.Work("speed", "Measure speed", key, lambda: comparing(made, session))
row = st.container(horizontal=True, vertical_alignment="center")
compared = speed.section(row) if made else export.later(row, speed.label)
export.show_speed(compared)

st.subheader("Files")
formats = export.formats_control()
files = job_panel.Work("files", "Write and verify", (*key, formats), lambda: export.shelved(made, formats))
row = st.container(horizontal=True, vertical_alignment="center")
written = files.section(row) if made and formats else export.later(row, files.label)
complete = compared if compared is not None and compared.share == 1 else None
chosen = () if len(formats) == len(FORMATS) else formats
report = Report(made, written.result.files, complete, chosen) if made and written else None
export.show_files(report, written)

if made and formats:
    with top:
        job_panel.board((network, speed, files))
export.keep_network_form(made)
timed = complete is not None
parts.take_away(
    "export",
    pd.DataFrame(complete.rows() if complete else []),
    prune_line(spec, export.name_of(spec), chosen, timed),
    prune_snippet(spec, export.name_of(spec), chosen, timed),
    (*export.KEYS, *transport_controls.KEYS),
)
