"""The operators that a program may use: pure functions, each with a rule for the arguments it accepts and its output shapes.

A rule has the name and arguments of its operator. It is given shapes in place of tensors, and returns the shape of the result
or raises IntrafusionError. Its annotations are checked before it is called: an `int` is an integer within 2^40, a `float` is
any finite number, `Sizes` may grow with the batch, and `Literal` lists the accepted values.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.shapes import (
    Batch,
    Shape,
    Size,
    Sizes,
    at,
    broadcast,
    fitted,
    product,
    scaled,
    total,
    whole,
)

Ints = tuple[int, ...]
Pair = tuple[int, int]
Shapes = tuple[Shape, ...]
_SIDE = 1 << 16  # limit on kernels, strides, paddings and dilations


@dataclass(frozen=True)
class Made:
    """Output shapes and cost of a step. All of the costs may grow with the batch.

    work: numbers that it reads one by one, besides its arguments. macs: multiply-accumulates. beside: numbers that it keeps in
    memory while it runs.
    """

    shapes: Shapes
    macs: Size = 0
    work: Size = 0
    beside: Size = 0


@dataclass(frozen=True)
class Operator:
    """An operator. run: the function. rule: its shape rule. takes: the annotations of the rule's arguments, by name.

    several: whether it returns a list of tensors. views: whether its output may share memory with its input.
    """

    name: str
    run: Callable[..., Any]
    rule: Callable[..., Any]
    takes: Mapping[str, Any]
    several: bool
    views: bool

    def made(self, args: Sequence[Any]) -> Made:
        """Apply the rule to these arguments. Raises IntrafusionError if the operator does not accept them."""
        if len(args) != len(self.takes):
            raise IntrafusionError(f"{self.name} takes {len(self.takes)} arguments, not {len(args)}")
        for (name, hint), value in zip(self.takes.items(), args, strict=True):
            if not _fits(value, hint):
                raise IntrafusionError(f"{name} of {self.name} must not be {_told(value)}")
        made = self.rule(*args)
        return made if isinstance(made, Made) else Made((made,) if isinstance(made, Shape) else tuple(made))


OPERATORS: dict[str, Operator] = {}


def _fits(value: Any, hint: Any) -> bool:
    """Return whether an argument matches an annotation of a rule."""
    if hint is int:
        return type(value) is int and bool(whole(value) or True)
    if hint is float:
        finite = type(value) is float and abs(value) <= torch.finfo(torch.float32).max
        return finite or _fits(value, int)
    if hint is Batch:
        return isinstance(value, Batch) and whole(value.times) >= 1
    if hint in (bool, Shape, type(None)):
        return type(value) is hint
    if get_origin(hint) is Literal:
        return type(value) in (str, int) and value in get_args(hint)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        inner = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return type(value) is tuple and len(value) == len(inner) and all(map(_fits, value, inner))
    return any(_fits(value, one) for one in get_args(hint))


def _told(value: Any) -> str:
    return f"a tensor {value}" if isinstance(value, Shape) else str(value)[:60]


def _operator(run: Callable[..., Any], views: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an operator, with the decorated function as its rule."""

    def put(rule: Callable[..., Any]) -> Callable[..., Any]:
        name, takes = rule.__name__.rstrip("_"), get_type_hints(rule)
        several = takes.pop("return") == Shapes
        OPERATORS[name] = Operator(name, run, rule, takes, several, views)
        return rule

    return put


# -- helpers of the rules


def _floats(*shapes: Shape | None) -> None:
    for shape in shapes:
        if shape is not None and shape.dtype != torch.float32:
            raise IntrafusionError(f"it computes with {shape.dtype}; export the network in float32")


def _is(shape: Shape | None, *sizes: Size, what: str = "a weight") -> None:
    """Raise IntrafusionError if a tensor has another shape, or another dtype than float32."""
    _floats(shape)
    if shape is not None and shape.sizes != sizes:
        raise IntrafusionError(f"{what} must have shape {Shape(sizes)}, not {shape}")


def _images(x: Shape) -> None:
    _floats(x)
    if len(x.sizes) != 4 or not all(isinstance(size, int) for size in x.sizes[1:]):
        raise IntrafusionError(f"it needs feature maps (batch, channels, height, width), not {x}")


