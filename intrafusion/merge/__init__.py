"""Merges: what happens to the channels that go. One function each; some fit the layers behind afterwards."""

# isort: off
from intrafusion.merge.base import apply, drop, fusion  # (they register, in lists' order)
from intrafusion.merge import folding, interpolation
from intrafusion.merge.calibrated import calibrate
from intrafusion.merge.repair import repair, reset_norms
from intrafusion.merge.fitting import ChannelMap, Fit, Merged

# isort: on
from intrafusion.registry import MERGES

__all__ = [
    "MERGES",
    "ChannelMap",
    "Fit",
    "Merged",
    "apply",
    "calibrate",
    "drop",
    "folding",
    "fusion",
    "interpolation",
    "repair",
    "reset_norms",
]
