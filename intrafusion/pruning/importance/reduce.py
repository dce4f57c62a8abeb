"""Reduction of each layer's values for its channels to one score per channel."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from intrafusion.pruning.groups.group import CONSUMER, Group, Layer
from intrafusion.runtime.devices import doubled


def spread(values: Tensor, present: Tensor) -> Tensor:
    """Return `values` (n,), on the CPU, with NaN for channels that the layer does not hold."""
    return torch.where(present, values, torch.nan)


def mean_over_layers(rows: Iterable[Tensor]) -> Tensor:
    """Return the mean of `rows` (n,) over the layers that hold each channel."""
    return torch.stack(list(rows)).nanmean(0)


def sum_of_weights(layer: Layer, values: Tensor) -> Tensor:
    """Sum `values`, in the shape of the layer's weight, over the weights of each channel: (n,), NaN for channels not held."""
    axis_first = values.transpose(0, 1) if layer.role == CONSUMER else values
    sums = axis_first.flatten(1).sum(1).cpu()
    return spread(sums[layer.positions.clamp(min=0)].sum(1), layer.present())


def mean_over_images(group: Group, batches: Iterable[list[tuple[Layer, Tensor]]], values: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean of `values` over the images, then over the consumers.

    batches: for each batch of images, the maps (B, n, h, w) that each consumer of the group reads. values: maps (B, c, h, w) of
    the c channels that the consumer holds -> (B, c).
    """
    totals: dict[Layer, Tensor] = {}
    images = 0
    for batch in batches:
        for layer, maps in batch:
            held = maps if layer.present().all() else maps[:, layer.present()]
            totals[layer] = totals.get(layer, 0) + doubled(values(held)).sum(0)
        images += len(maps)
    means = []
    for layer, total in totals.items():
        means.append(torch.full((group.size,), torch.nan, dtype=torch.float64))
        means[-1][layer.present()] = total.cpu() / images
    return mean_over_layers(means)
