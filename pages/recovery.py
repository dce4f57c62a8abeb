"""The Recovery page: recovery methods for a pruned network side by side, and the cost of each."""

import pandas as pd
import streamlit as st

from intrafusion import IntrafusionError
from intrafusion.reporting.figures.recovery import AXES, training_curves
from intrafusion.reporting.snippets import recovery_snippet, sweep_line
from intrafusion.studies.recovery_comparison import rows
from intrafusion.studies.study_file import Study
from pages.panels import recovery
from pages.shared import links, messages, open_model, parts, studying, transport_controls
from pages.shared.navigation import Enough, enter_app

enter_app()
here: open_model.Here = st.session_state.here
st.markdown(
    "How much of the accuracy lost by pruning does each method recover, and at what cost? All methods start from **the same "
    "pruned network**, use the same training images, and find their learning rate by the same short test."
)
base, seeds, methods, equal = recovery.controls(here)
with st.expander("Training", icon=":material/tune:"):
    base = base.but(**recovery.training_controls())
with st.expander("Transport options", icon=":material/conversion_path:"):
    base = base.but(**transport_controls.transport_knobs(merges=[base.merge]))
if not methods:
    st.info("Choose at least one recovery method.")
    raise Enough

specs = recovery.specs(base, methods, seeds, equal)
session = open_model.measuring(here, base.limit)
if session is None or not all(open_model.can_see(here, spec) for spec in recovery.lookers(specs)):
    raise Enough
store = studying.store()
state = studying.state(("recovery", here.key(), tuple(specs)), specs, session, store)
known, runs = state.known, recovery.known_runs(specs, session, state.job)
settled = state.settled and len(runs) == len([s for s in specs if recovery.trains(s)])
count = len(session.images()) if base.limit is None else min(base.limit, len(session.images()))
label = "Continue" if known and not settled else "Recover"
if studying.run_row(label, recovery.forecast(specs), settled, state, count):
    recovery.start_recovery(state.key, specs, session, store, f"recovery of {base.model}")
    st.rerun()

answer = rows(list(known.values()), runs)
by = st.segmented_control("Horizontal axis", list(AXES), default="steps", required=True, key="against", bind=links.BIND)
by = by or "steps"  # an empty parameter in a link clears even a required control
parts.chart(training_curves(runs, answer, by, parts.is_dark()), "recovery")
if not known and state.job is None:
    st.caption("Press *Recover* to start.")
elif not runs:
    st.caption("Methods that do not train have no curve; see the table.")

st.subheader("Results")
recovery.answer(answer, methods, here.session, known)
st.subheader("Similarity of images")
if state.running or not known:
    st.caption("The similarity matrices of teacher and student appear after all methods are done.")
else:
    try:
        recovery.similarities(session, base, [spec for spec in specs if spec in known])
    except IntrafusionError as error:
        messages.warning(error)

table = pd.DataFrame([row.to_row() for row in answer])
axes = {
    "recovery": tuple(methods),
    "seed": tuple(range(seeds)),
    "groups": ("all" if base.groups == "all" else here.group.name,),
}
study = Study("recovery", base.but(seed=0), axes | ({"budget": ("epochs", "compute")} if equal else {}))
parts.take_away(
    "recovery",
    table,
    sweep_line(study),
    recovery_snippet(base.but(recovery=methods[-1])),
    (*recovery.KEYS, *transport_controls.KEYS),
)
