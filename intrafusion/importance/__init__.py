"""Importance criteria: one function each, scoring a group's channels; the largest stay.

A criterion takes (model, group, data, generator) and returns scores (n,). It sees the network as it is now, BN folded or
not, and reads weights through `channel_vectors`, which fold on the fly.
"""

import torch
from torch import Tensor, nn

from intrafusion.channels import Group
from intrafusion.data import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.registry import CRITERIA, MERGES, RECOVERIES
from intrafusion.spec import PruneSpec

# isort: off
from intrafusion.importance import weights, gradients, maps, attributions  # noqa: F401  (they register, in lists' order)
# isort: on


def score(
    model: nn.Module,
    group: Group,
    criterion: str = "l1",
    data: ImageData | None = None,
    seed: int = 0,
    calibration: int | None = 512,
) -> Tensor:
    """Importance of each channel of `group`: float64 (n,) on the CPU, seen with BN folded.

    data: for criteria that need images or labels; at most `calibration` of them are looked at, the same ones for the same
    seed. Raises IntrafusionError for an unknown criterion, a group that cannot be pruned, or missing data.
    """
    entry = CRITERIA[criterion]
    if group.reason:
        raise IntrafusionError(f"group {group.name} cannot be pruned: {group.reason}")
    if entry.needs != "nothing" and data is None:
        raise IntrafusionError(f"criterion {criterion} needs {entry.needs}: pass data=")
    seen = None if data is None else data.subset(calibration, seed)
    with torch.no_grad():
        scores = entry(model, group, seen, torch.Generator().manual_seed(seed))
    return scores.detach().double().cpu()


def needs_images(spec: PruneSpec) -> bool:
    """Whether scoring, comparing and merging channels, and recovering, as `spec` says looks at calibration images."""
    looking = CRITERIA[spec.criterion], MERGES[spec.merge], RECOVERIES[spec.recovery]
    return spec.cost == "activations" or any(entry.needs != "nothing" for entry in looking)