def axis(x: Shape, dim: int, more: int = 0) -> int:
    """Return the non-negative index of a dimension, which may count from the end. more: dimensions still to be added."""
    rank = len(x.sizes) + more
    if not -rank <= dim < rank:
        raise IntrafusionError(f"dimension {dim} is out of range for {x}")
    return dim % rank


def _axes(x: Shape, dims: Ints) -> set[int]:
    found = {axis(x, dim) for dim in dims}
    if len(found) != len(dims) or not dims:
        raise IntrafusionError(f"dimensions {dims} are invalid for {x}")
    return found


def _fixed(x: Shape, dim: int) -> tuple[int, int]:
    """Return the index of a dimension and its size. Raises IntrafusionError if the size grows with the batch."""
    place = axis(x, dim)
    size = x.sizes[place]
    if isinstance(size, Batch):
        raise IntrafusionError(f"it splits {x} along the batch, which is not supported")
    return place, size


def _with(x: Shape, place: int, *sizes: Size) -> Shape:
    return x.of(*x.sizes[:place], *sizes, *x.sizes[place + 1 :])


def _between(name: str, low: int, *numbers: int) -> None:
    if not all(low <= one <= _SIDE for one in numbers):
        raise IntrafusionError(f"the {name} {str(numbers)[:60]} is out of range")


def _window(name: str, size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool = False) -> int:
    """Return how many windows fit along one side."""
    free = size + 2 * padding - dilation * (kernel - 1) - 1
    if free < 0:
        raise IntrafusionError(f"a {name} of {kernel} pixels is too large for a side of {size}")
    count = (free + (stride - 1 if ceil else 0)) // stride + 1
    return count - (ceil and (count - 1) * stride >= size + padding)


# -- elementwise


def _elementwise(name: str, run: Callable[..., Any]) -> None:
    def rule(x: Shape) -> Shape:
        _floats(x)
        return x

    rule.__name__ = name
    _operator(run)(rule)


_SINGLE: dict[str, Callable[..., Any]] = {
    "relu": F.relu, "relu6": F.relu6, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": F.silu, "mish": F.mish,
    "selu": F.selu, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "log_sigmoid": F.logsigmoid,
    "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "abs": torch.abs, "neg": torch.neg,
    "reciprocal": torch.reciprocal, "square": torch.square, "erf": torch.erf, "clone": torch.clone,
}  # fmt: skip
for _name, _run in _SINGLE.items():
    _elementwise(_name, _run)


@_operator(lambda x, form: F.gelu(x, approximate=form))
def gelu(x: Shape, form: Literal["none", "tanh"]) -> Shape:
    _floats(x)
    return x


@_operator(F.hardtanh)
def hardtanh(x: Shape, low: float, high: float) -> Shape:
    _floats(x)
    if low > high:
        raise IntrafusionError(f"it clamps between {low} and {high}, which is an empty range")
    return x


@_operator(torch.clamp)
def clamp(x: Shape, low: float | None, high: float | None) -> Shape:
    _floats(x)
    if low is None and high is None:
        raise IntrafusionError("it clamps without bounds")
    return x


@_operator(F.leaky_relu)
def leaky_relu(x: Shape, slope: float) -> Shape:
    _floats(x)
    return x


@_operator(F.elu)
def elu(x: Shape, alpha: float) -> Shape:
    _floats(x)
    return x


@_operator(F.celu)
def celu(x: Shape, alpha: float) -> Shape:
    _floats(x)
    if not alpha:
        raise IntrafusionError("alpha of celu must not be 0")
    return x


@_operator(F.softplus)
def softplus(x: Shape, beta: float, threshold: float) -> Shape:
    _floats(x)
    if not beta:
        raise IntrafusionError("beta of softplus must not be 0")
    return x


@_operator(F.prelu)
def prelu(x: Shape, weight: Shape) -> Shape:
    _floats(x)
    if weight.sizes != (1,):
        _is(weight, x.sizes[1] if len(x.sizes) > 1 else 1)
    _floats(weight)
    return x


def _binary(name: str, run: Callable[..., Any]) -> None:
    def rule(first: Shape | float, second: Shape | float) -> Shape:
        shapes = [one for one in (first, second) if isinstance(one, Shape)]
        if not shapes:
            raise IntrafusionError(f"{name} needs a tensor, not two numbers")
        masks = [one for one in shapes if one.dtype == torch.bool] if name == "mul" else []
        _floats(*(one for one in shapes if one not in masks or len(masks) == len(shapes)))
        return Shape(broadcast(*(one.sizes for one in shapes)))

    rule.__name__ = name
    _operator(run)(rule)


