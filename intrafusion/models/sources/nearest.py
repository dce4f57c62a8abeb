"""Search for the known architecture that a state dict most likely belongs to.

The error for a state dict that does not match the requested architecture names it.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from intrafusion.models.sources import builtin, torchvision
from intrafusion.models.state_dict import Spelling, cifar, is_counter, unwrapped_key

_NEAR, _ALL = 0.5, 1 - 1e-5  # minimum similarity to name an architecture, or to call it the same
_HEAD = 1 - 1e-6  # similarity of head weights with another number of classes
_TRIED = 12  # number of torchvision classifiers to compare, nearest in size
_SIZES = 0.5, 1.5  # range of the file's parameter count relative to theirs
_MOST = 100_000_000  # maximum parameters of networks that must be built in memory

Shapes = dict[str, tuple[int, ...]]


def nearest(table: Mapping[str, Any], asked: str) -> str:
    """Return text that names the architecture whose keys match best, or "" if no other one is close.

    The text is "; its keys are those of NAME" or "; its keys come nearest to those of NAME". timm's models are not compared.
    """
    found, name = max(_likenesses(table))
    if found < _NEAR or name == asked:
        return ""
    return f"; its keys {'match' if found > _ALL else 'are most similar to'} {name}"


def _likenesses(table: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    """Yield the similarity of the keys and shapes to each architecture's, from 0 to 1, and the architecture's name."""
    state = {name: value for name, value in table.items() if isinstance(value, Tensor)}
    shapes = _shapes(state, cifar)
    projects = any(".shortcut." in name for name in shapes)
    for name in builtin.names():
        yield _likeness(shapes, *_of_ours(name, projects)), name
    shapes = _shapes(state, unwrapped_key)
    for name in _of_size(sum(map(math.prod, shapes.values()))):
        yield _likeness(shapes, _of_torchvision(name), torchvision.CLASSES), name


def _likeness(found: Shapes, own: Shapes, classes: int) -> float:
    """Return the share of keys with equal shapes. A head with another number of classes counts almost fully."""
    same = 0.0
    for name in found.keys() & own.keys():
        shape, other = found[name], own[name]
        same += 1.0 if shape == other else _HEAD if other[:1] == (classes,) and shape[1:] == other[1:] else 0.0
    return same / len(found.keys() | own.keys())


def _of_size(numbers: int) -> list[str]:
    """Return the torchvision classifiers with a similar number of parameters, nearest first."""
    sizes = {name: torchvision.member(name, None).meta["num_params"] for name in torchvision.names()}
    near = [
        name
        for name, size in sizes.items()
        if _SIZES[0] * size <= numbers <= _SIZES[1] * size and (size <= _MOST or not _needs_memory(name))
    ]
    return sorted(near, key=lambda name: abs(math.log(numbers / sizes[name])))[:_TRIED]


def _needs_memory(name: str) -> bool:
    """Return whether building a network computes with real tensors, as RegNet does for its widths."""
    return "/regnet" in name


@cache
def _of_ours(name: str, projects: bool) -> tuple[Shapes, int]:
    with torch.device("meta"):
        model, card = builtin.blank(name, {".shortcut.": torch.empty(0)} if projects else {})
    return _shapes(model.state_dict(), cifar), card.classes


@cache
def _of_torchvision(name: str) -> Shapes:
    with torch.device("cpu" if _needs_memory(name) else "meta"):
        model, _ = torchvision.blank(name, {})
    return _shapes(model.state_dict(), unwrapped_key)


def _shapes(state: Mapping[str, Tensor], spelling: Spelling) -> Shapes:
    return {spelling(name): tuple(value.shape) for name, value in state.items() if not is_counter(name)}
