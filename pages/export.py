"""The smaller network to take away: made, timed, written in several formats, each verified, with a report."""

import pandas as pd
import streamlit as st

from intrafusion import IntrafusionError, PruneSpec
from intrafusion.export import FORMATS, Report, comparing, making
from intrafusion.quote import prune_line, prune_snippet
from pages.common import export_parts, knobs, parts, recovery_parts, shell, telling, working
from pages.common.navigation import Enough, enter_app

enter_app()
here: shell.Here = st.session_state.here
st.markdown(
    "The smaller network itself: **made** as you say, **timed** against the one it came from on this machine, and "
    "**written** in formats that others read. Every file is opened again and must answer as the network does."
)
try:
    spec: PruneSpec = export_parts.controls(here)
except IntrafusionError as error:
    telling.warning(error)
    raise Enough from error
if recovery_parts.trains(spec):
    with st.expander("Training", icon=":material/tune:"):
        spec = spec.but(**recovery_parts.training_controls())
with st.expander("Transport knobs", icon=":material/tune:"):
    spec = spec.but(**knobs.transport_knobs(merges=[spec.merge]))
measuring = shell.measuring(here, spec.limit)
bench = here.bench if measuring is None else measuring
if not shell.can_see(here, spec):
    raise Enough
if measuring is None:
    st.caption("Without images the network can be made, timed and written; its accuracy is not measured.")
key = ("export", here.key(), spec, measuring is None)
top = st.container()

st.subheader("Before and after")
network = working.Work("network", "Make the network", key, lambda: making(spec, bench))
found = network.section(st.container(horizontal=True, vertical_alignment="center"))
made = found and found.made
export_parts.show_network(made, spec.merge)

st.subheader("Is it faster?")
speed = working.Work("speed", "Measure the speed", key, lambda: comparing(made, bench))
row = st.container(horizontal=True, vertical_alignment="center")
compared = speed.section(row) if made else export_parts.later(row, speed.label)
export_parts.show_speed(compared)

st.subheader("Files")
formats = export_parts.formats_control()
files = working.Work("files", "Write and verify", (*key, formats), lambda: export_parts.shelved(made, formats))
row = st.container(horizontal=True, vertical_alignment="center")
written = files.section(row) if made and formats else export_parts.later(row, files.label)
complete = compared if compared is not None and compared.share == 1 else None
chosen = () if len(formats) == len(FORMATS) else formats
report = Report(made, written.files, complete, chosen) if made and written else None
export_parts.show_files(report, written)

if made and formats:
    with top:
        working.board((network, speed, files))
export_parts.keeping(made)
timed = complete is not None
parts.take_away(
    "export", pd.DataFrame(complete.rows() if complete else []), prune_line(spec, export_parts.name_of(spec), chosen, timed),
    prune_snippet(spec, export_parts.name_of(spec), chosen, timed), (*export_parts.KEYS, *knobs.KEYS),
)  # fmt: skip
