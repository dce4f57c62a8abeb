"""The transport plan of one group."""

import pandas as pd
import streamlit as st

from intrafusion import PruneSpec
from intrafusion.figures.transport import VIEWS, destinations, plan_heatmap
from intrafusion.quote import plan_snippet
from intrafusion.story import moves, story
from intrafusion.transport import ANCHORS, MARGINALS, NORMALISATIONS
from pages.common import parts, shell
from pages.common.navigation import enter_app

enter_app()
here: shell.Here = st.session_state.here
st.markdown(
    "Every channel is a point: its weights. The plan moves the mass of all channels onto the ones that stay, over the least "
    "total distance, and the same matrix then multiplies every layer of the group."
)

columns = st.columns([2, 3, 2])
with columns[0]:
    criterion = parts.criterion_control()
with columns[1]:
    sparsity = parts.sparsity_control()
with columns[2]:
    view = st.segmented_control(
        "Show", list(VIEWS), default="coupling", key="view", bind=shell.BIND, help="; ".join(f"{k}: {v}" for k, v in VIEWS.items())
    ) or "coupling"  # fmt: skip
with st.expander("Transport knobs", icon=":material/tune:"):
    knobs = st.columns(6)
    p = (
        knobs[0].segmented_control(
            "Cost: p-norm", [1, 2], default=1, key="p", bind=shell.BIND, help="Distance between unit channel vectors."
        )
        or 1
    )
    source = knobs[1].selectbox(
        "Source mass", MARGINALS, key="source", bind=shell.BIND, help="How much mass each channel has."
    )
    target = knobs[2].selectbox(
        "Target mass", MARGINALS, key="target", bind=shell.BIND, help="How much mass each target takes."
    )
    anchors = knobs[3].selectbox(
        "Targets",
        ANCHORS,
        key="anchors",
        bind=shell.BIND,
        help="The most important channels, or centroids of clusters.",
    )
    normalise = knobs[4].selectbox(
        "Normalise by",
        NORMALISATIONS,
        key="normalise",
        bind=shell.BIND,
        help="source: columns sum to one, as in the paper. target: rows do, so weights are averaged.",
    )
    bias = knobs[5].toggle("Bias in the cost", key="bias", bind=shell.BIND)
    st.latex(
        r"M_{ij} = \lVert x_i / \lVert x_i \rVert_2 - x_{t_j} / \lVert x_{t_j} \rVert_2 \rVert_p \qquad G = \arg\min_{G \mathbf 1 = a,\ G^\top \mathbf 1 = b} \langle G, M \rangle \qquad T = G^\top \mathrm{diag}(1/a)"
    )

spec: PruneSpec = here.spec.but(
    criterion=criterion,
    sparsity=sparsity,
    p=p,
    source=source,
    target=target,
    anchors=anchors,
    normalise=normalise,
    bias=bias,
)
scores, plan = parts.scored_plan(here, spec)
with columns[2]:
    channel = parts.channel_control(here.group.size, int(scores.argmin()))

parts.chart(plan_heatmap(plan, view, channel, shell.is_dark()), "plan", on_channel=True)
how = (
    "solved on the dropped channels alone (exact: kept channels stay where they are)"
    if plan.reduced
    else "the full problem was solved"
)
st.caption(
    f"{VIEWS[view].capitalize()}. Total cost {plan.total_cost:.4f}; {int((plan.coupling > 0).sum()):,} non-zeros; {how}."
)

st.subheader(f"Channel {channel}")
parts.channel_story(here, plan, scores, channel)
told = story(plan, scores, channel)
if not told.kept:
    parts.chart(destinations(told.goes_to, channel, shell.is_dark()), "destinations")

keys = ("criterion", "sparsity", "view", "p", "source", "target", "anchors", "normalise", "bias", "channel")
parts.take_away(
    "transport", pd.DataFrame(moves(plan)), parts.group_curve_line(spec), plan_snippet(spec, here.group.name), keys
)
