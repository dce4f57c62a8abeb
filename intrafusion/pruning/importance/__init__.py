"""Importance criteria: one function each, scoring a group's channels; the largest stay.

A criterion takes (model, group, data, generator) and returns scores (n,). It sees the network as it is now, BN folded or
not, and reads weights through `channel_vectors`, which fold on the fly.
"""

import torch
from torch import Tensor, nn

from intrafusion._registry import CRITERIA, MERGES, RECOVERIES
from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.models.fx.sharing import check_finite, plain
from intrafusion.pruning.groups.group import Group
from intrafusion.spec import PruneSpec

# isort: off
from intrafusion.pruning.importance import magnitude, gradient, feature_map, attribution  # noqa: F401  (they register, in lists' order)
# isort: on

__all__ = ["CRITERIA", "needs_images", "score"]


def score(
    model: nn.Module,
    group: Group,
    criterion: str = "l1",
    data: ImageData | None = None,
    seed: int = 0,
    calibration: int | None = 512,
) -> Tensor:
    """Score the importance of each channel of a group, seen with BatchNorm folded.

    Parameters
    ----------
    model : nn.Module
        The network that the group was found in.
    group : Group
        One of `find_groups` that can be pruned.
    criterion : str
        A name from `registry("criterion")`.
    data : ImageData, optional
        For criteria that need images or labels.
    seed : int
        Of the images that are looked at, and of random criteria.
    calibration : int, optional
        At most so many images are looked at, the same ones for the same seed; None for all.

    Returns
    -------
    Tensor
        float64 (n,) on the CPU; the largest stay.

    Raises
    ------
    IntrafusionError
        For an unknown criterion, a group that cannot be pruned, missing data, and weights or scores that are NaN or infinite.

    Examples
    --------
    >>> import intrafusion as itf
    >>> model = itf.load_model("digits-mlp")
    >>> group = itf.find_groups(model, model.card.example())[0]
    >>> tuple(itf.score(model, group, "l1").shape)
    (128,)
    """
    entry = CRITERIA[criterion]
    if group.reason:
        raise IntrafusionError(f"group {group.name} cannot be pruned: {group.reason}")
    if entry.needs != "nothing" and data is None:
        raise IntrafusionError(f"criterion {criterion} needs {entry.needs}: pass data=")
    model = plain(model)
    check_finite((layer.name, model.get_submodule(layer.name)) for layer in group.layers)
    seen = None if data is None else data.subset(calibration, seed)
    with torch.no_grad():
        scores = entry(model, group, seen, torch.Generator().manual_seed(seed)).detach().double().cpu()
    if not bool(torch.isfinite(scores).all()):
        check_finite(model.named_modules())  # the layer to blame
        raise IntrafusionError(f"criterion {criterion} gives NaN or infinite scores of {group.name}: choose another one")
    return scores


def needs_images(spec: PruneSpec) -> bool:
    """Whether scoring, comparing and merging channels, and recovering, as `spec` says looks at calibration images."""
    looking = CRITERIA[spec.criterion], MERGES[spec.merge], RECOVERIES[spec.recovery]
    return spec.cost == "activations" or any(entry.needs != "nothing" for entry in looking)