for _name, _run in {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}.items():
    _binary(_name, _run)


def _extreme(name: str, run: Callable[..., Any]) -> None:
    def rule(first: Shape, second: Shape) -> Shape:
        _floats(first, second)
        return Shape(broadcast(first.sizes, second.sizes))

    rule.__name__ = name
    _operator(run)(rule)


_extreme("maximum", torch.maximum)
_extreme("minimum", torch.minimum)


@_operator(torch.pow)
def pow_(x: Shape, exponent: float) -> Shape:
    _floats(x)
    return x


@_operator(torch.where)
def where(mask: Shape, first: Shape | float, second: Shape | float) -> Shape:
    _masks(mask)
    shapes = [one for one in (first, second) if isinstance(one, Shape)]
    if not shapes:
        raise IntrafusionError("where needs a tensor, not two numbers")
    _floats(*shapes)
    return Shape(broadcast(mask.sizes, *(one.sizes for one in shapes)))


@_operator(torch.masked_fill)
def masked_fill(x: Shape, mask: Shape, value: float) -> Shape:
    _masks(mask)
    _floats(x)
    if broadcast(x.sizes, mask.sizes) != x.sizes:
        raise IntrafusionError(f"a mask {mask} does not fit {x}")
    return x


def _comparison(name: str, run: Callable[..., Any]) -> None:
    def rule(x: Shape, number: float) -> Shape:
        _floats(x)
        return Shape(x.sizes, torch.bool)

    rule.__name__ = name
    _operator(run)(rule)


for _name in ("eq", "ne", "gt", "ge", "lt", "le"):
    _comparison(_name, getattr(torch, _name))


def _masks(mask: Shape) -> None:
    if mask.dtype != torch.bool:
        raise IntrafusionError(f"a mask must be bool, not {mask.dtype}")


# -- layers, as functions


