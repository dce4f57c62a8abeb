"""The Sensitivity page: how much pruning each group tolerates, from a study that prunes each group alone."""

import streamlit as st

from intrafusion import IntrafusionError, PruneSpec, registry
from intrafusion.pruning.importance import needs_images
from intrafusion.reporting.figures.curves import curves
from intrafusion.reporting.figures.fragility import fragility_bars
from intrafusion.reporting.snippets import study_snippet, sweep_line
from intrafusion.runtime import escaping
from intrafusion.studies.sensitivity import alone, fragility, table
from intrafusion.studies.study_file import Study
from pages.panels import allocation, sensitivity
from pages.shared import links, messages, open_model, parts, studying, transport_controls
from pages.shared.navigation import Enough, enter_app

_CHEAP = 1e11  # multiply-accumulates that a laptop does in a few seconds: cheaper studies run automatically

enter_app()
here: open_model.Here = st.session_state.here
st.markdown(
    "Each channel group is pruned **alone** at several sparsities, and the accuracy of the whole network is measured. The results "
    "show which groups are fragile and suggest a sparsity for each group."
)
row = st.container(horizontal=True)
merges = row.multiselect(
    "Merges", list(registry("merge")), default=["drop", "fusion"], key="study_merges", bind=links.BIND, width=250
)
criterion = row.selectbox(
    "Importance criterion",
    list(registry("criterion")),
    index=list(registry("criterion")).index("l1"),
    key="criterion",
    bind=links.BIND,
    width=200,
    help="Determines which channels are removed. The Importance page compares the criteria.",
)
percents = row.multiselect(
    "Sparsities, %",
    list(range(5, 100, 5)),
    default=[10, 30, 50, 70],
    key="study_sparsities",
    bind=links.BIND,
    width=320,
)
limit_name = row.selectbox(
    "Test images",
    ["500", "2000", "10000", "all"],
    index=1,
    key="study_limit",
    bind=links.BIND,
    width=110,
    help="Every point is measured first on about 100 of them, then on all.",
)
if not (merges and percents):
    st.info("Choose at least one merge and one sparsity.")
    raise Enough
how = st.expander("Run options", icon=":material/speed:")
with st.expander("Transport options", icon=":material/tune:"):
    chosen = transport_controls.transport_knobs(merges=merges)

limit = None if limit_name == "all" else int(limit_name)
sparsities = tuple(percent / 100 for percent in sorted(percents))
base: PruneSpec = here.spec.but(groups="all", criterion=criterion, limit=limit, sparsity=0.0, **chosen)
with how:
    way = sensitivity.way_to_run(here, base, merges)
base = base.but(precision=way.precision)
names = tuple(group.name for group in here.session.groups if group.reason is None)
study = Study(way.name, base, {"groups": ("each",), "sparsity": sparsities, "merge": tuple(merges)}, way.decide)
specs = study.specs(here.session.groups)
session = open_model.measuring(here, limit)
if session is None or not open_model.can_see(here, base):
    raise Enough
both = sensitivity.pair(merges)

store = studying.store()
state = studying.state(("study", here.key(), study.base, tuple(specs), study.decide), specs, session, store)
rows = studying.studies(store)
count = len(session.images()) if limit is None else min(limit, len(session.images()))
cheap = session.size.macs * count * len(specs) < _CHEAP and not needs_images(base) and not way.flags
same = study.name in rows and rows[study.name].text == study.to_toml()
replaces = way.named and study.name in rows and not same
label = "Replace and run" if replaces else state.label or "Run study"
about = (
    f"The store has a study “{escaping.markdown(study.name)}” with other settings. This study replaces it."
    if replaces
    else None
)
asked = studying.run_row(label, about, state.settled and not replaces, state, count)
unasked = state.job is None and cheap and not state.settled
if asked or (not replaces and (unasked or (state.settled and not same))):
    studying.save_study(store, study, specs, session)
if asked or unasked:
    studying.start_study(state.key, specs, session, store, f"sensitivity of {base.model}", way.run, way.decide, way.named)
    st.rerun()
results = list(state.known.values())
made, numbers = sensitivity.matrices(results, merges, names, sparsities), table(alone(results))
pictures = st.container()

st.subheader(f"Group {escaping.markdown(here.group.name)}")
detail = st.grid(2, min_column_width=400, gap="medium")
with detail.container():
    own = [result for result in results if result.spec.groups == (here.group.name,)]
    widest = max(own, key=lambda result: result.count, default=None)
    dense = widest and (widest.dense_accuracy, widest.dense_interval)
    parts.chart(curves(own, sparsities, dense, parts.is_dark()).update_layout(height=380), "group-curve")
with detail.container():
    st.caption("Click a cell above, or choose the sparsity here and the group in the sidebar.")
    place = here.group.name, sensitivity.cell_control(percents)
    sensitivity.cell_in_words(made, both, place)
with pictures:
    sensitivity.heatmaps(made, both, place)

if state.running:
    st.caption("Fragile groups, suggested sparsities and other studies appear when this study is done or cancelled.")
elif not results:
    st.caption("Press *Run study* to start.")
else:
    st.subheader("Fragile groups")
    ranked = {merge: fragility(matrix) for merge, matrix in made.items() if matrix.cells}
    sensitivity.clickable(fragility_bars(ranked, parts.is_dark()), "fragility")
    st.subheader("Suggested sparsities")
    try:
        allocation.suggestion(here, session, base, {merge: made[merge] for merge in ranked}, store)
    except IntrafusionError as error:
        messages.warning(error)
    st.subheader("Comparison with another study")
    sensitivity.comparison(study, made, place, store, rows)
    with st.expander("Results table", icon=":material/table:"):
        st.dataframe(numbers, hide_index=True)
keys = ("study_merges", "criterion", "study_sparsities", "study_limit", *sensitivity.KEYS, *allocation.KEYS)
parts.take_away(
    "sensitivity",
    numbers,
    sweep_line(study, **way.flags),
    study_snippet(study),
    (*keys, *transport_controls.KEYS),
    lambda: sensitivity.study_files(study, numbers),
)
