"""Reduction of each layer's values for its channels to one score per channel."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from intrafusion.pruning.groups.feature_maps import consumers
from intrafusion.pruning.groups.group import CONSUMER, Group, Layer


def spread(values: Tensor, present: Tensor) -> Tensor:
    """Return `values` (n,) with NaN for channels that the layer does not hold."""
    return torch.where(present.to(values.device), values, torch.nan)


def mean_over_layers(rows: Iterable[Tensor]) -> Tensor:
    """Return the mean of `rows` (n,) over the layers that hold each channel."""
    return torch.stack(list(rows)).nanmean(0)


def sum_of_weights(layer: Layer, values: Tensor) -> Tensor:
    """Sum `values`, in the shape of the layer's weight, over the weights of each channel: (n,), NaN for channels not held."""
    axis_first = values.transpose(0, 1) if layer.role == CONSUMER else values
    sums = axis_first.flatten(1).sum(1)
    return spread(sums[layer.positions.clamp(min=0)].sum(1), layer.present())


def mean_over_images(group: Group, batches: Iterable[list[tuple[Layer, Tensor]]], values: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean of `values` over the images, then over the consumers.

    batches: for each batch of images, the maps (B, n, h, w) that each consumer of the group reads. values: maps (B, c, h, w) of
    the c channels that the consumer holds -> (B, c).
    """
    totals = {layer: spread(torch.zeros(group.size, dtype=torch.float64), layer.present()) for layer in consumers(group)}
    images = 0
    for batch in batches:
        for layer, maps in batch:
            totals[layer][layer.present()] += values(maps[:, layer.present()]).double().sum(0).cpu()
        images += len(maps)
    return mean_over_layers(totals.values()) / images
