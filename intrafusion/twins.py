"""Copies of a network that share the layers in which they do not differ: a study makes hundreds of them."""

import copy
from collections.abc import Mapping

import torch
from torch import nn


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that hold no others, by dotted name."""
    return {name: layer for name, layer in model.named_modules() if not any(True for _ in layer.children())}


def twin(model: nn.Module, shared: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of `model` with these layers in the places of its own; all others are copied."""
    memo: dict[int, object] = {id(model.get_submodule(name)): layer for name, layer in shared.items()}
    return copy.deepcopy(model, memo)


def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """`model` with other layers in these places: what holds them is copied, everything else is shared."""
    changed = copy.copy(model)
    changed._modules = dict(model._modules)
    within: dict[str, dict[str, nn.Module]] = {}
    for name, layer in layers.items():
        first, _, rest = name.partition(".")
        if rest:
            within.setdefault(first, {})[rest] = layer
        else:
            changed._modules[first] = layer
    for first, inner in within.items():
        changed._modules[first] = replaced(model.get_submodule(first), inner)
    return changed


def differing(dense: nn.Module, other: nn.Module) -> set[str]:
    """The layers in which two networks of one architecture differ, in shape or in any number, by dotted name."""
    theirs = dict(other.named_modules())
    return {name for name, layer in dense.named_modules() if not _same(layer, theirs.get(name))}


def _same(layer: nn.Module, other: nn.Module | None) -> bool:
    """Whether two layers are alike, apart from the layers that they hold."""
    if other is layer:
        return True
    if type(other) is not type(layer) or layer.extra_repr() != other.extra_repr():
        return False
    ours, theirs = ([*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)] for m in (layer, other))
    return len(ours) == len(theirs) and all(
        a == b and torch.equal(first, second) for (a, first), (b, second) in zip(ours, theirs, strict=True)
    )
