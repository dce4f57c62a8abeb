"""The Training lab page: methods that prune during or before training, run live, watched, compared, and kept."""

import pandas as pd
import streamlit as st

from intrafusion import IntrafusionError
from intrafusion._registry import TRAINERS
from intrafusion.reporting.figures.training import learning, norms_over_time, runs_side_by_side, zeros_over_time
from intrafusion.reporting.snippets import lab_line, lab_snippet
from intrafusion.training.methods.runs import check_architecture, known
from pages.panels import training_lab
from pages.shared import background_jobs, messages, open_model, parts
from pages.shared.navigation import Enough, enter_app

enter_app()
here: open_model.Here = st.session_state.here
st.markdown(
    "One-shot pruning removes channels from a trained network. These methods prune **during training**, or find a good "
    "subnetwork of an untrained network. Training starts from new random weights in the architecture of the sidebar's model."
)
try:
    check_architecture(here.spec.model)
except IntrafusionError as error:
    messages.info(error, icon=":material/science:")
    raise Enough from error
spec = training_lab.controls(here)
entry = TRAINERS[spec.method]
st.caption(f"**{spec.method}**: {entry.told}. {entry.paper}")
if entry.differs:
    st.caption(f"Differences from the source: {entry.differs}.")
key = ("lab", spec, here.device)
job = background_jobs.jobs().get(key)
running = job is not None and job.active
try:
    run = None if running else known(spec)
except IntrafusionError as error:
    open_model.offer_images(here, error)
    raise Enough from error
steps = training_lab.steps_so_far(run, job)
if training_lab.training_row(run, job, running, bool(steps)):
    training_lab.start_training(key, spec, here.device)
    st.rerun()

parts.chart(learning(steps, spec.method, parts.is_dark()), "learning")
left, right = st.columns(2)
with left:
    parts.chart(zeros_over_time(steps, spec.method, parts.is_dark()), "zeros")
with right:
    parts.chart(norms_over_time(steps, parts.is_dark()), "spread")
if not steps:
    st.caption("Press *Train* to start.")

st.subheader("Results")
if run is None:
    st.caption("Test accuracy, the size of the network and a form to save it appear here after training.")
else:
    training_lab.outcome(run)
    training_lab.keep_run_form(run)

st.subheader("Comparison of runs")
runs, names = training_lab.chosen(spec.model)
if runs:
    parts.chart(runs_side_by_side(runs, names, parts.is_dark()), "side_by_side")
    st.dataframe(training_lab.run_table(runs, names), hide_index=True)
else:
    st.caption("All runs of this architecture on this machine can be compared here.")

rows = [{"phase": s.phase, **vars(s.moment), "sampled": s.look.sampled, **s.look.zero} for s in steps]
parts.take_away("training_lab", pd.DataFrame(rows), lab_line(spec), lab_snippet(spec), training_lab.KEYS)
