"""Scores of one group's channels, and what a sparsity would cut."""

import pandas as pd
import streamlit as st

from intrafusion import PruneSpec
from intrafusion.figures.importance import importance_bars
from intrafusion.quote import plan_snippet
from pages.common import parts, shell
from pages.common.navigation import enter_app

enter_app()
here: shell.Here = st.session_state.here
st.markdown(
    "Which channels matter? A criterion scores each one; the least important go. The rest of the method is what happens to those."
)

columns = st.columns([2, 3, 2])
with columns[0]:
    criterion = parts.criterion_control()
with columns[1]:
    sparsity = parts.sparsity_control()
with columns[2]:
    order = st.segmented_control("Order", ["by rank", "by channel"], default="by rank", key="order", bind=shell.BIND)

spec: PruneSpec = here.spec.but(criterion=criterion, sparsity=sparsity)
scores, plan = parts.scored_plan(here, spec)
with columns[2]:
    channel = parts.channel_control(here.group.size, int(scores.argmin()))

figure = importance_bars(
    scores.tolist(), plan.kept.tolist(), criterion, order != "by channel", channel, dark=shell.is_dark()
)
parts.chart(figure, "importance", on_channel=True)
if len(here.group.block.unique()) > 1:
    st.caption(
        f"This group joins stages through zero-padded shortcuts, so its channels form {len(here.group.block.unique())} blocks; "
        "each block loses its own share."
    )
st.subheader(f"Channel {channel}")
parts.channel_story(here, plan, scores, channel)

kept = set(plan.kept.tolist())
ranks = scores.argsort(descending=True, stable=True).argsort() + 1
table = pd.DataFrame(
    {
        "channel": range(len(scores)),
        "score": scores.tolist(),
        "rank": ranks.tolist(),
        "kept": [i in kept for i in range(len(scores))],
    }
)
parts.take_away(
    "importance",
    table,
    parts.group_curve_line(spec),
    plan_snippet(spec, here.group.name),
    ("criterion", "sparsity", "order", "channel"),
)
