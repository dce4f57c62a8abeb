"""Selection by indices, which are constants of the file: their values are known and checked."""

import torch

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.operators.checks import axis, with_sizes
from intrafusion.models.exported_program.operators.table import rule_of
from intrafusion.models.exported_program.shapes import Batch, Shape, Size


def _indices(index: Shape, size: Size) -> None:
    if index.dtype != torch.int64 or index.least is None or index.most is None:
        raise IntrafusionError("it has indices that are no whole numbers of the file")
    if isinstance(size, Batch) or index.least < 0 or index.most >= size:
        raise IntrafusionError(f"it has indices of {index.least} to {index.most} into {size} places")


@rule_of(lambda x, index: x[index])
def index(x: Shape, index: Shape) -> Shape:
    if not x.sizes:
        raise IntrafusionError("it has indices into a single number")
    _indices(index, x.sizes[0])
    return Shape((*index.sizes, *x.sizes[1:]), x.dtype)


@rule_of(torch.index_select, "index_select.default self dim index")
def index_select(x: Shape, dim: int, index: Shape) -> Shape:
    place = axis(x, dim)
    _indices(index, x.sizes[place])
    if len(index.sizes) != 1:
        raise IntrafusionError(f"it selects by indices {index}")
    return with_sizes(x, place, *index.sizes)
