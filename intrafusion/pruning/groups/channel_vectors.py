"""A group's channels as weight vectors, one block of coordinates per layer, with BN folded."""

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from intrafusion.pruning.groups.group import CONSUMER, Group, Layer
from intrafusion.pruning.groups.norms import folded_tensors


def channel_vectors(model: nn.Module, group: Group) -> list[tuple[Layer, Tensor]]:
    """Return each weight layer of the group with its vectors, float64 (n, d) on the CPU.

    Row j holds the flattened weights that write or read channel j; it is zero if the layer does not hold the channel. Norms
    and PReLU are left out, because they fold or only scale.
    """
    pairs = []
    for layer in group.layers:
        module = model.get_submodule(layer.name)
        if not isinstance(module, _ConvNd | nn.Linear):
            continue
        weight, _ = folded_tensors(model, layer.name, layer.norm)
        axis_first = weight.transpose(0, 1) if layer.role == CONSUMER else weight
        pairs.append((layer, _rows(axis_first, layer)))
    return pairs


def bias_vectors(model: nn.Module, group: Group) -> list[Tensor]:
    """Return float64 (n, m), on the CPU, for each layer that writes the channels and has a bias once BN is folded."""
    vectors = []
    for layer in group.layers:
        module = model.get_submodule(layer.name)
        if layer.role == CONSUMER or not isinstance(module, _ConvNd | nn.Linear):
            continue
        _, bias = folded_tensors(model, layer.name, layer.norm)
        if bias is not None:
            vectors.append(_rows(bias[:, None], layer))
    return vectors


def whole_vectors(model: nn.Module, group: Group, bias: bool = False) -> Tensor:
    """Return all of a channel's weights in one vector: float64 (n, d) on the CPU. `bias` appends the biases."""
    parts = [vectors for _, vectors in channel_vectors(model, group)]
    return torch.cat(parts + (bias_vectors(model, group) if bias else []), 1)


def _rows(axis_first: Tensor, layer: Layer) -> Tensor:
    present = layer.present()
    rows = axis_first[layer.positions.clamp(min=0)].flatten(1)
    return rows if present.all() else rows * present[:, None]
