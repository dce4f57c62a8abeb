"""Merges: what happens to the removed channels. One function each.

A merge works in place on a BN-folded network of the dense shape, on the CPU, and returns the matrix (k, n) that multiplied the
channels.
It writes targets to the positions of the kept channels and zeroes the other channels, so that the merged network computes the
same before and after it is physically shrunk (`groups.surgery.shrink`).
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion._registry import MERGES
from intrafusion.pruning.groups.group import CHANNELWISE, CONSUMER, PAD, Group, Layer
from intrafusion.pruning.groups.norms import affine
from intrafusion.pruning.transport.planning import TransportPlan, selection

_DENSE = 0.1  # share of a matrix's entries above which a dense product is faster


@MERGES.register(
    "drop",
    "remove the less important channels and keep the others unchanged",
    "Li et al., ICLR 2017",
    transports=False,
)
def drop(model: nn.Module, group: Group, plan: TransportPlan) -> Tensor:
    return apply(model, group, selection(plan.kept, group.size), plan.kept)


@MERGES.register(
    "fusion",
    "fuse the less important channels into the kept ones by the transport plan",
    "Theus et al., ICLR 2024",
    differs="BatchNorm is folded with its eps (the authors' code omits it); their marginal `radical` is missing",
)
def fusion(model: nn.Module, group: Group, plan: TransportPlan) -> Tensor:
    return apply(model, group, plan.matrix, plan.kept)


def apply(model: nn.Module, group: Group, T: Tensor, kept: Tensor, readers: Tensor | None = None) -> Tensor:
    """Multiply a group's channels by T (k, n), in place: `T W`, `T b` for producers, `W T^T` for consumers.

    Layers between them that have one weight per channel (depthwise convolutions, norms that do not fold) receive channels that
    are already sums. So their weights are averaged, by T with rows scaled to sum to one; their biases are summed. The k results
    are written to channels `kept`; every other channel becomes zero.

    Parameters
    ----------
    model : nn.Module
        A BN-folded network of the dense shape, on the CPU.
    group : Group
        The group to merge.
    T : Tensor
        (k, n), the matrix that multiplies the channels.
    kept : Tensor
        int64 (k,), the channels that get the results.
    readers : Tensor, optional
        (k, n), the matrix for consumers if it is not T.

    Returns
    -------
    Tensor
        T.
    """
    for layer in group.layers:
        module = model.get_submodule(layer.name)
        if layer.role == PAD:
            continue
        if layer.role != CONSUMER and hasattr(module, "folded_gamma"):
            del module.folded_gamma  # it describes channels that no longer exist
        if layer.role != CONSUMER and hasattr(module, "folded_norm"):
            del module.folded_norm
        if isinstance(module, _BatchNorm):
            _apply_norm(module, layer, T, kept)
        else:
            for kind, view in layer.views(model).items():
                average = layer.role == CHANNELWISE and kind == "weight"
                matrix = readers if layer.role == CONSUMER and readers is not None else T
                _apply_view(view, layer, averaging(T) if average else matrix, kept)
    return T


def averaging(T: Tensor) -> Tensor:
    """Return T with rows scaled to sum to one."""
    sums = T.sum(1, keepdim=True)
    return T / sums.where(sums > 0, torch.ones_like(sums))


def _apply_view(view: Tensor, layer: Layer, T: Tensor, kept: Tensor) -> None:
    """Set view[positions of kept] to T applied over the channels, and zero elsewhere.

    view: the axis of the channels first, then any shape.
    """
    present = layer.present()
    columns, rows = present.nonzero()[:, 0], present[kept].nonzero()[:, 0]
    channels = view[layer.positions[columns]].double()  # (n', m, ...)
    merged = _combined(T[rows[:, None], columns], channels).to(view.dtype)
    view[layer.positions[columns]] = 0
    view[layer.positions[kept[rows]]] = merged


def _combined(T: Tensor, channels: Tensor) -> Tensor:
    """Multiply T (k, n) by the channels (n, ...): (k, ...).

    An optimal plan has at most n + k - 1 entries that are not zero, and only these are multiplied.
    """
    at, to = T.nonzero().unbind(1)
    if len(at) > _DENSE * T.numel():
        return torch.tensordot(T, channels, dims=1)
    shares = T[at, to].view(-1, *[1] * (channels.ndim - 1))
    return channels.new_zeros(len(T), *channels.shape[1:]).index_add_(0, at, channels[to].mul_(shares))


def _apply_norm(norm: _BatchNorm, layer: Layer, T: Tensor, kept: Tensor) -> None:
    """Merge a norm that does not fold: average its scale and variance, and sum its shift and mean, like its channels."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    shift = affine(norm)[1]
    _apply_view(shift, layer, T, kept)
    if norm.affine:
        _apply_view(norm.weight.data, layer, averaging(T), kept)
    _apply_view(norm.running_mean, layer, T, kept)
    _apply_view(norm.running_var, layer, averaging(T), kept)
    if norm.affine:
        norm.bias.data.copy_(shift + affine(norm)[0] * norm.running_mean.double())
