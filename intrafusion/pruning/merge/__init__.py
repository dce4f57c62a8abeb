"""Merges: what happens to the channels that go. One function each; some fit the layers behind afterwards."""

# isort: off
from intrafusion.pruning.merge.fusion import apply, drop, fusion  # (they register, in lists' order)
from intrafusion.pruning.merge import folding, interpolation
from intrafusion.pruning.merge.calibrated import calibrate
from intrafusion.pruning.merge.repair import repair, reset_norms
from intrafusion.pruning.merge.least_squares import ChannelMap, Fit, Merged

# isort: on
from intrafusion._registry import MERGES

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
