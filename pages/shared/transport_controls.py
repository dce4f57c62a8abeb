"""Widgets for the transport settings, drawn once per page or twice to compare two settings."""

from collections.abc import Sequence
from typing import Any

import streamlit as st

from intrafusion import registry
from intrafusion.options import CHOICES
from intrafusion.pruning.merge.folding import FOLD_NORMS
from pages.shared.links import BIND

_DISTANCES = {"L1": ("lp", 1), "L2": ("lp", 2), "cosine": ("cosine", 1)}
_STRENGTHS: dict[str, tuple[str, str, float, float, float]] = {  # solver -> field, help, smallest, largest, default
    "sinkhorn": (
        "reg",
        "Entropy regularisation, in units of the mean cost. Larger values spread every channel more widely.",
        0.001,
        1.0,
        0.02,
    ),
    "unbalanced": ("reg_m", "Penalty on violated marginals, in units of the mean cost. Larger is stricter.", 0.05, 50.0, 5.0),
    "partial": ("mass", "Share of the mass that is moved, cheapest first. The rest is discarded.", 0.05, 1.0, 0.9),
}
FORMULAS = r"""M_{ij} = \lVert x_i / \lVert x_i \rVert_2 - x_{t_j} / \lVert x_{t_j} \rVert_2 \rVert_p \qquad
G = \arg\min_{G \mathbf 1 = a,\ G^\top \mathbf 1 = b} \langle G, M \rangle \qquad T = G^\top \mathrm{diag}(1/a)"""
KEYS = (
    "cost", "distance", "bias", "anchors", "source", "target", "solver", "reg", "reg_m", "mass", "normalise", "fold_norms",
)  # fmt: skip


def transport_knobs(prefix: str = "", cost: str = "weights", merges: Sequence[str] = ()) -> dict[str, Any]:
    """Draw the knobs and return the spec's fields that they set.

    prefix: prefix of the widgets' keys. cost: the default cost. merges: the merges that the page has chosen; a knob that
    only these read is drawn too.
    """

    def key(name: str) -> dict[str, Any]:
        return {"key": prefix + name, "bind": BIND}

    left, middle, right = st.columns(3)
    with left:
        st.markdown("**Distance between channels**")
        chosen = (
            st.segmented_control(
                "Compare",
                CHOICES["cost"],
                default=cost,
                **key("cost"),
                help="weights: all incoming and outgoing weights of a channel. activations: the inputs of the next layers on calibration images.",
            )
            or cost
        )
        name = (
            st.segmented_control(
                "Distance",
                list(_DISTANCES),
                default="L1",
                **key("distance"),
                help="Distance between vectors of length one. The paper uses L1.",
            )
            or "L1"
        )
        bias = st.toggle(
            "Include biases", **key("bias"), disabled=chosen != "weights", help="Activations already include the biases."
        )
    with middle:
        st.markdown("**Mass**")
        source = st.selectbox("Source mass", CHOICES["source"], **key("source"), help="Mass of each channel.")
        target = st.selectbox("Target mass", CHOICES["source"], **key("target"), help="Mass that each target receives.")
        anchors = st.selectbox(
            "Targets", CHOICES["anchors"], **key("anchors"), help="The most important channels, or the centroids of clusters."
        )
    with right:
        st.markdown("**Solution**")
        solvers = registry("solver")
        solver = st.selectbox(
            "Solver", list(solvers), **key("solver"), help="; ".join(f"{e.name}: {e.summary}" for e in solvers.values())
        )
        strength = {}
        if solver in _STRENGTHS:
            field, about, low, high, default = _STRENGTHS[solver]
            strength[field] = st.number_input(field, low, high, default, step=low, format="%g", help=about, **key(field))
        normalise = st.selectbox(
            "Normalise by",
            CHOICES["normalise"],
            **key("normalise"),
            help="source: all of each channel is moved, as in the paper; target: weights are averaged instead of summed; none: the coupling itself.",
        )
    own = {}
    if any("fold_norms" in registry("merge")[merge].knobs for merge in merges):
        own["fold_norms"] = left.selectbox(
            "BatchNorm in folding",
            FOLD_NORMS,
            **key("fold_norms"),
            help="none: k-means uses weights only. columns: it also uses BatchNorm's scale and inverse standard deviation.",
        )
    distance, p = _DISTANCES[name]
    return {
        "cost": chosen,
        "distance": distance,
        "p": p,
        "bias": bool(bias) and chosen == "weights",
        "source": source,
        "target": target,
        "anchors": anchors,
        "solver": solver,
        "normalise": normalise,
        **strength,
        **own,
    }
