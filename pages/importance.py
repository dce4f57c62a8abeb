"""The Importance page: scores of one group's channels by several criteria, their agreement, and one channel's responses."""

import streamlit as st

from intrafusion import PruneSpec, registry
from intrafusion.evaluation.attribution import first_reader, top_images
from intrafusion.pruning.agreement import compare_criteria
from intrafusion.reporting.figures.agreement import agreement_matrix
from intrafusion.reporting.figures.importance import criteria_side_by_side, importance_bars, label_width
from intrafusion.reporting.snippets import scores_line, scores_snippet
from intrafusion.runtime import escaping as text
from intrafusion.runtime.access import public
from pages.panels import importance, response
from pages.shared import links, open_model, parts
from pages.shared.navigation import enter_app

_MOST = 8  # most images shown

enter_app()
here: open_model.Here = st.session_state.here
st.markdown(
    "A criterion scores the importance of every channel, and the channels with the lowest scores are removed. Criteria measure "
    "different things and rarely keep the same channels."
)
st.page_link("pages/learn.py", label="New to this? See the method on six neurons first", icon=":material/school:")

columns = st.columns([2, 3, 2])
with columns[0]:
    criterion = parts.criterion_control()
    importance.criterion_about(criterion)
with columns[1]:
    sparsity = parts.sparsity_control()
    compared = st.multiselect(
        "Compare with",
        list(registry("criterion")),
        default=importance.default_criteria(here.spec.dataset),
        key="compare",
        bind=links.BIND,
        wrap=True,
        help="Any number of criteria, compared on this group.",
    )
with columns[2]:
    order = st.segmented_control("Order", ["by rank", "by channel"], default="by rank", key="order", bind=links.BIND, wrap=True)
spec: PruneSpec = here.spec.but(criterion=criterion, sparsity=sparsity)
criteria = list(dict.fromkeys([criterion, *compared]))
looking = spec.but(cost="activations")  # a spec that needs the calibration images, whatever the criterion
sees = None
if any(registry("criterion")[name].needs != "nothing" for name in criteria):
    sees = open_model.can_see(here, looking)
scores, failed, waiting = importance.scored(here, spec, criteria, bool(sees))
if criterion not in scores:
    scores = scores or importance.scored(here, spec, ["l1"], False)[0]
    main, why = next(iter(scores)), (failed | waiting)[criterion]
    said = f"There are no {criterion} scores: {public(why)}. The figures show **{main}** instead."
    st.info(said, icon=":material/info:")
    spec = spec.but(criterion=main)
comparison = compare_criteria({name: found.values for name, found in scores.items()}, here.group, sparsity)
with columns[2]:
    channel = parts.channel_control(here.group.size, int(comparison.scores[0].argmin()))

by_rank, left, stays = order != "by channel", label_width(criteria), comparison.kept[0].nonzero()[0]
bars = importance_bars(comparison.scores[0], stays, spec.criterion, by_rank, channel, parts.is_dark(), left)
parts.chart(bars, "importance", on_channel=True)
if len(here.group.block.unique()) > 1:
    st.caption(
        f"This group joins stages through zero-padded shortcuts, so its channels form {len(here.group.block.unique())} blocks; "
        "the sparsity applies to each block separately."
    )

st.subheader("Criteria side by side")
cells = st.segmented_control(
    "Show",
    ["ranks", "scores"],
    default="ranks",
    key="cells",
    bind=links.BIND,
    help="ranks: the position of each channel in the order of the scores. scores: relative to the criterion's largest score.",
)
parts.chart(
    criteria_side_by_side(
        comparison,
        waiting | dict.fromkeys(failed, "cannot score this group"),
        cells or "ranks",
        by_rank,
        channel,
        parts.is_dark(),
    ),
    "criteria",
    on_channel=True,
)
st.caption(
    "Each row is a criterion and each column a channel, aligned with the bars above. A stronger colour means more important; "
    "hollow grey channels are removed. Click a channel for its details."
)
for name in [name for name in failed if name != criterion]:
    st.caption(f"**{name}** cannot score this group: {text.sentence(failed[name])}.")

st.subheader("Agreement between criteria")
if len(comparison.names) > 1:
    few = len(criteria) <= 8
    with st.container(horizontal=True, gap="medium"):
        with st.container(width=580 if few else 900):
            parts.chart(agreement_matrix(comparison, 540 if few else 780, parts.is_dark()), "agreement")
        with st.container(width=300 if few else "stretch"):
            importance.how_to_read(comparison)
    st.dataframe(importance.agreement_table(comparison, scores), hide_index=True)
    with st.expander("Formulas", icon=":material/function:"):
        importance.formulas(comparison.names)
else:
    st.caption("Agreement needs two criteria with scores: choose more under *Compare with*.")

st.subheader(f"Channel {channel}")
importance.rank_row(comparison, channel)
values, plan = parts.scored_plan(here, spec)
parts.channel_story(here, plan, values, channel)

st.subheader("Images that activate it")
if sees is None:
    sees = open_model.can_see(here, looking)
elif not sees:
    st.caption("The calibration images are missing; see the note above.")
data = here.session.calibration(looking) if sees else None
activations = response.channel_activations(here, data) if data is not None else None
if data is not None and activations is not None:
    active = activations[:, channel]
    st.markdown(response.describe_activation(activations, channel, data, first_reader(here.group, channel).name))
    if active.any():
        number, method = response.image_control(min(_MOST, len(data)))
        top = top_images(active, _MOST)
        response.show_images(data, top, active, number)
        response.show_attribution(here, data, channel, top[number - 1], method)

parts.take_away(
    "importance",
    importance.channel_table(comparison),
    scores_line(spec, comparison.names),
    scores_snippet(spec, here.group.name, comparison.names),
    ("criterion", "compare", "sparsity", "order", "cells", "channel", "image", "attribution"),
)
