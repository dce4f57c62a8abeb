"""Operators on each number alone, and on pairs of numbers of tensors that broadcast."""

import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.operators.checks import check_floats, check_shape
from intrafusion.models.exported_program.operators.table import rule_of
from intrafusion.models.exported_program.shapes import Shape, broadcast


def _single(x: Shape) -> Shape:
    check_floats(x)
    return x


_SINGLE: dict[str, Callable[..., Any]] = {
    "relu": F.relu, "relu6": F.relu6, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": F.silu, "mish": F.mish,
    "selu": F.selu, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "log_sigmoid": F.logsigmoid,
    "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "abs": torch.abs, "neg": torch.neg,
    "reciprocal": torch.reciprocal, "square": torch.square, "erf": torch.erf,
}  # fmt: skip
for _name, _run in _SINGLE.items():
    rule_of(_run, f"{_name}.default self", name=_name)(_single)
rule_of(torch.clone, name="clone")(_single)


@rule_of(lambda x, form: F.gelu(x, approximate=form), "gelu.default self approximate")
def gelu(x: Shape, form: Literal["none", "tanh"]) -> Shape:
    check_floats(x)
    return x


@rule_of(F.hardtanh, "hardtanh.default self min_val max_val")
def hardtanh(x: Shape, low: float, high: float) -> Shape:
    check_floats(x)
    if low > high:
        raise IntrafusionError(f"it clamps between {low} and {high}, which is an empty range")
    return x


@rule_of(torch.clamp, "clamp.default self min max")
def clamp(x: Shape, low: float | None, high: float | None) -> Shape:
    check_floats(x)
    if low is None and high is None:
        raise IntrafusionError("it clamps without bounds")
    return x


@rule_of(F.leaky_relu, "leaky_relu.default self negative_slope")
def leaky_relu(x: Shape, slope: float) -> Shape:
    check_floats(x)
    return x


@rule_of(F.elu, "elu.default self alpha")
def elu(x: Shape, alpha: float) -> Shape:
    check_floats(x)
    return x


@rule_of(F.celu, "celu.default self alpha")
def celu(x: Shape, alpha: float) -> Shape:
    check_floats(x)
    if not alpha:
        raise IntrafusionError("alpha of celu must not be 0")
    return x


@rule_of(F.softplus, "softplus.default self beta threshold")
def softplus(x: Shape, beta: float, threshold: float) -> Shape:
    check_floats(x)
    if not beta:
        raise IntrafusionError("beta of softplus must not be 0")
    return x


@rule_of(F.prelu, "prelu.default self weight", "_prelu_kernel.default self weight")
def prelu(x: Shape, weight: Shape) -> Shape:
    check_floats(x)
    if weight.sizes != (1,):
        check_shape(weight, x.sizes[1] if len(x.sizes) > 1 else 1)
    check_floats(weight)
    return x


def _binary(name: str, run: Callable[..., Any], *calls: str) -> None:
    def rule(first: Shape | float, second: Shape | float) -> Shape:
        shapes = [one for one in (first, second) if isinstance(one, Shape)]
        if not shapes:
            raise IntrafusionError(f"{name} needs a tensor, not two numbers")
        masks = [one for one in shapes if one.dtype == torch.bool] if name == "mul" else []
        check_floats(*(one for one in shapes if one not in masks or len(masks) == len(shapes)))
        return Shape(broadcast(*(one.sizes for one in shapes)))

    rule_of(run, *calls, name=name)(rule)


_binary("add", operator.add, "add.Scalar self other")
_binary("sub", operator.sub, "sub.Scalar self other", "rsub.Scalar other self", "rsub.Tensor other self")
_binary("mul", operator.mul, "mul.Tensor self other", "mul.Scalar self other")
_binary("div", operator.truediv, "div.Tensor self other", "div.Scalar self other")


@rule_of(torch.maximum, "maximum.default self other", name="maximum")
@rule_of(torch.minimum, "minimum.default self other", name="minimum")
def _extreme(first: Shape, second: Shape) -> Shape:
    check_floats(first, second)
    return Shape(broadcast(first.sizes, second.sizes))


@rule_of(torch.pow, "pow.Tensor_Scalar self exponent")
def pow_(x: Shape, exponent: float) -> Shape:
    check_floats(x)
    return x


def _check_mask(mask: Shape) -> None:
    if mask.dtype != torch.bool:
        raise IntrafusionError(f"a mask must be bool, not {mask.dtype}")


@rule_of(
    torch.where,
    "where.self condition self other",
    "where.ScalarOther condition self other",
    "where.ScalarSelf condition self other",
)
def where(mask: Shape, first: Shape | float, second: Shape | float) -> Shape:
    _check_mask(mask)
    shapes = [one for one in (first, second) if isinstance(one, Shape)]
    if not shapes:
        raise IntrafusionError("where needs a tensor, not two numbers")
    check_floats(*shapes)
    return Shape(broadcast(mask.sizes, *(one.sizes for one in shapes)))


@rule_of(torch.masked_fill, "masked_fill.Scalar self mask value")
def masked_fill(x: Shape, mask: Shape, value: float) -> Shape:
    _check_mask(mask)
    check_floats(x)
    if broadcast(x.sizes, mask.sizes) != x.sizes:
        raise IntrafusionError(f"a mask {mask} does not fit {x}")
    return x


def _comparison(x: Shape, number: float) -> Shape:
    check_floats(x)
    return Shape(x.sizes, torch.bool)


for _name in ("eq", "ne", "gt", "ge", "lt", "le"):
    rule_of(getattr(torch, _name), f"{_name}.Scalar self other", name=_name)(_comparison)
