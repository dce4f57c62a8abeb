"""Importance criteria: one function each, which scores a group's channels; those with the largest scores are kept.

A criterion takes (model, group, data, generator) and returns scores (n,). It gets the network in its current state, BN folded
or not, and reads weights through `channel_vectors`, which folds on the fly.
"""

import torch
from torch import Tensor, nn

from intrafusion._registry import CRITERIA, MERGES, RECOVERIES
from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.models.fx.sharing import check_finite, with_plain_weights
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
    """Score the importance of each channel of a group, with BatchNorm folded.

    Parameters
    ----------
    model : nn.Module
        The network that the group was found in.
    group : Group
        One of `find_groups` that can be pruned.
    criterion : str
        A name from `registry("criterion")`.
    data : ImageData, optional
        Images, for criteria that need images or labels.
    seed : int
        Seed for the choice of images and for random criteria.
    calibration : int, optional
        Maximum number of images to use, the same ones for the same seed; None for all.

    Returns
    -------
    Tensor
        float64 (n,) on the CPU; channels with the largest scores are kept.

    Raises
    ------
    IntrafusionError
        For an unknown criterion, a group that cannot be pruned, missing data, or weights or scores that are NaN or infinite.

    Examples
    --------
    >>> import intrafusion as itf
    >>> model = itf.load_model("digits-mlp")
    >>> group = itf.find_groups(model, model.card.example())[0]
    >>> tuple(itf.score(model, group, "l1").shape)
    (128,)
    """
    entry = CRITERIA[criterion]
    group.check_prunable()
    if entry.needs != "nothing" and data is None:
        raise IntrafusionError(f"criterion {criterion} needs {entry.needs}; pass data=")
    model = with_plain_weights(model)
    check_finite((layer.name, model.get_submodule(layer.name)) for layer in group.layers)
    seen = None if data is None else data.subset(calibration, seed)
    with torch.no_grad():
        scores = entry(model, group, seen, torch.Generator().manual_seed(seed)).detach().cpu().double()
    if not bool(torch.isfinite(scores).all()):
        check_finite(model.named_modules())  # names the layer to blame
        raise IntrafusionError(f"criterion {criterion} gives NaN or infinite scores for {group.name}; choose another criterion")
    return scores


def needs_images(spec: PruneSpec) -> bool:
    """Return whether scoring, comparing, merging or recovery under `spec` needs calibration images."""
    looking = CRITERIA[spec.criterion], MERGES[spec.merge], RECOVERIES[spec.recovery]
    return spec.cost == "activations" or any(entry.needs != "nothing" for entry in looking)
