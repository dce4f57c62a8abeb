"""Operators that combine the numbers along dimensions other than the batch."""

from typing import Literal

import torch
import torch.nn.functional as F

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.operators.checks import axes, check_floats, fixed_size
from intrafusion.models.exported_program.operators.table import Ints, rule_of
from intrafusion.models.exported_program.shapes import Batch, Shape


@rule_of(torch.mean, "mean.dim self dim keepdim", name="mean")
@rule_of(torch.sum, "sum.dim_IntList self dim keepdim", name="sum")
@rule_of(torch.amax, "amax.default self dim keepdim", name="amax")
@rule_of(torch.amin, "amin.default self dim keepdim", name="amin")
@rule_of(lambda x, dims, keep: torch.linalg.vector_norm(x, 2, dims, keep), name="norm")
def _reduced(x: Shape, dims: Ints, keep: bool) -> Shape:
    check_floats(x)
    gone = axes(x, dims)
    if any(isinstance(x.sizes[place], Batch) for place in gone):
        raise IntrafusionError(f"it sums {x} over the batch, which is not supported")
    return Shape(tuple(1 if place in gone else size for place, size in enumerate(x.sizes) if keep or place not in gone))


@rule_of(lambda x, dims, correction, keep: torch.var(x, dims, correction=correction, keepdim=keep))
def var(x: Shape, dims: Ints, correction: Literal[0, 1], keep: bool) -> Shape:
    return _reduced(x, dims, keep)


@rule_of(F.softmax, "softmax.int self dim", "_softmax.default self dim", name="softmax")
@rule_of(F.log_softmax, "log_softmax.int self dim", "_log_softmax.default self dim", name="log_softmax")
def _shares(x: Shape, dim: int) -> Shape:
    check_floats(x)
    fixed_size(x, dim)
    return x
