"""Parts of the Transport page: numbers of a plan, positions on the map, the learned map, and how two settings differ."""

import pandas as pd
import streamlit as st
from torch import Tensor

from intrafusion import IntrafusionError, PruneSpec, TransportPlan
from intrafusion.pruning.merge import ChannelMap
from intrafusion.pruning.transport.cost import Geometry, embed
from intrafusion.reporting.figures.plans import learned_beside
from intrafusion.spec import PLAN_FIELDS
from intrafusion.studies.session import Session, channel_maps
from pages.shared import job_panel, messages
from pages.shared.links import BIND
from pages.shared.open_model import Here, can_see
from pages.shared.parts import chart, is_dark

Fact = tuple[str, str, str]  # name, value, explanation


@st.cache_resource(max_entries=32, show_spinner="Drawing the map")
def _places(_geometry: Geometry, key: tuple, method: str) -> tuple[Tensor, str]:
    return embed(_geometry, method)


def places(here: Here, spec: PruneSpec, method: str) -> tuple[Tensor, str]:
    """Return the positions of the group's channels on a plane, and a text on what the plane shows.

    Computed once for each combination of the settings that compare channels.
    """
    compared = spec.part("cost", "distance", "p", "bias", "dataset", "data_path", "calibration", "seed")
    return _places(here.session.geometry(spec, here.group), (here.key(), here.group.name, compared), method)


def plan_facts(plan: TransportPlan) -> list[Fact]:
    """Return the key numbers of a plan."""
    entries = int((plan.coupling > 0).sum())
    n, k = plan.coupling.shape
    return [
        ("Transport cost", f"{plan.total_cost:.4g}", "Sum of distance times mass, which the plan minimises."),
        ("Mass moved", f"{plan.share_moved:.1%}", "Share of the transported mass that moves to another channel."),
        (
            "Entropy, nats",
            f"{plan.entropy:.2f}",
            f"0 if one entry holds all mass, {Tensor([n * k]).log().item():.2f} if all {n * k:,} are equal.",
        ),
        ("Non-zeros", f"{entries:,}", f"Of {n * k:,} entries. An optimal plan needs at most n + k − 1 = {n + k - 1:,}."),
    ]


def output_distance(here: Here, spec: PruneSpec) -> None:
    """Draw how far fusing this group moves the logits, compared with dropping. If expensive, measure only on request."""
    session, group, name = here.session, here.group, "Output distance"
    about = (
        f"Mean L2 distance of the logits from those of the dense network on {spec.calibration} calibration images, with only this "
        "group pruned."
    )
    work = (float(session.output_distance(spec.but(merge=merge), group).mean()) for merge in ("fusion", "drop"))
    macs = session.size.macs * (spec.calibration or 50_000) * 3
    try:
        found = job_panel.results(
            ("distance", here.key(), group.name, spec),
            macs,
            "Measure",
            2,
            lambda: work,
            "Distance of the logits from those of the dense network",
        )
    except IntrafusionError:
        st.metric(name, "no images", help=about + " The Curves page shows how to get them.", border=True, width=172)
        return
    if found:
        fused, dropped = found
        st.metric(
            name,
            f"{fused:.2f}",
            f"dropping: {dropped:.2f}",
            delta_color="off",
            delta_arrow="off",
            help=about,
            border=True,
            width=172,
        )


def learned_map(here: Here, spec: PruneSpec, plan: TransportPlan, scores: Tensor, channel: int, order: str) -> None:
    """Draw the map M that the calibrated merge learns, beside T."""
    if not can_see(here, spec.but(merge="calibrated")):
        return
    try:
        found = {one.consumer: one for one in _maps(here.session, spec.but(limit=None), here.device)}
    except IntrafusionError as error:
        messages.warning(error)
        return
    if not found:
        st.caption("Nothing is pruned, so there is no map to learn.")
        return
    name = next(iter(found))
    if len(found) > 1:
        name = st.selectbox("Next layer", list(found), key="reader", bind=BIND, help="Each of the next layers has its own map.")
    chart(learned_beside(plan, found[name], scores.tolist(), channel, order, is_dark()), "learned")
    st.caption("Both matrices have the same rows and columns. Negative weights of $M$ are amber.")


@st.cache_data(max_entries=16, show_spinner="Learning the map")
def _maps(_session: Session, spec: PruneSpec, device: str) -> list[ChannelMap]:
    return channel_maps(spec, _session)


def numbers_table(plans: dict[str, TransportPlan]) -> pd.DataFrame:
    """Return a table of plans side by side, one column per plan."""
    rows = {name: {fact: value for fact, value, _ in plan_facts(plan)} for name, plan in plans.items()}
    return pd.DataFrame(rows).rename_axis("").reset_index()


def differing_settings(first: PruneSpec, second: PruneSpec) -> tuple[str, str]:
    """Return a text for each of two settings that shows the fields in which they differ."""
    names = [name for name in PLAN_FIELDS if getattr(first, name) != getattr(second, name)]
    if not names:
        return "this setting", "the same setting"
    both = [", ".join(f"{name} {getattr(spec, name)}" for name in names) for spec in (first, second)]
    return both[0], both[1]
