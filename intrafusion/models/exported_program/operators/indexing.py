"""Selection by indices, which are constants of the file: their values are known and checked."""

import torch

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.operators.checks import axis, with_sizes
from intrafusion.models.exported_program.operators.table import rule_of
from intrafusion.models.exported_program.shapes import Batch, Shape, Size


def _indices(index: Shape, size: Size) -> None:
    if index.dtype != torch.int64 or index.least is None or index.most is None:
        raise IntrafusionError("its indices must be integers stored in the file")
    if isinstance(size, Batch) or index.least < 0 or index.most >= size:
        raise IntrafusionError(f"indices from {index.least} to {index.most} are out of range for size {size}")


@rule_of(lambda x, index: x[index])
def index(x: Shape, index: Shape) -> Shape:
    if not x.sizes:
        raise IntrafusionError("it cannot index a single number")
    _indices(index, x.sizes[0])
    return Shape((*index.sizes, *x.sizes[1:]), x.dtype)


@rule_of(torch.index_select, "index_select.default self dim index")
def index_select(x: Shape, dim: int, index: Shape) -> Shape:
    place = axis(x, dim)
    _indices(index, x.sizes[place])
    if len(index.sizes) != 1:
        raise IntrafusionError(f"indices must have one dimension, not {index}")
    return with_sizes(x, place, *index.sizes)
