"""The Transport page: the transport plan of one group."""

import pandas as pd
import streamlit as st

from intrafusion import IntrafusionError, PruneSpec
from intrafusion.pruning.transport.planning import shared_mass
from intrafusion.pruning.transport.provenance import moves, story
from intrafusion.reporting.figures.plans import channel_map, sparsity_player, two_plans
from intrafusion.reporting.figures.transport import ORDERS, VIEWS, plan_heatmap, weight_bars
from intrafusion.reporting.snippets import plan_line, plan_snippet
from pages.panels import transport
from pages.shared import links, messages, open_model, parts, transport_controls
from pages.shared.navigation import Enough, enter_app

enter_app()
here: open_model.Here = st.session_state.here
st.markdown(
    "Every channel is a point: its weights. The plan moves the mass of all channels onto the ones that stay, over the least "
    "total distance, and the same matrix then multiplies every layer of the group."
)
st.page_link("pages/learn.py", label="New to this? See it on six neurons first", icon=":material/school:")

columns = st.columns([2, 3, 2])
with columns[0]:
    criterion = parts.criterion_control()
with columns[1]:
    sparsity = parts.sparsity_control()
with st.expander("Transport knobs", icon=":material/tune:"):
    chosen = transport_controls.transport_knobs()
    st.latex(transport_controls.FORMULAS)
spec: PruneSpec = here.spec.but(criterion=criterion, sparsity=sparsity, **chosen)
if not open_model.can_see(here, spec):
    raise Enough
scores, plan = parts.scored_plan(here, spec)
with columns[2]:
    channel = parts.channel_control(here.group.size, int(scores.argmin()))

left, right = st.columns(2)
view = left.segmented_control("Show", list(VIEWS), default="coupling", key="view", bind=links.BIND) or "coupling"
order = right.segmented_control("Order", list(ORDERS), default="index", key="arrange", bind=links.BIND) or "index"
left.caption(f"{VIEWS[view].capitalize()}.")
right.caption(f"Channels {ORDERS[order]}.")
parts.chart(plan_heatmap(plan, scores.tolist(), view, channel, order, parts.is_dark()), "plan", on_channel=True)
numbers = st.container()

told = story(plan, scores, channel)
with st.popover("Coupling or matrix: what is the difference?", icon=":material/help:"):
    st.latex(r"T = G^\top \mathrm{diag}(1/a)")
    st.markdown(
        "The **coupling** $G$ says how much *mass* goes where: its rows sum to what each channel has, its columns to what each "
        "target takes. The **applied matrix** $T$ says what *share* of each channel goes where, and multiplies the weights: "
        "normalised by source, each of its columns sums to one, so every channel is handed over whole."
    )
    if told.goes_to:
        goes, weight = told.goes_to[0]
        mass = float(plan.coupling[channel, (plan.kept == goes).nonzero()[0, 0]])
        st.markdown(
            f"Channel {channel} has mass {float(plan.source[channel]):.5f}. It puts {mass:.5f} on channel {goes}, which takes "
            f"{float(plan.target[(plan.kept == goes).nonzero()[0, 0]]):.5f} in all. Normalised by {spec.normalise}, that is a weight of {weight:.3f}."
        )

st.subheader(f"Channel {channel}")
parts.channel_story(here, plan, scores, channel)
if told.weights:
    parts.chart(weight_bars(told.weights, channel, told.kept, parts.is_dark()), "provenance")

st.subheader("Another look")
looks = ["map", "sparsity player", "two settings", "learned map"]
look = st.segmented_control("Another look", looks, default="map", key="look", bind=links.BIND, label_visibility="collapsed")
look = look or "map"
others = (
    "plane",
    "reader",
    *(f"b_{key}" for key in transport_controls.KEYS),
)  # controls of the looks; each look draws only some
keys = ("criterion", "sparsity", *transport_controls.KEYS, "view", "arrange", "channel", "look", *others)

if look == "map":
    method = (
        st.segmented_control(
            "Plane",
            ["pca", "tsne"],
            default="pca",
            key="plane",
            bind=links.BIND,
            help="pca: the plane on which the channels differ most. tsne: near channels stay near, far ones may lie anywhere.",
        )
        or "pca"
    )
    places, words = transport.places(here, spec, method)
    parts.chart(channel_map(plan, places.numpy(), words, channel, parts.is_dark()), "map", on_channel=True)
    st.caption(
        "Solid channels stay, hollow ones go; an arrow points where weight moves, dark where it is more than half. Click a channel."
    )
elif look == "sparsity player":
    step = 5 if here.group.size <= 128 else 10
    with st.spinner("Solving the plan at every sparsity"):
        plans = [
            (percent / 100, here.session.plan(spec.but(sparsity=percent / 100), here.group)) for percent in range(0, 91, step)
        ]
    parts.chart(sparsity_player(plans, scores.tolist(), sparsity, channel, parts.is_dark()), "player")
    st.caption("Press ▶. The diagonal is what stays itself; what leaves it is fused. The chosen channel is amber.")
elif look == "two settings":
    st.markdown("**A** is the setting above. **B** differs in what you change here; sparsity and criterion stay.")
    other: PruneSpec = spec.but(**transport_controls.transport_knobs("b_", cost="activations"))
    if open_model.can_see(here, other):
        try:
            _, second = parts.scored_plan(here, other)
            names = transport.differing_settings(spec, other)
            parts.chart(two_plans(plan, second, names, shared_mass(plan, second), parts.is_dark()), "two")
            st.dataframe(transport.numbers_table({"A": plan, "B": second}), hide_index=True)
        except IntrafusionError as error:
            messages.warning(error)
elif look == "learned map":
    st.markdown(
        "$T$ comes from the weights alone. The **calibrated** merge learns its own map $M$ on unlabelled images instead: which "
        "mixture of the kept channels comes closest to what each channel carried. What reads them is multiplied by it."
    )
    transport.learned_map(here, spec, plan, scores, channel, order)

with numbers:
    with st.container(horizontal=True):
        for name, value, about in transport.plan_facts(plan):
            st.metric(name, value, help=about, border=True, width=150)
        transport.output_distance(here, spec)
    st.caption(
        "On the margins, solid is mass that stays in its own place, tinted is mass that moves. "
        + (
            "Solved on the dropped channels alone, which is exact: kept channels stay where they are."
            if plan.reduced
            else "The full problem was solved."
        )
    )

parts.take_away("transport", pd.DataFrame(moves(plan)), plan_line(spec), plan_snippet(spec, here.group.name), keys)
