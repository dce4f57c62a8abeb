"""Smooth compression: penalties that make a layer's weights low in rank or smooth along its channels, and truncation.

Runkel et al., arXiv 2505.24469; reconstructed from the abstract. This project's own choices: penalties are relative to the size
of the weights and averaged over layers, so that one strength suits all networks; and the rule for the rank.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError, check_choice
from intrafusion.runtime.devices import doubled

PENALTIES = ("nuclear", "first", "second")


def penalty(model: nn.Module, kind: str = "nuclear") -> Tensor:
    """Compute the mean over convolutions and linear layers of a penalty on W (out x in h w): a differentiable scalar.

    "nuclear": the nuclear norm over the Frobenius norm, from 1 for rank one. "first", "second": mean squared differences of
    that order along both axes, over the mean square. Raises IntrafusionError for another kind, or a model without such layers.
    """
    check_choice("penalty", kind, PENALTIES)
    found = [_penalty(_matrix(layer), kind) for layer in _layers(model).values()]
    if not found:
        raise IntrafusionError("the model has no convolution or linear layer to penalise")
    return torch.stack(found).mean()


def _penalty(W: Tensor, kind: str) -> Tensor:
    if kind == "nuclear":
        return torch.linalg.matrix_norm(W, "nuc") / W.norm().clamp(min=1e-12)
    order = 1 if kind == "first" else 2
    parts = [W.diff(order, dim=axis).square().mean() for axis in (0, 1) if W.shape[axis] > order]
    return sum(parts, W.new_zeros(())) / W.square().mean().clamp(min=1e-12)


def _matrix(layer: Any) -> Tensor:
    return layer.weight.flatten(1)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that are a single matrix: linear layers, and convolutions without groups."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) in (nn.Conv2d, nn.Linear) and getattr(layer, "groups", 1) == 1
    }


def pays_below(layer: nn.Module) -> float:
    """Return the rank below which two layers have fewer weights than one: out * m / (out + m), with m = in h w."""
    out, m = _matrix(layer).shape
    return out * m / (out + m)


def truncate(model: nn.Module, share: float | None = None, energy: float | None = None) -> nn.Module:
    """Return a copy of `model` in which each layer is replaced by its truncated SVD, two layers, if that has fewer weights.

    share: the rank, as a share in (0, 1] of the rank from `pays_below`. energy: the smallest rank that keeps this share, in
    (0, 1], of the squared singular values. Raises IntrafusionError unless exactly one of them is given, and in its range.
    """
    if (share is None) == (energy is None):
        raise IntrafusionError("pass either share or energy")
    value = share if share is not None else energy
    if value is None or not 0 < value <= 1:
        raise IntrafusionError(f"share and energy must be numbers above 0 and at most 1, not {value!r}")
    small = copy.deepcopy(model)
    for name, layer in _layers(model).items():
        U, S, V = torch.linalg.svd(doubled(_matrix(layer).detach()), full_matrices=False)
        if share is not None:
            rank = max(1, int(share * pays_below(layer) + 1e-9))
        else:
            kept = S.square().cumsum(0) / S.square().sum().clamp(min=1e-300)
            rank = min(int((kept < value - 1e-12).sum()) + 1, len(S))
        if rank < pays_below(layer):
            small.set_submodule(name, _factored(layer, U[:, :rank], S[:rank], V[:rank]))
    return small


def _factored(layer: Any, U: Tensor, S: Tensor, V: Tensor) -> nn.Sequential:
    rank, bias = len(S), layer.bias is not None
    first: Any
    last: Any
    if isinstance(layer, nn.Linear):
        first, last = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias)
    else:
        first = nn.Conv2d(
            layer.in_channels,
            rank,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            1,
            False,
            layer.padding_mode,
        )
        last = nn.Conv2d(rank, layer.out_channels, 1, bias=bias)
    root = S.sqrt()
    first.weight.data = (root[:, None] * V).reshape(first.weight.shape).to(layer.weight)
    last.weight.data = (U * root).reshape(last.weight.shape).to(layer.weight)
    if bias:
        last.bias.data = layer.bias.data.clone()
    made = nn.Sequential(first, last).train(layer.training)
    return made.requires_grad_(layer.weight.requires_grad)
