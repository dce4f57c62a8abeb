"""Operators on maps (batch, channels, height, width) that slide windows: convolution, pooling and upsampling."""

import math
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.operators.checks import check_between, check_floats, check_images, check_shape
from intrafusion.models.exported_program.operators.table import Pair, StepOutput, rule_of
from intrafusion.models.exported_program.shapes import Shape, Size, at, numel, scaled, total_of


@rule_of(F.conv2d)
def conv2d(
    x: Shape,
    weight: Shape,
    bias: Shape | None,
    stride: Pair,
    padding: Pair | Literal["same", "valid"],
    dilation: Pair,
    groups: int,
) -> StepOutput:
    """(B, C, H, W) and weight (C', C / groups, h, w) -> (B, C', H', W')."""
    check_images(x)
    check_floats(weight)
    check_between("stride", 1, *stride)
    check_between("dilation", 1, *dilation)
    batch, channels, *sides = x.sizes
    if len(weight.sizes) != 4 or not all(isinstance(size, int) for size in weight.sizes):
        raise IntrafusionError(f"the weight of a convolution must have 4 fixed dimensions, not {weight}")
    outputs, inputs, *kernel = (size for size in weight.sizes if isinstance(size, int))
    if groups < 1 or outputs % groups or inputs * groups != channels:
        raise IntrafusionError(f"a convolution of {channels} channels does not fit the weight {weight} in {groups} groups")
    check_shape(bias, outputs, what="a bias")
    check_between("kernel", 1, *kernel)
    if padding == "same" and stride != (1, 1):
        raise IntrafusionError("a convolution with padding 'same' must have stride 1")
    numbers = (0, 0) if isinstance(padding, str) else padding
    check_between("padding", 0, *numbers)
    made = sides if padding == "same" else map(_window_of_kernel, sides, kernel, stride, numbers, dilation)
    shape = Shape((batch, outputs, *made))
    columns = scaled(numel((batch, *shape.sizes[2:])), inputs * math.prod(kernel))
    return StepOutput(
        (shape,), scaled(numel(shape.sizes), inputs * math.prod(kernel)), beside=total_of(columns, numel(x.sizes))
    )


def _window(name: str, size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool = False) -> int:
    """Return how many windows fit along one side."""
    free = size + 2 * padding - dilation * (kernel - 1) - 1
    if free < 0:
        raise IntrafusionError(f"a {name} of {kernel} pixels is too large for a side of {size}")
    count = (free + (stride - 1 if ceil else 0)) // stride + 1
    return count - (ceil and (count - 1) * stride >= size + padding)


def _window_of_kernel(size: Size, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return _window("convolution", at(size, 1), kernel, stride, padding, dilation)


def _pooled(x: Shape, sides: Sequence[int], window: int) -> StepOutput:
    shape = Shape((*x.sizes[:2], *sides))
    return StepOutput((shape,), work=scaled(numel(shape.sizes), window), beside=scaled(numel(shape.sizes), 2))


@rule_of(
    lambda x, kernel, stride, padding, dilation, ceil: F.max_pool2d(x, kernel, stride, padding, dilation, ceil),
    name="max_pool2d",
)
def _in_windows(x: Shape, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil: bool) -> StepOutput:
    check_images(x)
    check_between("kernel", 1, *kernel)
    check_between("stride", 1, *stride)
    check_between("dilation", 1, *dilation)
    check_between("padding", 0, *padding)
    if any(2 * pad > side for pad, side in zip(padding, kernel, strict=True)):
        raise IntrafusionError(f"padding {padding} is more than half of the pooling window {kernel}")
    sides = [at(size, 1) for size in x.sizes[2:]]
    numbers = zip(sides, kernel, stride, padding, dilation, strict=True)
    return _pooled(x, [_window("pool", *one, ceil) for one in numbers], math.prod(kernel))


@rule_of(F.avg_pool2d)
def avg_pool2d(x: Shape, kernel: Pair, stride: Pair, padding: Pair, ceil: bool, count_padding: bool) -> StepOutput:
    return _in_windows(x, kernel, stride, padding, (1, 1), ceil)


@rule_of(
    F.adaptive_avg_pool2d,
    "adaptive_avg_pool2d.default self output_size",
    "_adaptive_avg_pool2d.default self output_size",
    name="adaptive_avg_pool2d",
)
@rule_of(F.adaptive_max_pool2d, "adaptive_max_pool2d.default self output_size", name="adaptive_max_pool2d")
def _adaptive(x: Shape, sides: Pair) -> StepOutput:
    check_images(x)
    check_between("pool", 1, *sides)
    window = math.prod(-(-at(size, 1) // side) + 1 for size, side in zip(x.sizes[2:], sides, strict=True))
    return _pooled(x, sides, window)


@rule_of(lambda x, sides: F.interpolate(x, sides, mode="nearest"), "upsample_nearest2d.default self output_size")
def upsample_nearest(x: Shape, sides: Pair) -> StepOutput:
    check_images(x)
    check_between("side", 1, *sides)
    return _pooled(x, sides, 1)


@rule_of(
    lambda x, sides, corners: F.interpolate(x, sides, mode="bilinear", align_corners=corners),
    "upsample_bilinear2d.default self output_size align_corners",
)
def upsample_bilinear(x: Shape, sides: Pair, corners: bool) -> StepOutput:
    check_images(x)
    check_between("side", 1, *sides)
    return _pooled(x, sides, 4)
