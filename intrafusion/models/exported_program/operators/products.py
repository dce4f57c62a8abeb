"""Products of matrices: linear maps, matrix multiplication and attention."""

import torch
import torch.nn.functional as F

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.operators.checks import check_floats, check_shape
from intrafusion.models.exported_program.operators.table import StepOutput, rule_of
from intrafusion.models.exported_program.shapes import Shape, broadcast, numel, scaled, total, total_of


@rule_of(F.linear)
def linear(x: Shape, weight: Shape, bias: Shape | None) -> StepOutput:
    check_floats(x)
    if len(weight.sizes) != 2 or not x.sizes:
        raise IntrafusionError(f"the weight of a linear layer must have 2 dimensions, not {weight}")
    outputs, inputs = weight.sizes
    check_shape(weight, outputs, x.sizes[-1])
    check_shape(bias, outputs, what="a bias")
    shape = Shape((*x.sizes[:-1], outputs))
    return StepOutput((shape,), scaled(numel(shape.sizes), inputs))


@rule_of(torch.matmul, "bmm.default self mat2", "matmul.default self other")
def matmul(first: Shape, second: Shape) -> StepOutput:
    """Product with broadcast batch dimensions: (..., n, m) and (..., m, k) -> (..., n, k)."""
    check_floats(first, second)
    if len(first.sizes) < 2 or len(second.sizes) < 2 or first.sizes[-1] != second.sizes[-2]:
        raise IntrafusionError(f"it cannot multiply {first} by {second}")
    stack = broadcast(first.sizes[:-2], second.sizes[:-2])
    shape = Shape((*stack, first.sizes[-2], second.sizes[-1]))
    copies = total_of(numel((*stack, *first.sizes[-2:])), numel((*stack, *second.sizes[-2:])))
    return StepOutput((shape,), scaled(numel(shape.sizes), first.sizes[-1]), beside=copies)


@rule_of(lambda query, key, value, mask, scale: F.scaled_dot_product_attention(query, key, value, mask, scale=scale))
def attention(query: Shape, key: Shape, value: Shape, mask: Shape | None, scale: float | None) -> StepOutput:
    check_floats(query, key, value)
    ranks = {len(one.sizes) for one in (query, key, value)}
    if ranks not in ({3}, {4}) or key.sizes[:-1] != value.sizes[:-1] or query.sizes[:-2] != key.sizes[:-2]:
        raise IntrafusionError(f"attention cannot combine query {query}, key {key} and value {value}")
    scores = matmul(query, Shape((*key.sizes[:-2], key.sizes[-1], key.sizes[-2])))
    made = matmul(scores.shapes[0], value)
    if mask is not None:
        if mask.dtype != torch.bool:
            check_floats(mask)
        if broadcast(scores.shapes[0].sizes, mask.sizes) != scores.shapes[0].sizes:
            raise IntrafusionError(f"a mask {mask} does not fit attention {scores.shapes[0]}")
    numbers = numel(scores.shapes[0].sizes)
    return StepOutput(made.shapes, total(scores.macs, made.macs), scaled(numbers, 2), scaled(numbers, 2))
