"""Checks of shapes that the rules of several families share."""

import torch

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.operators.table import Ints
from intrafusion.models.exported_program.shapes import Batch, Shape, Size

SIDE = 1 << 16  # limit on kernels, strides, paddings and dilations


def check_floats(*shapes: Shape | None) -> None:
    for shape in shapes:
        if shape is not None and shape.dtype != torch.float32:
            raise IntrafusionError(f"it computes with {shape.dtype}; export the network in float32")


def check_shape(shape: Shape | None, *sizes: Size, what: str = "a weight") -> None:
    """Raise IntrafusionError if a tensor has another shape, or another dtype than float32."""
    check_floats(shape)
    if shape is not None and shape.sizes != sizes:
        raise IntrafusionError(f"{what} must have shape {Shape(sizes)}, not {shape}")


def check_images(x: Shape) -> None:
    check_floats(x)
    if len(x.sizes) != 4 or not all(isinstance(size, int) for size in x.sizes[1:]):
        raise IntrafusionError(f"it needs feature maps (batch, channels, height, width), not {x}")


def axis(x: Shape, dim: int, more: int = 0) -> int:
    """Return the non-negative index of a dimension, which may count from the end. more: dimensions still to be added."""
    rank = len(x.sizes) + more
    if not -rank <= dim < rank:
        raise IntrafusionError(f"dimension {dim} is out of range for {x}")
    return dim % rank


def axes(x: Shape, dims: Ints) -> set[int]:
    found = {axis(x, dim) for dim in dims}
    if len(found) != len(dims) or not dims:
        raise IntrafusionError(f"dimensions {dims} are invalid for {x}")
    return found


def fixed_size(x: Shape, dim: int) -> tuple[int, int]:
    """Return the index of a dimension and its size. Raises IntrafusionError if the size grows with the batch."""
    place = axis(x, dim)
    size = x.sizes[place]
    if isinstance(size, Batch):
        raise IntrafusionError(f"it splits {x} along the batch, which is not supported")
    return place, size


def with_sizes(x: Shape, place: int, *sizes: Size) -> Shape:
    return x.of(*x.sizes[:place], *sizes, *x.sizes[place + 1 :])


def check_between(name: str, low: int, *numbers: int) -> None:
    if not all(low <= one <= SIDE for one in numbers):
        raise IntrafusionError(f"the {name} {str(numbers)[:60]} is out of range")
