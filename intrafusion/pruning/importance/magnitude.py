"""Criteria that use only weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion._registry import CRITERIA
from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.pruning.groups.channel_vectors import channel_vectors
from intrafusion.pruning.groups.group import CONSUMER, PRODUCER, Group
from intrafusion.pruning.groups.norms import folded_tensors
from intrafusion.pruning.importance.reduce import mean_over_layers, spread


@CRITERIA.register("random", "random scores with a fixed seed, as a control for the other criteria")
def random(model: nn.Module, group: Group, data: ImageData | None, generator: torch.Generator) -> Tensor:
    return torch.rand(group.size, generator=generator, dtype=torch.float64)


@CRITERIA.register("l1", "sum of the absolute incoming and outgoing weights of the channel", "Li et al., ICLR 2017")
def l1(model: nn.Module, group: Group, data: ImageData | None, generator: torch.Generator) -> Tensor:
    return _magnitude(model, group, 1)


@CRITERIA.register("l2", "sum of the squared incoming and outgoing weights of the channel", "Li et al., ICLR 2017")
def l2(model: nn.Module, group: Group, data: ImageData | None, generator: torch.Generator) -> Tensor:
    return _magnitude(model, group, 2)


@CRITERIA.register("filter", "norm of the incoming weights and biases of the channel", "Li et al., ICLR 2017")
def filter_norm(model: nn.Module, group: Group, data: ImageData | None, generator: torch.Generator) -> Tensor:
    rows = []
    for layer in group.role(PRODUCER):
        weight, bias = folded_tensors(model, layer.name, layer.norm)
        values = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)
        rows.append(spread(values[layer.positions.clamp(min=0)].flatten(1).norm(dim=1), layer.present()))
    return mean_over_layers(rows)


@CRITERIA.register(
    "lamp",
    "squared weights of the channel as a share of those of all channels at least as large",
    "Lee et al., ICLR 2021",
    differs="for whole channels, with squared weights as in the paper (Intra-Fusion's code: not squared, with the same ranks)",
)
def lamp(model: nn.Module, group: Group, data: ImageData | None, generator: torch.Generator) -> Tensor:
    return layer_adaptive(_magnitude(model, group, 2))


@CRITERIA.register("fpgm", "sum of the distances to the weights of the other channels", "He et al., CVPR 2019")
def fpgm(model: nn.Module, group: Group, data: ImageData | None, generator: torch.Generator) -> Tensor:
    rows = []
    for layer, vectors in channel_vectors(model, group):
        held = layer.present()
        distances = torch.cdist(vectors, vectors) * held  # a channel that the layer does not hold is not a neighbour
        rows.append(spread(distances.sum(1), held))
    return mean_over_layers(rows)


@CRITERIA.register("bn_scale", "absolute BatchNorm scale before folding", "Liu et al., ICCV 2017")
def bn_scale(model: nn.Module, group: Group, data: ImageData | None, generator: torch.Generator) -> Tensor:
    rows = []
    for layer in group.layers:
        module: Any = model.get_submodule(layer.name)
        if isinstance(module, _BatchNorm) and module.affine:
            gamma = module.weight.data
        elif layer.role != CONSUMER and hasattr(module, "folded_gamma"):
            gamma = module.folded_gamma
        else:
            continue
        rows.append(spread(gamma.cpu().double().abs()[layer.positions.clamp(min=0)].mean(1), layer.present()))
    if not rows:
        raise IntrafusionError(f"bn_scale needs a BatchNorm, but group {group.name} has none; choose l1 or l2")
    return mean_over_layers(rows)


def _magnitude(model: nn.Module, group: Group, power: int) -> Tensor:
    """Return sum |w|^p of each channel, averaged over the layers that hold it and divided by the mean over channels."""
    rows = [
        spread((vectors.abs() if power == 1 else vectors.square()).sum(1), layer.present())
        for layer, vectors in channel_vectors(model, group)
    ]
    scores = mean_over_layers(rows)
    return scores / scores.mean() if scores.any() else scores


def layer_adaptive(norms: Tensor) -> Tensor:
    """Divide each norm (n,) by the sum of those at least as large; a unique largest norm gives 1."""
    at_least = (norms * (norms >= norms[:, None])).sum(1)
    return norms / at_least.where(at_least > 0, torch.ones_like(at_least))
