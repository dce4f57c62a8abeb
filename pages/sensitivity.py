"""Which groups bear pruning, and by how much: a study of all groups, each pruned alone."""

import streamlit as st

from intrafusion import IntrafusionError, PruneSpec, registry
from intrafusion.figures.curves import curves
from intrafusion.figures.sensitivity import fragility_bars
from intrafusion.importance import needs_images
from intrafusion.quote import study_snippet, sweep_line
from intrafusion.sensitivity import alone, fragility, table
from intrafusion.study import Study
from pages.common import knobs, parts, sensitivity_parts, shell, studying
from pages.common.navigation import enter_app

_CHEAP = 1e11  # multiply-accumulates that a laptop does in a few seconds: such studies run unasked

enter_app()
here: shell.Here = st.session_state.here
st.markdown(
    "Each group is pruned **alone**, at several sparsities, and the whole network is measured. Fragile groups show at once; "
    "from the table come sparsities for all groups together."
)
columns = st.columns([2, 2, 2.4, 1.4])
merges = columns[0].multiselect(
    "Merges", list(registry("merge")), default=["drop", "fusion"], key="study_merges", bind=shell.BIND
)
with columns[1]:
    criterion = parts.criterion_control()
percents = columns[2].multiselect(
    "Sparsities, %", list(range(5, 100, 5)), default=[10, 30, 50, 70], key="study_sparsities", bind=shell.BIND
)
limit_name = columns[3].selectbox(
    "Images", ["500", "2000", "10000", "all"], index=1, key="study_limit", bind=shell.BIND,
    help="Every point is first looked at on about 100 of them, then on all.",
)  # fmt: skip
if not (merges and percents):
    st.info("Choose at least one merge and one sparsity.")
    st.stop()
with st.expander("How it runs", icon=":material/speed:"):
    way = sensitivity_parts.way_to_run(here)
with st.expander("Transport knobs", icon=":material/tune:"):
    chosen = knobs.transport_knobs()

limit, sparsities = (
    None if limit_name == "all" else int(limit_name),
    tuple(percent / 100 for percent in sorted(percents)),
)
base: PruneSpec = here.spec.but(
    groups="all", criterion=criterion, limit=limit, precision=way.precision, sparsity=0.0, **chosen
)
names = tuple(group.name for group in here.bench.groups if group.reason is None)
study = Study(way.name, base, {"groups": ("each",), "sparsity": sparsities, "merge": tuple(merges)}, way.decide)
specs = study.specs(here.bench.groups)
bench = shell.measuring(here, limit)
if bench is None or (needs_images(base) and not shell.can_see(here, base)):
    st.stop()

store = studying.store()
key = ("study", here.key(), study.base, tuple(specs), study.decide)
job = shell.jobs().get(key)
known = studying.points(store, specs, bench, job)
count = len(bench.images()) if limit is None else min(limit, len(bench.images()))
complete = len(known) == len(specs) and all(result.complete for result in known.values())
cheap = bench.size.macs * count * len(specs) < _CHEAP and not needs_images(base) and way.run is None
buttons = st.container(horizontal=True)
asked = buttons.button(
    "Run the study", type="primary", icon=":material/play_arrow:", disabled=complete or bool(job and job.active)
)
if job is not None and job.active and buttons.button("Cancel", icon=":material/stop:"):
    job.cancel()
if asked or (job is None and cheap and not complete):
    sensitivity_parts.start(key, study, specs, bench, store, way)
    st.rerun()


@st.fragment(run_every=1 if job is not None and job.active else None)
def live() -> None:
    """The heatmaps with the points so far; polls while the study runs, then asks for one last full run."""
    watching = job is not None and job.active
    found = studying.points(store, specs, bench, job) if watching else known
    studying.progress(found, specs, job, count)
    sensitivity_parts.heatmaps(list(found.values()), merges, names, sparsities, here.group.name)
    if st.session_state.get("watching_study") and not watching:
        st.session_state.watching_study = False
        st.rerun()
    st.session_state.watching_study = watching


live()
results = list(known.values())
if not results:
    if job is None:
        st.caption("Nothing is computed before you ask. Press *Run the study*.")
    st.stop()
matrices = sensitivity_parts.matrices(results, merges, names, sparsities)

st.subheader(f"Group {here.group.name}")
st.caption("Click a cell above, or choose a group in the sidebar.")
own = [result for result in results if result.spec.groups == (here.group.name,)]
if own:
    parts.chart(curves(own, sparsities, (own[0].dense_accuracy, own[0].dense_interval), shell.is_dark()), "group-curve")
else:
    st.info("This group is not measured yet.")

st.subheader("Fragile groups")
ranked = {merge: fragility(matrix) for merge, matrix in matrices.items() if matrix.cells}
parts.chart(fragility_bars(ranked, shell.is_dark()), "fragility")

st.subheader("A smaller network")
try:
    sensitivity_parts.suggestion(here, bench, base, matrices, store)
except IntrafusionError as error:
    st.warning(str(error), icon=":material/warning:")

st.subheader("Against another study")
sensitivity_parts.comparison(study, matrices, store)

rows = table(alone(results))
with st.expander("The numbers", icon=":material/table:"):
    st.dataframe(rows, hide_index=True)
sensitivity_parts.files(study, rows)
keys = ("study_merges", "criterion", "study_sparsities", "study_limit", *sensitivity_parts.KEYS, *knobs.KEYS)
parts.take_away("sensitivity", rows, sweep_line(study), study_snippet(study), keys)
