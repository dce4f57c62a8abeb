"""Which architecture of the zoo a state dict is likely of: said where it does not fit the one that was asked for."""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from intrafusion.models.sources import builtin, torchvision
from intrafusion.models.state_dict import Spelling, cifar, is_counter, plain

_NEAR, _ALL = 0.5, 1 - 1e-5  # likeness from which on an architecture is named, or said to be the one
_HEAD = 1 - 1e-6  # what the weights of a head count for that has another number of classes
_TRIED = 12  # of torchvision's classifiers, those of the nearest sizes
_SIZES = 0.5, 1.5  # numbers in the file for each of theirs
_MOST = 100_000_000  # parameters of those that must be made in memory

Shapes = dict[str, tuple[int, ...]]


def nearest(table: Mapping[str, Any], asked: str) -> str:
    """ "; its keys are those of NAME", or come nearest to its; "" where no other's are near. timm's are not looked at."""
    found, name = max(_likenesses(table))
    if found < _NEAR or name == asked:
        return ""
    return f"; its keys {'are those' if found > _ALL else 'come nearest to those'} of {name}"


def _likenesses(table: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    """How like each architecture's the keys and shapes are, from 0 to 1."""
    state = {name: value for name, value in table.items() if isinstance(value, Tensor)}
    shapes = _shapes(state, cifar)
    projects = any(".shortcut." in name for name in shapes)
    for name in builtin.names():
        yield _likeness(shapes, *_of_ours(name, projects)), name
    shapes = _shapes(state, plain)
    for name in _of_size(sum(map(math.prod, shapes.values()))):
        yield _likeness(shapes, _of_torchvision(name), torchvision.CLASSES), name


def _likeness(found: Shapes, own: Shapes, classes: int) -> float:
    """The share of the keys that have the same shape; a head of another number of classes has almost the same."""
    same = 0.0
    for name in found.keys() & own.keys():
        shape, other = found[name], own[name]
        same += 1.0 if shape == other else _HEAD if other[:1] == (classes,) and shape[1:] == other[1:] else 0.0
    return same / len(found.keys() | own.keys())


def _of_size(numbers: int) -> list[str]:
    """The torchvision classifiers with about so many numbers, the nearest first."""
    sizes = {name: torchvision.member(name, None).meta["num_params"] for name in torchvision.names()}
    near = [
        name
        for name, size in sizes.items()
        if _SIZES[0] * size <= numbers <= _SIZES[1] * size and (size <= _MOST or not _needs_memory(name))
    ]
    return sorted(near, key=lambda name: abs(math.log(numbers / sizes[name])))[:_TRIED]


def _needs_memory(name: str) -> bool:
    """Whether a network computes with tensors while it is made: RegNet, its widths."""
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
    return _shapes(model.state_dict(), plain)


def _shapes(state: Mapping[str, Tensor], spelling: Spelling) -> Shapes:
    return {spelling(name): tuple(value.shape) for name, value in state.items() if not is_counter(name)}