def convolved(
    x: Shape, weight: Shape, bias: Shape | None, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> Made:
    """Rule of a convolution: (B, C, H, W) and weight (C', C / groups, h, w) -> (B, C', H', W')."""
    _images(x)
    _floats(weight)
    _between("stride", 1, *stride)
    _between("dilation", 1, *dilation)
    batch, channels, *sides = x.sizes
    if len(weight.sizes) != 4 or not all(isinstance(size, int) for size in weight.sizes):
        raise IntrafusionError(f"the weight of a convolution must have 4 fixed dimensions, not {weight}")
    outputs, inputs, *kernel = (size for size in weight.sizes if isinstance(size, int))
    if groups < 1 or outputs % groups or inputs * groups != channels:
        raise IntrafusionError(f"a convolution of {channels} channels does not fit the weight {weight} in {groups} groups")
    _is(bias, outputs, what="a bias")
    _between("kernel", 1, *kernel)
    if padding == "same" and stride != (1, 1):
        raise IntrafusionError("a convolution with padding 'same' must have stride 1")
    numbers = (0, 0) if isinstance(padding, str) else padding
    _between("padding", 0, *numbers)
    made = sides if padding == "same" else map(_window_of_kernel, sides, kernel, stride, numbers, dilation)
    shape = Shape((batch, outputs, *made))
    columns = scaled(product((batch, *shape.sizes[2:])), inputs * math.prod(kernel))
    return Made((shape,), scaled(product(shape.sizes), inputs * math.prod(kernel)), beside=total_of(columns, product(x.sizes)))


def total_of(first: Size, second: Size) -> Size:
    """Return the sum of two counts. If only one grows with the batch, return an upper bound that counts the other per image."""
    if isinstance(first, Batch) == isinstance(second, Batch):
        return total(first, second)
    return Batch(whole(at(first, 1) + at(second, 1)))


def _window_of_kernel(size: Size, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return _window("convolution", at(size, 1), kernel, stride, padding, dilation)


@_operator(F.conv2d)
def conv2d(
    x: Shape,
    weight: Shape,
    bias: Shape | None,
    stride: Pair,
    padding: Pair | Literal["same", "valid"],
    dilation: Pair,
    groups: int,
) -> Made:
    return convolved(x, weight, bias, stride, padding, dilation, groups)


@_operator(F.linear)
def linear(x: Shape, weight: Shape, bias: Shape | None) -> Made:
    _floats(x)
    if len(weight.sizes) != 2 or not x.sizes:
        raise IntrafusionError(f"the weight of a linear layer must have 2 dimensions, not {weight}")
    outputs, inputs = weight.sizes
    _is(weight, outputs, x.sizes[-1])
    _is(bias, outputs, what="a bias")
    shape = Shape((*x.sizes[:-1], outputs))
    return Made((shape,), scaled(product(shape.sizes), inputs))


def normed(x: Shape, channels: int, ranks: tuple[int, ...]) -> Shape:
    """Rule of a batch norm with `channels` channels, for inputs with one of these numbers of dimensions."""
    _floats(x)
    if len(x.sizes) not in ranks or x.sizes[1] != channels:
        raise IntrafusionError(f"statistics of {channels} channels do not fit {x}")
    return x


@_operator(F.layer_norm)
def layer_norm(x: Shape, sizes: Ints, weight: Shape | None, bias: Shape | None, eps: float) -> Shape:
    _floats(x)
    if not sizes or len(sizes) > len(x.sizes) or x.sizes[len(x.sizes) - len(sizes) :] != sizes:
        raise IntrafusionError(f"it cannot normalise {x} over {sizes}")
    _is(weight, *sizes)
    _is(bias, *sizes, what="a bias")
    return x


@_operator(F.group_norm)
def group_norm(x: Shape, groups: int, weight: Shape | None, bias: Shape | None, eps: float) -> Shape:
    _floats(x)
    if len(x.sizes) < 2 or groups < 1 or not isinstance(x.sizes[1], int) or x.sizes[1] % groups:
        raise IntrafusionError(f"it cannot normalise {x} in {groups} groups")
    _is(weight, x.sizes[1])
    _is(bias, x.sizes[1], what="a bias")
    return x


def _product(first: Shape, second: Shape) -> Made:
    """Rule of a matrix product with broadcast batch dimensions: (..., n, m) and (..., m, k) -> (..., n, k)."""
    _floats(first, second)
    if len(first.sizes) < 2 or len(second.sizes) < 2 or first.sizes[-1] != second.sizes[-2]:
        raise IntrafusionError(f"it cannot multiply {first} by {second}")
    stack = broadcast(first.sizes[:-2], second.sizes[:-2])
    shape = Shape((*stack, first.sizes[-2], second.sizes[-1]))
    copies = total_of(product((*stack, *first.sizes[-2:])), product((*stack, *second.sizes[-2:])))
    return Made((shape,), scaled(product(shape.sizes), first.sizes[-1]), beside=copies)


@_operator(torch.matmul)
def matmul(first: Shape, second: Shape) -> Made:
    return _product(first, second)


@_operator(lambda query, key, value, mask, scale: F.scaled_dot_product_attention(query, key, value, mask, scale=scale))
def attention(query: Shape, key: Shape, value: Shape, mask: Shape | None, scale: float | None) -> Made:
    _floats(query, key, value)
    ranks = {len(one.sizes) for one in (query, key, value)}
    if ranks not in ({3}, {4}) or key.sizes[:-1] != value.sizes[:-1] or query.sizes[:-2] != key.sizes[:-2]:
        raise IntrafusionError(f"attention cannot combine query {query}, key {key} and value {value}")
    scores = _product(query, Shape((*key.sizes[:-2], key.sizes[-1], key.sizes[-2])))
    made = _product(scores.shapes[0], value)
    if mask is not None:
        if mask.dtype != torch.bool:
            _floats(mask)
        if broadcast(scores.shapes[0].sizes, mask.sizes) != scores.shapes[0].sizes:
            raise IntrafusionError(f"a mask {mask} does not fit attention {scores.shapes[0]}")
    numbers = product(scores.shapes[0].sizes)
    return Made(made.shapes, total(scores.macs, made.macs), scaled(numbers, 2), scaled(numbers, 2))


# -- pooling and upsampling


def _pooled(x: Shape, sides: Sequence[int], window: int) -> Made:
    shape = Shape((*x.sizes[:2], *sides))
    return Made((shape,), work=scaled(product(shape.sizes), window), beside=scaled(product(shape.sizes), 2))


@_operator(lambda x, kernel, stride, padding, dilation, ceil: F.max_pool2d(x, kernel, stride, padding, dilation, ceil))
def max_pool2d(x: Shape, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil: bool) -> Made:
    return _in_windows(x, kernel, stride, padding, dilation, ceil)


@_operator(F.avg_pool2d)
def avg_pool2d(x: Shape, kernel: Pair, stride: Pair, padding: Pair, ceil: bool, count_padding: bool) -> Made:
    return _in_windows(x, kernel, stride, padding, (1, 1), ceil)


def _in_windows(x: Shape, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil: bool) -> Made:
    _images(x)
    _between("kernel", 1, *kernel)
    _between("stride", 1, *stride)
    _between("dilation", 1, *dilation)
    _between("padding", 0, *padding)
    if any(2 * pad > side for pad, side in zip(padding, kernel, strict=True)):
        raise IntrafusionError(f"padding {padding} is more than half of the pooling window {kernel}")
    sides = [at(size, 1) for size in x.sizes[2:]]
    numbers = zip(sides, kernel, stride, padding, dilation, strict=True)
    return _pooled(x, [_window("pool", *one, ceil) for one in numbers], math.prod(kernel))


def _adaptive(x: Shape, sides: Pair) -> Made:
    _images(x)
    _between("pool", 1, *sides)
    window = math.prod(-(-at(size, 1) // side) + 1 for size, side in zip(x.sizes[2:], sides, strict=True))
    return _pooled(x, sides, window)


@_operator(F.adaptive_avg_pool2d)
def adaptive_avg_pool2d(x: Shape, sides: Pair) -> Made:
    return _adaptive(x, sides)


@_operator(F.adaptive_max_pool2d)
def adaptive_max_pool2d(x: Shape, sides: Pair) -> Made:
    return _adaptive(x, sides)


@_operator(lambda x, sides: F.interpolate(x, sides, mode="nearest"))
def upsample_nearest(x: Shape, sides: Pair) -> Made:
    _images(x)
    _between("side", 1, *sides)
    return _pooled(x, sides, 1)


@_operator(lambda x, sides, corners: F.interpolate(x, sides, mode="bilinear", align_corners=corners))
def upsample_bilinear(x: Shape, sides: Pair, corners: bool) -> Made:
    _images(x)
    _between("side", 1, *sides)
    return _pooled(x, sides, 4)


# -- reductions


def _reduced(x: Shape, dims: Ints, keep: bool) -> Shape:
    _floats(x)
    gone = _axes(x, dims)
    if any(isinstance(x.sizes[place], Batch) for place in gone):
        raise IntrafusionError(f"it sums {x} over the batch, which is not supported")
    return Shape(tuple(1 if place in gone else size for place, size in enumerate(x.sizes) if keep or place not in gone))


def _reduction(name: str, run: Callable[..., Any]) -> None:
    def rule(x: Shape, dims: Ints, keep: bool) -> Shape:
        return _reduced(x, dims, keep)

    rule.__name__ = name
    _operator(run)(rule)


_SUMS: dict[str, Callable[..., Any]] = {"mean": torch.mean, "sum": torch.sum, "amax": torch.amax, "amin": torch.amin}
for _name, _run in _SUMS.items():
    _reduction(_name, _run)


@_operator(lambda x, dims, correction, keep: torch.var(x, dims, correction=correction, keepdim=keep))
def var(x: Shape, dims: Ints, correction: Literal[0, 1], keep: bool) -> Shape:
    return _reduced(x, dims, keep)


@_operator(lambda x, dims, keep: torch.linalg.vector_norm(x, 2, dims, keep))
def norm(x: Shape, dims: Ints, keep: bool) -> Shape:
    return _reduced(x, dims, keep)


def _shares(name: str, run: Callable[..., Any]) -> None:
    def rule(x: Shape, dim: int) -> Shape:
        _floats(x)
        _fixed(x, dim)
        return x

    rule.__name__ = name
    _operator(run)(rule)


_shares("softmax", F.softmax)
_shares("log_softmax", F.log_softmax)


# -- reshaping and reordering


@_operator(torch.reshape, views=True)
def reshape(x: Shape, sizes: Sizes) -> Shape:
    return x.of(*fitted(x, sizes))


@_operator(torch.flatten, views=True)
def flatten(x: Shape, start: Literal[1]) -> Shape:
    if len(x.sizes) < 2:
        raise IntrafusionError(f"it cannot flatten {x}")
    return x.of(x.sizes[0], product(x.sizes[1:]))


@_operator(torch.permute, views=True)
def permute(x: Shape, dims: Ints) -> Shape:
    if len(_axes(x, dims)) != len(x.sizes):
        raise IntrafusionError(f"it cannot permute {x} as {dims}")
    return x.of(*(x.sizes[dim] for dim in dims))


@_operator(torch.transpose, views=True)
def transpose(x: Shape, first: int, second: int) -> Shape:
    order = list(range(len(x.sizes)))
    one, other = axis(x, first), axis(x, second)
    order[one], order[other] = other, one
    return x.of(*(x.sizes[place] for place in order))


@_operator(torch.unsqueeze, views=True)
def unsqueeze(x: Shape, dim: int) -> Shape:
    place = axis(x, dim, more=1)
    return x.of(*x.sizes[:place], 1, *x.sizes[place:])


@_operator(torch.squeeze, views=True)
def squeeze(x: Shape, dim: int) -> Shape:
    place, size = _fixed(x, dim)
    return _with(x, place, *(() if size == 1 else (size,)))


@_operator(lambda x, sizes: x.expand(sizes), views=True)
def expand(x: Shape, sizes: Sizes) -> Shape:
    before = (1,) * (len(sizes) - len(x.sizes)) + x.sizes
    told = tuple(size if new == -1 else new for size, new in zip(before, sizes, strict=False))
    if len(sizes) < len(x.sizes) or broadcast(before, told) != told or -1 in sizes[: len(sizes) - len(x.sizes)]:
        raise IntrafusionError(f"it cannot expand {x} to ({', '.join(map(str, sizes))})")
    return x.of(*told)


@_operator(lambda x, times: x.repeat(times))
def repeat(x: Shape, times: Sizes) -> Shape:
    if len(times) < len(x.sizes):
        raise IntrafusionError(f"it cannot repeat {x} ({', '.join(map(str, times))}) times")
    return Shape(tuple(map(scaled, (1,) * (len(times) - len(x.sizes)) + x.sizes, times)), x.dtype)


@_operator(torch.cat)
def cat(tensors: Shapes, dim: int) -> Shape:
    if not tensors:
        raise IntrafusionError("it concatenates no tensors")
    first = tensors[0]
    _floats(*tensors)
    place, length = axis(first, dim), 0  # type: int, Size
    for one in tensors:
        if len(one.sizes) != len(first.sizes) or _with(one, place) != _with(first, place):
            raise IntrafusionError(f"it cannot concatenate {first} and {one}")
        length = total(length, one.sizes[place])
    return _with(first, place, length)


@_operator(torch.stack)
def stack(tensors: Shapes, dim: int) -> Shape:
    if not tensors or any((one.sizes, one.dtype) != (tensors[0].sizes, tensors[0].dtype) for one in tensors):
        raise IntrafusionError("it stacks tensors of different shapes")
    place = axis(tensors[0], dim, more=1)
    sizes = tensors[0].sizes
    return Shape((*sizes[:place], len(tensors), *sizes[place:]), tensors[0].dtype)


@_operator(torch.split, views=True)
def split(x: Shape, lengths: Ints, dim: int) -> Shapes:
    place, size = _fixed(x, dim)
    if sum(lengths) != size or any(length < 1 for length in lengths):
        raise IntrafusionError(f"it cannot split {x} into parts of {str(lengths)[:60]}")
    return tuple(_with(x, place, length) for length in lengths)


@_operator(torch.chunk, views=True)
def chunk(x: Shape, count: int, dim: int) -> Shapes:
    place, size = _fixed(x, dim)
    if not 1 <= count <= size:
        raise IntrafusionError(f"it cannot split {x} into {count} parts")
    length = -(-size // count)
    return tuple(_with(x, place, min(length, size - start)) for start in range(0, size, length))


@_operator(torch.unbind, views=True)
def unbind(x: Shape, dim: int) -> Shapes:
    place, size = _fixed(x, dim)
    return (_with(x, place),) * size if size <= _SIDE else _refused(f"it cannot unbind {x}")


def _refused(why: str) -> Any:
    raise IntrafusionError(why)


@_operator(torch.select, views=True)
def select(x: Shape, dim: int, index: int) -> Shape:
    place, size = _fixed(x, dim)
    if not -size <= index < size:
        raise IntrafusionError(f"index {index} is out of range for {x}")
    return _with(x, place)


@_operator(lambda x, dim, start, stop, step: x[(slice(None),) * dim + (slice(start, stop, step),)], views=True)
def slice_(x: Shape, dim: int, start: int, stop: int, step: int) -> Shape:
    place, size = _fixed(x, dim)
    if dim != place or not 0 <= start < stop <= size or step < 1:
        raise IntrafusionError(f"the slice {start} to {stop} is out of range for {x}")
    return _with(x, place, -(-(stop - start) // step))


@_operator(torch.roll)
def roll(x: Shape, shifts: Ints, dims: Ints) -> Shape:
    if len(shifts) != len(dims) or any(isinstance(x.sizes[place], Batch) for place in _axes(x, dims)):
        raise IntrafusionError(f"it cannot roll {x} by {shifts} along {dims}, which include the batch or do not match")
    return Shape(x.sizes, x.dtype)


@_operator(torch.flip)
def flip(x: Shape, dims: Ints) -> Shape:
    if any(isinstance(x.sizes[place], Batch) for place in _axes(x, dims)):
        raise IntrafusionError(f"it flips {x} along the batch, which is not supported")
    return Shape(x.sizes, x.dtype)


@_operator(lambda x, around, value: F.pad(x, around, value=value))
def pad(x: Shape, around: Ints, value: float) -> Shape:
    _floats(x)
    return _padded(x, around)


@_operator(lambda x, around, mode: F.pad(x, around, mode=mode))
def pad_as(x: Shape, around: Ints, mode: Literal["reflect", "replicate", "circular"]) -> Shape:
    _images(x)
    _between("padding", 0, *around)
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
            place, size = _fixed(x, -1 - one)
            if before < -size or after < -size:
                raise IntrafusionError(f"it cannot pad {x} by {str(around)[:60]}")
            x = _with(x, place, size + before + after)
    return Shape(x.sizes, x.dtype)


@_operator(F.channel_shuffle)
def channel_shuffle(x: Shape, groups: int) -> Shape:
    _images(x)
    if groups < 1 or at(x.sizes[1], 1) % groups:
        raise IntrafusionError(f"it cannot shuffle {x} in {groups} groups")
    return x


@_operator(F.pixel_shuffle)
def pixel_shuffle(x: Shape, factor: int) -> Shape:
    _images(x)
    batch, channels, height, width = x.sizes
    if not 1 <= factor <= _SIDE or at(channels, 1) % factor**2:
        raise IntrafusionError(f"it cannot shuffle {x} by {factor}")
    return Shape((batch, at(channels, 1) // factor**2, scaled(height, factor), scaled(width, factor)))


@_operator(F.pixel_unshuffle)
def pixel_unshuffle(x: Shape, factor: int) -> Shape:
    _images(x)
    batch, channels, height, width = (x.sizes[0], *(at(size, 1) for size in x.sizes[1:]))
    if not 1 <= factor <= _SIDE or height % factor or width % factor:
        raise IntrafusionError(f"it cannot shuffle {x} by {factor}")
    return Shape((batch, channels * factor**2, height // factor, width // factor))


@_operator(lambda x, sizes, value: x.new_full(sizes, value))
def full(x: Shape, sizes: Sizes, value: float) -> Shape:
    _floats(x)
    return Shape(sizes)


# -- indices, which are constants of the file


def _indices(index: Shape, size: Size) -> None:
    if index.dtype != torch.int64 or index.least is None or index.most is None:
        raise IntrafusionError("its indices must be integers stored in the file")
    if isinstance(size, Batch) or index.least < 0 or index.most >= size:
        raise IntrafusionError(f"indices from {index.least} to {index.most} are out of range for size {size}")


@_operator(lambda x, index: x[index])
def index(x: Shape, index: Shape) -> Shape:
    if not x.sizes:
        raise IntrafusionError("it cannot index a single number")
    _indices(index, x.sizes[0])
    return Shape((*index.sizes, *x.sizes[1:]), x.dtype)


@_operator(torch.index_select)
def index_select(x: Shape, dim: int, index: Shape) -> Shape:
    place = axis(x, dim)
    _indices(index, x.sizes[place])
    if len(index.sizes) != 1:
        raise IntrafusionError(f"indices must have one dimension, not {index}")
    return _with(x, place, *index.sizes)
