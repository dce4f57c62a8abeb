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
    "The weights of a channel are a point in a vector space. The transport plan moves the mass of all channels to the kept "
    "channels at the least total cost, and the resulting matrix multiplies every layer of the group."
)
st.page_link("pages/learn.py", label="New to this? See the method on six neurons first", icon=":material/school:")

columns = st.columns([2, 3, 2])
with columns[0]:
    criterion = parts.criterion_control()
with columns[1]:
    sparsity = parts.sparsity_control()
with st.expander("Transport options", icon=":material/tune:"):
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
with st.popover("Coupling or applied matrix?", icon=":material/help:"):
    st.latex(r"T = G^\top \mathrm{diag}(1/a)")
    st.markdown(
        "The **coupling** $G$ contains the *mass* moved from each channel to each target: its rows sum to the mass of each "
        "channel, its columns to the mass of each target. The **applied matrix** $T$ contains the *share* of each channel moved to "
        "each target and multiplies the weights. Normalised by source, each of its columns sums to one: all of a channel is moved."
    )
    if told.goes_to:
        goes, weight = told.goes_to[0]
        mass = float(plan.coupling[channel, (plan.kept == goes).nonzero()[0, 0]])
        st.markdown(
            f"Channel {channel} has mass {float(plan.source[channel]):.5f}. The plan moves {mass:.5f} of it to channel {goes}, which "
            f"receives {float(plan.target[(plan.kept == goes).nonzero()[0, 0]]):.5f} in total. Normalised by {spec.normalise}, this "
            f"gives a weight of {weight:.3f}."
        )

st.subheader(f"Channel {channel}")
parts.channel_story(here, plan, scores, channel)
if told.weights:
    parts.chart(weight_bars(told.weights, channel, told.kept, parts.is_dark()), "provenance")

st.subheader("More views")
looks = ["map", "sparsity player", "two settings", "learned map"]
look = st.segmented_control("More views", looks, default="map", key="look", bind=links.BIND, label_visibility="collapsed")
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
            help="pca: the plane of largest variance. tsne: preserves small distances, but not large ones.",
        )
        or "pca"
    )
    places, words = transport.places(here, spec, method)
    parts.chart(channel_map(plan, places.numpy(), words, channel, parts.is_dark()), "map", on_channel=True)
    st.caption(
        "Solid channels are kept, hollow ones removed. Arrows show where weight moves; dark arrows move more than half. Click a "
        "channel to select it."
    )
elif look == "sparsity player":
    step = 5 if here.group.size <= 128 else 10
    with st.spinner("Solving the plan for every sparsity"):
        plans = [
            (percent / 100, here.session.plan(spec.but(sparsity=percent / 100), here.group)) for percent in range(0, 91, step)
        ]
    parts.chart(sparsity_player(plans, scores.tolist(), sparsity, channel, parts.is_dark()), "player")
    st.caption(
        "Press ▶ to play. Weight on the diagonal stays in its channel; other weight is fused into another one. The selected channel is "
        "amber."
    )
elif look == "two settings":
    st.markdown("**A** uses the settings above. **B** uses the settings below, with the same sparsity and criterion.")
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
        "$T$ comes from the weights alone. The **calibrated** merge instead learns a map $M$ on unlabelled images: the combination "
        "of kept channels that best predicts each channel. The weights of the next layers are multiplied by it."
    )
    transport.learned_map(here, spec, plan, scores, channel, order)

with numbers:
    with st.container(horizontal=True):
        for name, value, about in transport.plan_facts(plan):
            st.metric(name, value, help=about, border=True, width=150)
        transport.output_distance(here, spec)
    st.caption(
        "On the margins, solid bars are mass that stays in its channel; tinted bars are mass that moves. "
        + (
            "The plan was solved for the removed channels only, which is exact because kept channels do not move."
            if plan.reduced
            else "The plan was solved for all channels."
        )
    )

parts.take_away("transport", pd.DataFrame(moves(plan)), plan_line(spec), plan_snippet(spec, here.group.name), keys)
