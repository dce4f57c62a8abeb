"""Operators that join, repeat, move, pad or fill. Their results are new tensors, which share no memory with their input."""

import operator
from typing import Literal

import torch
import torch.nn.functional as F

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.operators.checks import (
    SIDE,
    axes,
    axis,
    check_between,
    check_floats,
    check_images,
    fixed_size,
    with_sizes,
)
from intrafusion.models.exported_program.operators.table import Ints, Shapes, rule_of
from intrafusion.models.exported_program.shapes import Batch, Shape, Size, Sizes, at, scaled, total


@rule_of(lambda x, times: x.repeat(times), "repeat.default self repeats")
def repeat(x: Shape, times: Sizes) -> Shape:
    if len(times) < len(x.sizes):
        raise IntrafusionError(f"it cannot repeat {x} ({', '.join(map(str, times))}) times")
    return Shape(tuple(map(scaled, (1,) * (len(times) - len(x.sizes)) + x.sizes, times)), x.dtype)


@rule_of(torch.cat, "cat.default tensors dim", "concat.default tensors dim")
def cat(tensors: Shapes, dim: int) -> Shape:
    if not tensors:
        raise IntrafusionError("it concatenates no tensors")
    first = tensors[0]
    check_floats(*tensors)
    place = axis(first, dim)
    length: Size = 0
    for one in tensors:
        if len(one.sizes) != len(first.sizes) or with_sizes(one, place) != with_sizes(first, place):
            raise IntrafusionError(f"it cannot concatenate {first} and {one}")
        length = total(length, one.sizes[place])
    return with_sizes(first, place, length)


@rule_of(torch.stack, "stack.default tensors dim")
def stack(tensors: Shapes, dim: int) -> Shape:
    if not tensors or any((one.sizes, one.dtype) != (tensors[0].sizes, tensors[0].dtype) for one in tensors):
        raise IntrafusionError("it stacks tensors of different shapes")
    place = axis(tensors[0], dim, more=1)
    sizes = tensors[0].sizes
    return Shape((*sizes[:place], len(tensors), *sizes[place:]), tensors[0].dtype)


@rule_of(torch.roll, "roll.default self shifts dims")
def roll(x: Shape, shifts: Ints, dims: Ints) -> Shape:
    if len(shifts) != len(dims) or any(isinstance(x.sizes[place], Batch) for place in axes(x, dims)):
        raise IntrafusionError(f"it cannot roll {x} by {shifts} along {dims}, which include the batch or do not match")
    return Shape(x.sizes, x.dtype)


@rule_of(torch.flip, "flip.default self dims")
def flip(x: Shape, dims: Ints) -> Shape:
    if any(isinstance(x.sizes[place], Batch) for place in axes(x, dims)):
        raise IntrafusionError(f"it flips {x} along the batch, which is not supported")
    return Shape(x.sizes, x.dtype)


@rule_of(lambda x, around, value: F.pad(x, around, value=value))
def pad(x: Shape, around: Ints, value: float) -> Shape:
    check_floats(x)
    return _padded(x, around)


@rule_of(lambda x, around, mode: F.pad(x, around, mode=mode))
def pad_as(x: Shape, around: Ints, mode: Literal["reflect", "replicate", "circular"]) -> Shape:
    check_images(x)
    check_between("padding", 0, *around)
    sides = [at(size, 1) for size in (x.sizes[3], x.sizes[3], x.sizes[2], x.sizes[2])]
    most = {"reflect": [side - 1 for side in sides], "circular": sides}.get(mode, around)
    if len(around) != 4 or any(map(operator.gt, around, most)):
        raise IntrafusionError(f"it cannot pad {x} by {around}")
    return _padded(x, around)


def _padded(x: Shape, around: Ints) -> Shape:
    if len(around) % 2 or len(around) > 2 * len(x.sizes) or not around:
        raise IntrafusionError(f"it cannot pad {x} by {str(around)[:60]}")
    for one in range(len(around) // 2):
        before, after = around[2 * one : 2 * one + 2]
        if before or after:
            place, size = fixed_size(x, -1 - one)
            if before < -size or after < -size:
                raise IntrafusionError(f"it cannot pad {x} by {str(around)[:60]}")
            x = with_sizes(x, place, size + before + after)
    return Shape(x.sizes, x.dtype)


@rule_of(F.channel_shuffle, "channel_shuffle.default self groups")
def channel_shuffle(x: Shape, groups: int) -> Shape:
    check_images(x)
    if groups < 1 or at(x.sizes[1], 1) % groups:
        raise IntrafusionError(f"it cannot shuffle {x} in {groups} groups")
    return x


@rule_of(F.pixel_shuffle, "pixel_shuffle.default self upscale_factor")
def pixel_shuffle(x: Shape, factor: int) -> Shape:
    check_images(x)
    batch, channels, height, width = x.sizes
    if not 1 <= factor <= SIDE or at(channels, 1) % factor**2:
        raise IntrafusionError(f"it cannot shuffle {x} by {factor}")
    return Shape((batch, at(channels, 1) // factor**2, scaled(height, factor), scaled(width, factor)))


@rule_of(F.pixel_unshuffle, "pixel_unshuffle.default self downscale_factor")
def pixel_unshuffle(x: Shape, factor: int) -> Shape:
    check_images(x)
    batch, channels, height, width = (x.sizes[0], *(at(size, 1) for size in x.sizes[1:]))
    if not 1 <= factor <= SIDE or height % factor or width % factor:
        raise IntrafusionError(f"it cannot shuffle {x} by {factor}")
    return Shape((batch, channels * factor**2, height // factor, width // factor))


@rule_of(lambda x, sizes, value: x.new_full(sizes, value))
def full(x: Shape, sizes: Sizes, value: float) -> Shape:
    check_floats(x)
    return Shape(sizes)
