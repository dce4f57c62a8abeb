"""Operators that reshape, reorder or select. Their results may share memory with their input."""

from typing import Literal

import torch

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.operators.checks import SIDE, axes, axis, fixed_size, with_sizes
from intrafusion.models.exported_program.operators.table import Ints, Shapes, rule_of
from intrafusion.models.exported_program.shapes import Shape, Sizes, broadcast, fitted, numel


@rule_of(torch.reshape, views=True)
def reshape(x: Shape, sizes: Sizes) -> Shape:
    return x.of(*fitted(x, sizes))


@rule_of(torch.flatten, views=True)
def flatten(x: Shape, start: Literal[1]) -> Shape:
    if len(x.sizes) < 2:
        raise IntrafusionError(f"it cannot flatten {x}")
    return x.of(x.sizes[0], numel(x.sizes[1:]))


@rule_of(torch.permute, views=True)
def permute(x: Shape, dims: Ints) -> Shape:
    if len(axes(x, dims)) != len(x.sizes):
        raise IntrafusionError(f"it cannot permute {x} as {dims}")
    return x.of(*(x.sizes[dim] for dim in dims))


@rule_of(torch.transpose, "swapaxes.default self axis0 axis1", views=True)
def transpose(x: Shape, first: int, second: int) -> Shape:
    order = list(range(len(x.sizes)))
    one, other = axis(x, first), axis(x, second)
    order[one], order[other] = other, one
    return x.of(*(x.sizes[place] for place in order))


@rule_of(torch.unsqueeze, "unsqueeze.default self dim", views=True)
def unsqueeze(x: Shape, dim: int) -> Shape:
    place = axis(x, dim, more=1)
    return x.of(*x.sizes[:place], 1, *x.sizes[place:])


@rule_of(torch.squeeze, "squeeze.dim self dim", views=True)
def squeeze(x: Shape, dim: int) -> Shape:
    place, size = fixed_size(x, dim)
    return with_sizes(x, place, *(() if size == 1 else (size,)))


@rule_of(lambda x, sizes: x.expand(sizes), views=True)
def expand(x: Shape, sizes: Sizes) -> Shape:
    before = (1,) * (len(sizes) - len(x.sizes)) + x.sizes
    told = tuple(size if new == -1 else new for size, new in zip(before, sizes, strict=False))
    if len(sizes) < len(x.sizes) or broadcast(before, told) != told or -1 in sizes[: len(sizes) - len(x.sizes)]:
        raise IntrafusionError(f"it cannot expand {x} to ({', '.join(map(str, sizes))})")
    return x.of(*told)


@rule_of(torch.split, "split_with_sizes.default self split_sizes dim", views=True)
def split(x: Shape, lengths: Ints, dim: int) -> Shapes:
    place, size = fixed_size(x, dim)
    if sum(lengths) != size or any(length < 1 for length in lengths):
        raise IntrafusionError(f"it cannot split {x} into parts of {str(lengths)[:60]}")
    return tuple(with_sizes(x, place, length) for length in lengths)


@rule_of(torch.chunk, "chunk.default self chunks dim", views=True)
def chunk(x: Shape, count: int, dim: int) -> Shapes:
    place, size = fixed_size(x, dim)
    if not 1 <= count <= size:
        raise IntrafusionError(f"it cannot split {x} into {count} parts")
    length = -(-size // count)
    return tuple(with_sizes(x, place, min(length, size - start)) for start in range(0, size, length))


@rule_of(torch.unbind, "unbind.int self dim", views=True)
def unbind(x: Shape, dim: int) -> Shapes:
    place, size = fixed_size(x, dim)
    if size > SIDE:
        raise IntrafusionError(f"it cannot unbind {x}")
    return (with_sizes(x, place),) * size


@rule_of(torch.select, "select.int self dim index", views=True)
def select(x: Shape, dim: int, index: int) -> Shape:
    place, size = fixed_size(x, dim)
    if not -size <= index < size:
        raise IntrafusionError(f"index {index} is out of range for {x}")
    return with_sizes(x, place)


@rule_of(lambda x, dim, start, stop, step: x[(slice(None),) * dim + (slice(start, stop, step),)], views=True)
def slice_(x: Shape, dim: int, start: int, stop: int, step: int) -> Shape:
    place, size = fixed_size(x, dim)
    if dim != place or not 0 <= start < stop <= size or step < 1:
        raise IntrafusionError(f"the slice {start} to {stop} is out of range for {x}")
    return with_sizes(x, place, -(-(stop - start) // step))
