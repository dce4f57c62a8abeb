"""Shrinking of networks: the last step of pruning, after a merge has zeroed the removed channels."""

import copy
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from intrafusion.models.architectures import PadShortcut
from intrafusion.pruning.groups.group import CONSUMER, Group


def shrink(model: nn.Module, kept: Mapping[Group, Tensor]) -> None:
    """Remove, in place, every channel of these groups that is not in `kept` (int64 (k,), sorted)."""
    for (name, side), positions in _gone(kept).items():
        module = model.get_submodule(name)
        if isinstance(module, PadShortcut):
            _shrink_pad(module, positions)
        else:
            _shrink_axis(module, side, positions)


def pad(small: nn.Module, like: nn.Module, kept: Mapping[Group, Tensor]) -> nn.Module:
    """Return a copy of `like` with the values of `small`, and zeros for the channels that are not `kept`.

    small: a network pruned to the channels `kept`. like: a network with the shape before pruning. The result computes the same
    as `small` if every norm is folded.
    """
    padded, gone = copy.deepcopy(like), _gone(kept)
    theirs = dict(small.named_modules())
    for name, module in padded.named_modules():
        for part, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            values = getattr(theirs[name], part, tensor).data
            if values.ndim == 0 or part.startswith("folded"):
                continue
            at = [
                _complement(size, gone.get((name, side), torch.empty(0, dtype=torch.int64)))
                for side, size in zip(("out", "in"), tensor.shape, strict=False)
            ]
            if getattr(module, "groups", 1) > 1:  # its inputs shrink with its outputs
                at = at[:1]
            tensor.data.zero_()
            tensor.data[tuple(torch.meshgrid(*at, indexing="ij"))] = values
    return padded


def _gone(kept: Mapping[Group, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Return the removed positions by layer and side (axis)."""
    gone: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for group, stays in kept.items():
        away = torch.ones(group.size, dtype=torch.bool)
        away[stays] = False
        for layer in group.layers:
            side = "in" if layer.role == CONSUMER else "out"
            gone[layer.name, side].append(layer.positions[away & layer.present()].flatten())
    return {place: torch.cat(positions) for place, positions in gone.items()}


def _shrink_pad(module: nn.Module, gone: Tensor) -> None:
    assert isinstance(module, PadShortcut)
    before, inside = module.before, module.before + module.channels
    removed_before = int((gone < before).sum())
    removed_inside = int(((gone >= before) & (gone < inside)).sum())
    module.before -= removed_before
    module.channels -= removed_inside
    module.after -= len(gone) - removed_before - removed_inside


def _shrink_axis(module: nn.Module, side: str, gone: Tensor) -> None:
    if isinstance(module, _BatchNorm):
        stays = _complement(module.num_features, gone)
        for name in ("weight", "bias", "running_mean", "running_var"):
            _cut(module, name, stays, 0)
        module.num_features = len(stays)
    elif isinstance(module, nn.PReLU):
        stays = _complement(module.num_parameters, gone)
        _cut(module, "weight", stays, 0)
        module.num_parameters = len(stays)
    elif isinstance(module, _ConvNd):
        if side == "in":
            stays = _complement(module.in_channels, gone)
            _cut(module, "weight", stays, 1)
            module.in_channels = len(stays)
            return
        stays = _complement(module.out_channels, gone)
        _cut(module, "weight", stays, 0)
        _cut(module, "bias", stays, 0)
        if module.groups > 1:  # whole groups are removed: the inputs shrink in proportion
            units = len(stays) * module.groups // module.out_channels
            module.in_channels = module.in_channels // module.groups * units
            module.groups = units
        module.out_channels = len(stays)
    elif isinstance(module, nn.Linear):
        stays = _complement(module.in_features if side == "in" else module.out_features, gone)
        _cut(module, "weight", stays, 1 if side == "in" else 0)
        if side == "in":
            module.in_features = len(stays)
        else:
            _cut(module, "bias", stays, 0)
            module.out_features = len(stays)


def _complement(size: int, gone: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero()[:, 0]


def _cut(module: nn.Module, name: str, stays: Tensor, axis: int) -> None:
    tensor = getattr(module, name)
    if tensor is None:
        return
    cut = tensor.data.index_select(axis, stays.to(tensor.device)).contiguous()
    setattr(module, name, nn.Parameter(cut, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut)
