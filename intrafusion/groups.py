"""The channel groups of any network: traced, then put to a test that a right group cannot fail.

Every prunable group must leave the logits unchanged when its channels are permuted, and the network with half of them cut
away must compute what it computes with those channels zeroed. Both are tried on a copy with live random weights, where a
wrong coupling shows.
"""

import copy
import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.channels import Group
from intrafusion.errors import IntrafusionError, one_line
from intrafusion.shrink import shrink
from intrafusion.tracing import Graph

_MIXED = "permuting its channels changes the logits: the layers between mix channels in a way that cannot be traced"
_CHANGED = "the network computes something else once channels are cut away: an operation in between depends on them all"


def find_groups(model: nn.Module, example: Tensor) -> list[Group]:
    """All channel groups of `model`, from input to output; those that cannot be pruned carry their reason.

    example: one input, float (1, C, H, W); only its shape matters. The model is not touched.
    Raises IntrafusionError when the network cannot be traced at all.
    """
    traced = copy.deepcopy(model).eval().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    kind = next((p.dtype for p in traced.parameters()), torch.float32)
    noise = torch.randn(2, *example.shape[1:], generator=generator).to(example.device, kind)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            groups = Graph(traced, noise[:1]).groups()
        with torch.inference_mode():
            _enliven(traced, generator)
            before = traced(noise)
    except Exception as error:  # a user's forward can fail in any way
        raise IntrafusionError(
            f"the network cannot be traced on an input of shape {tuple(example.shape)}: {one_line(error)}"
        ) from error
    if not isinstance(before, Tensor) or before.ndim != 2:
        raise IntrafusionError("the network must return one tensor of logits, (images, classes)")
    return _verified(traced.requires_grad_(False), noise, before, groups)


def _enliven(model: nn.Module, generator: torch.Generator) -> None:
    """Fill a network with random weights and statistics that let every layer's signal through, in place."""

    def fill(tensor: Tensor, values: Tensor) -> None:
        tensor.copy_(values.to(tensor.device, tensor.dtype))

    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            fill(parameter.data, noise * math.sqrt(2 / (parameter.numel() / parameter.shape[0])))
        else:
            fill(parameter.data, noise * 0.1 + (0 if name.endswith("bias") else 1))
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            fill(module.running_mean, torch.randn(module.num_features, generator=generator) * 0.1)
            fill(module.running_var, torch.rand(module.num_features, generator=generator) + 0.5)


def _verified(model: nn.Module, inputs: Tensor, before: Tensor, groups: list[Group]) -> list[Group]:
    """The groups, with a reason added to each one that fails its test; all are tried together first."""
    prunable = [group for group in groups if group.reason is None]
    if _failure(model, inputs, before, prunable) is None:
        return groups
    found = _failures(*_in_double(model, inputs, before), prunable)
    return [replace(group, reason=group.reason or found.get(group.name)) for group in groups]


def _in_double(model: nn.Module, inputs: Tensor, before: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """The same in float64, as float32's errors can pass for another answer; as it is where its code is for float32."""
    try:
        twin, exact = copy.deepcopy(model).double(), inputs.double()
        with torch.inference_mode():
            return twin, exact, twin(exact)
    except Exception:  # a user's forward can fail in any way
        return model, inputs, before


def _failures(model: nn.Module, inputs: Tensor, before: Tensor, groups: list[Group]) -> dict[str, str]:
    """Group -> why it is wrong, for those that are: halves of the groups, and halves of halves that fail."""
    reason = _failure(model, inputs, before, groups)
    if reason is None or len(groups) < 2:
        return {group.name: reason for group in groups if reason}
    half = len(groups) // 2
    return _failures(model, inputs, before, groups[:half]) | _failures(model, inputs, before, groups[half:])


def _failure(model: nn.Module, inputs: Tensor, before: Tensor, groups: list[Group]) -> str | None:
    """Why these groups are wrong together, or None; `model` is left as it was."""
    tolerance = 1e-3 * float((before[0] - before[1]).abs().max())

    def same(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() <= tolerance)

    with torch.inference_mode():
        if not all(same(before, _permuted(model, groups, turn)(inputs)) for turn in (None, 1)):
            return _MIXED
        kept = {group: _half(group) for group in groups}
        zeroed = _zeroed(model, kept)(inputs)
        try:
            cut = copy.deepcopy(model)
            shrink(cut, kept)
            return None if same(zeroed, cut(inputs)) else _CHANGED
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            return f"the network fails once channels are cut away, as where a shape is written out: {one_line(error)}"


def _blocks(group: Group) -> list[Tensor]:
    return [(group.block == block).nonzero()[:, 0] for block in group.block.unique()]


def _permuted(model: nn.Module, groups: list[Group], turn: int | None) -> nn.Module:
    """A copy with each group's channels permuted within their blocks: by chance, or by a turn of so many places."""
    model = copy.deepcopy(model)
    for group in groups:
        generator = torch.Generator().manual_seed(0)
        order = torch.arange(group.size)
        for members in _blocks(group):
            order[members] = (
                members[torch.randperm(len(members), generator=generator)] if turn is None else members.roll(turn)
            )
        for layer in group.layers:
            held = layer.present()
            for view in layer.views(model).values():
                view[layer.positions[held].flatten()] = view[layer.positions[order][held].flatten()].clone()
    return model


def _half(group: Group) -> Tensor:
    """Every second channel of each block, at least one: int64, sorted."""
    return torch.cat([members[::2] for members in _blocks(group)]).sort().values


def _zeroed(model: nn.Module, kept: dict[Group, Tensor]) -> nn.Module:
    """A copy in which the channels that do not stay are zero."""
    model = copy.deepcopy(model)
    for group, stays in kept.items():
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[stays] = False
        for layer in group.layers:
            for name, view in layer.views(model).items():
                if not name.startswith("running"):
                    view[layer.positions[gone & layer.present()].flatten()] = 0
    return model
