"""Shapes that hold for any number of images: each size is an integer or an integer multiple of the number of images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from intrafusion.errors import IntrafusionError

LIMIT = 1 << 40  # limit on every integer in a program
RANK = 8
DYNAMIC = 'export it with dynamic_shapes=({0: torch.export.Dim("batch")},)'


@dataclass(frozen=True)
class Batch:
    """A size that is `times` times the number of images."""

    times: int

    def __str__(self) -> str:
        return "batch" if self.times == 1 else f"{self.times} batch"


Size = int | Batch
Sizes = tuple[Size, ...]


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor before it exists.

    least, most: bounds of its values, if it holds integers from the file.
    """

    sizes: Sizes
    dtype: torch.dtype = torch.float32
    least: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        if len(self.sizes) > RANK:
            raise IntrafusionError(f"it has a tensor of {len(self.sizes)} dimensions; the limit is {RANK}")
        if any(size < 1 for size in self.sizes if isinstance(size, int)):
            raise IntrafusionError(f"it has a tensor of shape {self}, which is empty")
        numel(self.sizes)

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.sizes))})"

    def of(self, *sizes: Size) -> "Shape":
        """Return a copy with other sizes, for a tensor that holds some of the same numbers."""
        return replace(self, sizes=sizes)

    def numbers(self, images: int) -> int:
        """Return how many numbers the tensor holds for this number of images."""
        return at(numel(self.sizes), images)

    def bytes(self, images: int) -> int:
        return self.numbers(images) * self.dtype.itemsize


def at(size: Size, images: int) -> int:
    return size.times * images if isinstance(size, Batch) else size


def whole_number(number: object) -> int:
    """Return an integer of a program unchanged. Raises IntrafusionError for any other type and for one out of bounds."""
    if type(number) is not int:
        raise IntrafusionError(f"it has {str(number)[:40]!r} instead of an integer")
    if abs(number) > LIMIT:
        raise IntrafusionError("it computes with integers beyond 2^40")
    return number


def scaled(size: Size, by: Size) -> Size:
    """Return the product of two sizes. Raises IntrafusionError if both grow with the batch or the product is out of bounds."""
    if isinstance(size, Batch) and isinstance(by, Batch):
        raise IntrafusionError(f"it multiplies the number of images by itself; {DYNAMIC}")
    if isinstance(size, Batch):
        return Batch(whole_number(size.times * whole_number(by)))
    if isinstance(by, Batch):
        return Batch(whole_number(whole_number(size) * by.times))
    return whole_number(whole_number(size) * whole_number(by))


def numel(sizes: Iterable[Size]) -> Size:
    one: Size = 1
    return reduce(scaled, sizes, one)


def total(first: Size, second: Size) -> Size:
    """Return the sum of two sizes.

    Raises IntrafusionError if only one of them grows with the batch, unless one is 0, or if the sum is out of bounds.
    """
    if isinstance(first, Batch) and isinstance(second, Batch):
        return Batch(whole_number(first.times + second.times))
    if isinstance(first, Batch) or isinstance(second, Batch):
        if 0 in (first, second):
            return second if first == 0 else first
        raise IntrafusionError(f"it adds {first} and {second}, which is not a multiple of the batch")
    return whole_number(first + second)


def total_of(first: Size, second: Size) -> Size:
    """Return the sum of two counts. If only one grows with the batch, return an upper bound that counts the other per image."""
    if isinstance(first, Batch) == isinstance(second, Batch):
        return total(first, second)
    return Batch(whole_number(at(first, 1) + at(second, 1)))


def divided(size: Size, by: Size) -> Size:
    """Return the quotient of two sizes, rounded down. Raises IntrafusionError unless it holds for any number of images."""
    if isinstance(by, Batch):
        if isinstance(size, Batch) and by.times and not size.times % by.times:
            return size.times // by.times
    elif whole_number(by):
        if isinstance(size, int):
            return size // by
        if not size.times % by:
            return Batch(size.times // by)
    raise IntrafusionError(f"it divides {size} by {by}, which is not an integer for every batch; {DYNAMIC}")


def remainder(size: Size, by: Size) -> Size:
    if isinstance(size, int) and isinstance(by, int) and by:
        return size % by
    divided(size, by)
    return 0


def broadcast(*shapes: Sequence[Size]) -> Sizes:
    """Return the sizes of an elementwise result. Raises IntrafusionError unless they fit for any number of images."""
    found: list[Size] = []
    for place in range(max(map(len, shapes))):
        here = {sizes[-1 - place] for sizes in shapes if place < len(sizes)} - {1}
        if len(here) > 1:
            raise IntrafusionError(f"it combines shapes that do not match: {', '.join(str(Shape(tuple(s))) for s in shapes)}")
        found.append(next(iter(here), 1))
    return tuple(found[::-1])


def fitted(shape: Shape, sizes: Sizes) -> Sizes:
    """Return the sizes of a reshape, with -1 resolved.

    Raises IntrafusionError unless they hold the same count of numbers for any number of images.
    """
    everything, known = numel(shape.sizes), numel(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known:
        rest = divided(everything, known)
        if scaled(rest, known) == everything:
            return tuple(rest if size == -1 else size for size in sizes)
    elif -1 not in sizes and known == everything:
        return sizes
    raise IntrafusionError(
        f"it reshapes {shape} to ({', '.join(map(str, sizes))}), which does not hold for every batch; {DYNAMIC}"
    )
