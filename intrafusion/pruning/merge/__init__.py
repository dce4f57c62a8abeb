"""Merges: what happens to the removed channels. One function each; some also fit the layers behind afterwards."""

# isort: off
from intrafusion.pruning.merge.drop_and_fusion import apply, drop, fusion  # (they register, in lists' order)
from intrafusion.pruning.merge import folding as _folding, interpolation as _interpolation  # noqa: F401
from intrafusion.pruning.merge.calibrated import calibrate
from intrafusion.pruning.merge.channel_statistics import repair, reset_norms
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
    "fusion",
    "repair",
    "reset_norms",
]
