"""The Curves page: accuracy against sparsity, computed live."""

import pandas as pd
import streamlit as st

from intrafusion import PruneSpec, registry
from intrafusion.pruning.importance import needs_images
from intrafusion.reporting.figures.curves import curves
from intrafusion.reporting.snippets import curve_line, curve_snippet
from intrafusion.studies.sweeps import grid
from pages.shared import links, open_model, parts, studying, transport_controls
from pages.shared.navigation import Enough, enter_app

_CHEAP = 5e10  # multiply-accumulates that a laptop does in about two seconds: cheaper curves are drawn automatically

enter_app()
here: open_model.Here = st.session_state.here
st.markdown(
    "Accuracy after channels are removed, without fine-tuning. The fused and the dropped network keep the same channels and are "
    "measured on the same images."
)

columns = st.columns([2.6, 2, 1.6, 2.8])
with columns[0]:
    scope = (
        st.segmented_control("Prune", ["all groups", "this group"], default="all groups", key="scope", bind=links.BIND)
        or "all groups"
    )
    limit_name = st.selectbox(
        "Test images",
        ["500", "2000", "10000", "all"],
        index=1,
        key="limit",
        bind=links.BIND,
        help="More images give narrower 95 % bands.",
    )
merges = columns[1].multiselect("Merges", list(registry("merge")), default=["drop", "fusion"], key="merges", bind=links.BIND)
criteria = columns[2].multiselect("Criteria", list(registry("criterion")), default=["l1"], key="criteria", bind=links.BIND)
percents = columns[3].multiselect(
    "Sparsities, %", list(range(0, 100, 5)), default=list(range(10, 100, 10)), key="sparsities", bind=links.BIND
)
if not (merges and criteria and percents):
    st.info("Choose at least one merge, one criterion and one sparsity.")
    raise Enough

with st.expander("Transport options", icon=":material/tune:"):
    chosen = transport_controls.transport_knobs(merges=merges)

limit = None if limit_name == "all" else int(limit_name)
sparsities = [percent / 100 for percent in sorted(percents)]
base: PruneSpec = here.spec.but(limit=limit, groups="all" if scope == "all groups" else here.spec.groups, **chosen)
specs = grid(base, sparsity=sparsities, criterion=criteria, merge=merges)

session = open_model.measuring(here, limit)
looking = [spec for spec in specs if needs_images(spec)]
if session is None or (looking and not open_model.can_see(here, looking[0])):
    raise Enough
store = studying.store()
state = studying.state(("curve", here.key(), base, tuple(specs)), specs, session, store)

count = len(session.images()) if limit is None else min(limit, len(session.images()))
cheap = session.size.macs * count * len(specs) < _CHEAP and not looking  # the cost of criteria that use images varies widely
asked = studying.run_row(state.label or "Compute curves", None, state.settled, state, count)
if asked or (state.job is None and cheap and not state.settled):
    studying.start_study(state.key, specs, session, store, f"curve of {base.model}")
    st.rerun()

results = list(state.known.values())
widest = max(results, key=lambda result: result.count, default=None)
dense = widest and (widest.dense_accuracy, widest.dense_interval)
parts.chart(curves(results, sparsities, dense, parts.is_dark()), "curves")
if not results and state.job is None:
    st.caption("Press *Compute curves* to start.")
table = pd.DataFrame([result.to_row() for result in results])
if len(table):
    with st.expander("Results table", icon=":material/table:"):
        st.dataframe(
            table[
                [
                    "criterion",
                    "merge",
                    "sparsity",
                    "accuracy",
                    "low",
                    "high",
                    "count",
                    "channels",
                    "channels_before",
                    "params",
                    "macs",
                    "seconds",
                ]
            ],
            hide_index=True,
        )
swept = {"criterion": criteria, "sparsity": sparsities, "merge": merges}
parts.take_away(
    "curves",
    table,
    curve_line(base, **swept),
    curve_snippet(base, merges, sparsities, criteria),
    ("scope", "limit", "merges", "criteria", "sparsities", *transport_controls.KEYS),
)
