"""The table of operators: each has a rule that tells what it makes, for any number of images, and refuses what does not fit."""

import json
import os
import re
import resource
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from places import TESTS
from torch import Tensor

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.operators import OPERATORS
from intrafusion.models.exported_program.shapes import (
    Batch,
    Shape,
    at,
    broadcast,
    divided,
    fitted,
    numel,
    remainder,
    total,
)

B = Batch(1)
MAPS = Shape((B, 4, 6, 6))
ROWS = Shape((B, 6, 8))
MASK = Shape((6, 8), torch.bool)
ROW, INDEX = Shape((8,)), Shape((3,), torch.int64, 0, 2)

# name -> arguments, what it makes of them (one shape, or several), and the same by another way, where that says more
CASES: dict[str, tuple[tuple[Any, ...], Any, Any]] = {
    **dict.fromkeys(("relu", "relu6", "sigmoid", "tanh", "silu", "mish", "selu", "hardswish", "hardsigmoid",
        "log_sigmoid", "exp", "log", "sqrt", "rsqrt", "abs", "neg", "reciprocal", "square", "erf", "clone"), ((ROWS,),
            ROWS, None)),
    "gelu": ((ROWS, "tanh"), ROWS, lambda x, form: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))),
    "hardtanh": ((ROWS, -0.5, 0.25), ROWS, lambda x, low, high: x.clip(low, high)),
    "clamp": ((ROWS, None, 0.25), ROWS, lambda x, low, high: torch.where(x > high, high, x)),
    "leaky_relu": ((ROWS, 0.1), ROWS, lambda x, slope: torch.where(x > 0, x, slope * x)),
    "elu": ((ROWS, 2.0), ROWS, lambda x, alpha: torch.where(x > 0, x, alpha * x.expm1())),
    "celu": ((ROWS, 2.0), ROWS, lambda x, alpha: torch.where(x > 0, x, alpha * (x / alpha).expm1())),
    "softplus": ((ROWS, 2.0, 20.0), ROWS, lambda x, beta, threshold: (1 + (beta * x).exp()).log() / beta),
    "eq": ((ROWS, 0.5), Shape((B, 6, 8), torch.bool), lambda x, n: ~((x < n) | (x > n))),
    "ne": ((ROWS, 0.5), Shape((B, 6, 8), torch.bool), lambda x, n: (x < n) | (x > n)),
    "gt": ((ROWS, 0.5), Shape((B, 6, 8), torch.bool), lambda x, n: ~(x <= n)),
    "ge": ((ROWS, 0.5), Shape((B, 6, 8), torch.bool), lambda x, n: ~(x < n)),
    "lt": ((ROWS, 0.5), Shape((B, 6, 8), torch.bool), lambda x, n: ~(x >= n)),
    "le": ((ROWS, 0.5), Shape((B, 6, 8), torch.bool), lambda x, n: ~(x > n)),
    "full": ((MAPS, (B, 3), -2), Shape((B, 3)), lambda x, s, v: -2 * torch.ones(s)),
    "prelu": ((MAPS, Shape((4,))), MAPS, lambda x, w: torch.where(x > 0, x, w[:, None, None] * x)),
    "add": ((ROWS, ROW), ROWS, lambda x, y: x - (-y)), "sub": ((1.0, ROWS), ROWS, lambda x, y: -y + x),
    "mul": ((ROWS, 3), ROWS, lambda x, y: x + x + x), "div": ((ROWS, ROW), ROWS, lambda x, y: x * y.reciprocal()),
    "maximum": ((ROWS, ROW), ROWS, lambda x, y: torch.where(x > y, x, y)),
    "minimum": ((ROWS, ROW), ROWS, lambda x, y: torch.where(x < y, x, y)),
    "pow": ((ROWS, 2), ROWS, lambda x, n: x * x), "where": ((MASK, ROWS, ROW), ROWS, lambda m, x, y: x * m + y * ~m),
    "masked_fill": ((ROWS, MASK, -1.0), ROWS, lambda x, m, v: x * ~m + v * m),
    "conv2d": (
        (MAPS, Shape((6, 2, 3, 3)), Shape((6,)), (2, 1), (1, 0), (1, 1), 2), Shape((B, 6, 3, 4)),
        lambda x, w, b, *_: torch.cat([
            F.conv2d(F.pad(part, (0, 0, 1, 1)), weight)[:, :, ::2] for part, weight in zip(x.chunk(2, 1), w.chunk(2),
                strict=True)
        ], 1) + b[:, None, None],
    ),
    "linear": ((ROWS, Shape((5, 8)), Shape((5,))), Shape((B, 6, 5)), lambda x, w, b: x @ w.T + b),
    "layer_norm": (
        (ROWS, (8,), ROW, ROW, 1e-5), ROWS,
        lambda x, s, w, b, e: (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + e).sqrt() * w + b,
    ),
    "group_norm": ((MAPS, 4, None, None, 1e-5), MAPS, lambda x, *_: F.instance_norm(x)),
    "matmul": ((ROWS, Shape((B, 8, 3))), Shape((B, 6, 3)), lambda x, y: (x[..., None] * y[:, None]).sum(2)),
    "attention": (
        (Shape((B, 2, 6, 8)), Shape((B, 2, 5, 8)), Shape((B, 2, 5, 3)), None, 0.5), Shape((B, 2, 6, 3)),
        lambda q, k, v, *_: (q @ k.mT * 0.5).softmax(-1) @ v,
    ),
    "max_pool2d": ((MAPS, (3, 2), (2, 2), (1, 0), (1, 1), True), Shape((B, 4, 4, 3)), None),
    "avg_pool2d": ((MAPS, (2, 2), (2, 2), (0, 0), False, True), Shape((B, 4, 3, 3)), lambda x, *_: F.adaptive_avg_pool2d(x, 3)),
    "adaptive_avg_pool2d": ((MAPS, (1, 1)), Shape((B, 4, 1, 1)), lambda x, s: x.mean((2, 3), keepdim=True)),
    "adaptive_max_pool2d": ((MAPS, (1, 1)), Shape((B, 4, 1, 1)), lambda x, s: x.amax((2, 3), keepdim=True)),
    "upsample_nearest": (
        (MAPS, (12, 12)), Shape((B, 4, 12, 12)), lambda x, s: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
    ),
    "upsample_bilinear": ((MAPS, (11, 11), True), Shape((B, 4, 11, 11)), None),
    "mean": ((ROWS, (-1,), True), Shape((B, 6, 1)), lambda x, *_: x.sum(2, keepdim=True) / 8),
    "sum": ((ROWS, (1, 2), False), Shape((B,)), lambda x, *_: x.flatten(1) @ torch.ones(48)),
    "amax": ((ROWS, (1,), False), Shape((B, 8)), lambda x, *_: x.max(1).values),
    "amin": ((ROWS, (1,), False), Shape((B, 8)), lambda x, *_: x.min(1).values),
    "var": ((ROWS, (2,), 1, False), Shape((B, 6)), lambda x, *_: ((x - x.mean(2, True)) ** 2).sum(2) / 7),
    "norm": ((ROWS, (2,), False), Shape((B, 6)), lambda x, *_: (x * x).sum(2).sqrt()),
    "softmax": ((ROWS, 1), ROWS, lambda x, d: x.exp() / x.exp().sum(1, keepdim=True)),
    "log_softmax": ((ROWS, 2), ROWS, lambda x, d: x - x.logsumexp(2, keepdim=True)),
    "reshape": ((ROWS, (Batch(2), 3, -1)), Shape((Batch(2), 3, 8)), None),
    "flatten": ((MAPS, 1), Shape((B, 144)), lambda x, s: x.reshape(len(x), 144)),
    "permute": ((ROWS, (2, 0, 1)), Shape((8, B, 6)), lambda x, d: torch.einsum("abc->cab", x)),
    "transpose": ((ROWS, 0, -1), Shape((8, 6, B)), lambda x, a, b: torch.einsum("abc->cba", x)),
    "unsqueeze": ((ROWS, -1), Shape((B, 6, 8, 1)), lambda x, d: x[..., None]),
    "squeeze": ((Shape((B, 1, 8)), 1), Shape((B, 8)), lambda x, d: x[:, 0]),
    "expand": ((ROW, (B, 6, -1)), ROWS, lambda x, s: torch.stack([torch.stack([x] * 6)] * s[0])),
    "repeat": ((ROW, (B, 2)), Shape((B, 16)), lambda x, t: torch.stack([torch.cat([x, x])] * t[0])),
    "cat": (((ROWS, ROWS), 0), Shape((Batch(2), 6, 8)), lambda xs, d: torch.stack(xs).flatten(0, 1)),
    "stack": (((ROWS, ROWS), 1), Shape((B, 2, 6, 8)), lambda xs, d: torch.cat([x[:, None] for x in xs], 1)),
    "split": ((ROWS, (2, 4), 1), [Shape((B, 2, 8)), Shape((B, 4, 8))], lambda x, *_: (x[:, :2], x[:, 2:])),
    "chunk": ((ROWS, 3, 2), [Shape((B, 6, 3)), Shape((B, 6, 3)), Shape((B, 6, 2))], None),
    "unbind": ((ROWS, 1), [Shape((B, 8))] * 6, lambda x, d: [x[:, place] for place in range(6)]),
    "select": ((ROWS, 1, -1), Shape((B, 8)), lambda x, *_: x[:, 5]),
    "slice": ((ROWS, 2, 1, 8, 3), Shape((B, 6, 3)), lambda x, *_: x[:, :, [1, 4, 7]]),
    "roll": ((ROWS, (-2,), (2,)), ROWS, lambda x, *_: torch.cat([x[:, :, 2:], x[:, :, :2]], 2)),
    "flip": ((ROWS, (1,)), ROWS, lambda x, d: x[:, [5, 4, 3, 2, 1, 0]]),
    "pad": ((ROWS, (1, -2), 0.5), Shape((B, 6, 7)), None),
    "pad_as": ((MAPS, (1, 0, 0, 0), "reflect"), Shape((B, 4, 6, 7)), lambda x, *_: torch.cat([x[..., 1:2], x], 3)),
    "channel_shuffle": ((MAPS, 2), MAPS, lambda x, g: x[:, [0, 2, 1, 3]]),
    "pixel_shuffle": ((MAPS, 2), Shape((B, 1, 12, 12)), None),
    "pixel_unshuffle": ((MAPS, 2), Shape((B, 16, 3, 3)), None),
    "index": ((Shape((4, 5)), INDEX), Shape((3, 5)), lambda x, i: torch.stack([x[one] for one in i.tolist()])),
    "index_select": ((ROWS, 1, INDEX), Shape((B, 3, 8)), lambda x, d, i: x[:, i]),
}  # fmt: skip


def real(given: Any, images: int, generator: torch.Generator) -> Any:
    """Numbers of a shape: positive floats, masks, or indices within bounds."""
    if isinstance(given, tuple):
        return tuple(real(one, images, generator) for one in given)
    if isinstance(given, Batch):
        return at(given, images)
    if not isinstance(given, Shape):
        return given
    sizes = [at(size, images) for size in given.sizes]
    if given.dtype == torch.int64:
        return torch.randint(given.least, given.most + 1, sizes, generator=generator)
    numbers = torch.rand(sizes, generator=generator)
    return numbers < 0.5 if given.dtype == torch.bool else numbers + 0.1


def _all_of(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else list(made)


# arguments with which an operator has nothing to do, and might hand back what it is given
IDLE: list[tuple[str, tuple[Any, ...]]] = [
    ("channel_shuffle", (MAPS, 1)),
    ("pixel_shuffle", (MAPS, 1)),
    ("pixel_unshuffle", (MAPS, 1)),
    ("pad", (MAPS, (0, 0), 0.0)),
    ("pad_as", (MAPS, (0, 0, 0, 0), "circular")),
    ("roll", (MAPS, (0,), (1,))),
    ("repeat", (ROW, (1,))),
    ("cat", ((ROWS,), 1)),
    ("pow", (ROWS, 1)),
    ("mul", (ROWS, 1)),
    ("upsample_nearest", (MAPS, (6, 6))),
    ("adaptive_avg_pool2d", (MAPS, (6, 6))),
    ("max_pool2d", (MAPS, (1, 1), (1, 1), (0, 0), (1, 1), False)),
    ("mean", (Shape((B, 1, 8)), (1,), False)),
]


@pytest.mark.parametrize(("name", "args"), IDLE)
def test_what_is_no_view_is_never_its_argument(name, args):
    numbers = real(args, 2, torch.Generator().manual_seed(0))
    first = numbers[0][0] if name == "cat" else numbers[0]
    assert not OPERATORS[name].views
    assert OPERATORS[name].run(*numbers).untyped_storage().data_ptr() != first.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_makes_what_its_rule_says(name):
    args, expected, otherwise = CASES[name]
    operator = OPERATORS[name]
    shapes = operator.made(args).shapes
    assert list(shapes) == (expected if isinstance(expected, list) else [expected])
    for images in (1, 2, 3):
        generator = torch.Generator().manual_seed(images)
        numbers = real(args, images, generator)
        tensors = [one for one in numbers if isinstance(one, Tensor)]
        before = [one.clone() for one in tensors]
        made = operator.run(*numbers)
        places = {one.untyped_storage().data_ptr() for one in tensors}
        assert operator.views or all(one.untyped_storage().data_ptr() not in places for one in _all_of(made))
        for one, shape in zip(made if operator.several else [made], shapes, strict=True):
            assert tuple(one.shape) == tuple(at(size, images) for size in shape.sizes)
            assert one.dtype == shape.dtype
        assert all(map(torch.equal, tensors, before))
        if otherwise is not None:
            torch.testing.assert_close(
                list(made) if operator.several else made, _listed(otherwise(*numbers)), rtol=1e-4, atol=1e-4
            )


def _listed(made: Any) -> Any:
    return made if isinstance(made, Tensor) else list(made)


@pytest.mark.parametrize(("name", "args"), [
    ("relu", (MASK,)), ("relu", (Shape((2,), torch.int64, 0, 1),)), ("relu", (ROWS, True)), ("relu", (3.0,)),
    ("gelu", (ROWS, "exact")), ("gelu", (ROWS, "%2000000000d")), ("hardtanh", (ROWS, 1.0, 0.0)), ("clamp", (ROWS, None, None)),
    ("clamp", (ROWS, float("nan"), None)), ("softplus", (ROWS, 0.0, 20.0)), ("celu", (ROWS, 0)), ("elu", (ROWS, float("inf"))),
    ("prelu", (MAPS, Shape((3,)))), ("add", (1.0, 2.0)), ("add", (ROWS, Shape((7,)))), ("add", (ROWS, Shape((3, 6, 8)))),
    ("add", (ROWS, 2**41)), ("add", (ROWS, "x")), ("div", (ROWS, True)), ("pow", (ROWS, 1e300)),
    ("masked_fill", (ROW, MASK, 0.0)),
    ("masked_fill", (ROWS, ROWS, 0.0)), ("where", (ROWS, ROWS, ROWS)),
    ("conv2d", (MAPS, Shape((6, 4, 3, 3)), Shape((5,)), (1, 1), (1, 1), (1, 1), 1)),
    ("conv2d", (MAPS, Shape((6, 4, 3, 3)), None, (0, 1), (1, 1), (1, 1), 1)),
    ("conv2d", (MAPS, Shape((6, 4, 9, 3)), None, (1, 1), (1, 1), (1, 1), 1)),
    ("conv2d", (MAPS, Shape((6, 2, 3, 3)), None, (1, 1), (1, 1), (1, 1), 3)),
    ("conv2d", (MAPS, Shape((6, 2, 3, 3)), None, (1, 1), (1, 1), (1, 1), -2)),
    ("conv2d", (MAPS, Shape((6, 4, 3, 3)), None, (1, 1), (-1, 1), (1, 1), 1)),
    ("conv2d", (MAPS, Shape((6, 4, 3, 3)), None, (2, 2), "same", (1, 1), 1)),
    ("conv2d", (MAPS, Shape((6, 4, 3, 3)), None, (1, 1), "full", (1, 1), 1)),
    ("conv2d", (Shape((3, 4, B, 6)), Shape((6, 4, 3, 3)), None, (1, 1), (1, 1), (1, 1), 1)),
    ("linear", (ROWS, Shape((5, 7)), None)), ("linear", (ROWS, Shape((5, 8)), Shape((1,)))),
    ("layer_norm", (ROWS, (6,), None, None, 1e-5)), ("layer_norm", (ROWS, (8,), Shape((7,)), None, 1e-5)),
    ("group_norm", (MAPS, 3, None, None, 1e-5)), ("group_norm", (MAPS, 0, None, None, 1e-5)),
    ("group_norm", (MAPS, 2, Shape((4,)), Shape((1,)), 1e-5)), ("matmul", (ROWS, ROWS)), ("matmul", (ROW, ROW)),
    ("attention", (ROWS, ROWS, Shape((B, 7, 8)), None, None)), ("attention", (ROWS, ROWS, ROWS, Shape((5, 6)), None)),
    ("max_pool2d", (MAPS, (3, 3), (1, 1), (2, 2), (1, 1), False)),
    ("max_pool2d", (MAPS, (3, 3), (0, 1), (1, 1), (1, 1), False)),
    ("avg_pool2d", (MAPS, (7, 7), (1, 1), (0, 0), False, True)), ("adaptive_avg_pool2d", (MAPS, (0, 1))),
    ("adaptive_avg_pool2d", (MAPS, (2**40, 1))), ("upsample_nearest", (MAPS, (2**20, 2**20))),
    ("mean", (ROWS, (0,), False)), ("mean", (ROWS, (1, 1), False)), ("mean", (ROWS, (3,), False)), ("sum", (ROWS, (), False)),
    ("var", (ROWS, (1,), 2, False)), ("softmax", (ROWS, 0)), ("softmax", (ROWS, 3)), ("reshape", (ROWS, (-1, -1))),
    ("reshape", (ROWS, (7, -1))), ("reshape", (ROWS, (B, 0, -1))), ("reshape", (ROWS, (-2, -24, B))),
    ("reshape", (ROWS, (B, 47))),
    ("reshape", (ROWS, (B, B, -1))), ("flatten", (ROWS, 0)), ("flatten", (ROW, 1)), ("permute", (ROWS, (0, 1))),
    ("permute", (ROWS, (0, 1, 1))), ("transpose", (ROWS, 0, 3)), ("unsqueeze", (ROWS, 4)), ("squeeze", (ROWS, 0)),
    ("expand", (ROWS, (3, 6, 8))), ("expand", (ROWS, (6, 8))), ("expand", (ROW, (-1, 8))), ("expand", (ROW, (0, 8))),
    ("expand", (ROW, (2**40, 2**40, 8))), ("repeat", (ROWS, (2,))), ("repeat", (ROWS, (1, 1, -1))),
    ("repeat", (ROWS, (B, 1, 1))),
    ("cat", ((), 0)), ("cat", ((ROWS, MAPS), 0)), ("cat", ((ROWS, Shape((1, 6, 8))), 0)),
    ("cat", ((ROWS, Shape((B, 5, 8))), 2)),
    ("stack", ((ROWS, ROW), 0)), ("split", (ROWS, (2, 2), 1)), ("split", (ROWS, (7, -1), 1)), ("split", (ROWS, (6, 0), 1)),
    ("chunk", (ROWS, 0, 1)), ("chunk", (ROWS, 2, 0)), ("unbind", (ROWS, 0)), ("select", (ROWS, 0, 0)), ("select", (ROWS, 1, 6)),
    ("select", (ROWS, 1, -7)), ("slice", (ROWS, 0, 0, 1, 1)), ("slice", (ROWS, 1, 3, 3, 1)), ("slice", (ROWS, 1, 0, 7, 1)),
    ("slice", (ROWS, 1, 0, 6, 0)), ("slice", (ROWS, -2, 0, 6, 1)), ("roll", (ROWS, (1,), (0,))), ("roll", (ROWS, (1, 2), (1,))),
    ("flip", (ROWS, (0,))), ("pad", (ROWS, (1,), 0.0)), ("pad", (ROWS, (-9, 0), 0.0)), ("pad", (ROWS, (0, 0, 0, 0, 1, 0), 0.0)),
    ("pad", (ROWS, (2**39, 2**39), 0.0)), ("pad_as", (MAPS, (6, 0, 0, 0), "reflect")),
    ("pad_as", (MAPS, (7, 0, 0, 0), "circular")),
    ("channel_shuffle", (MAPS, 3)), ("channel_shuffle", (MAPS, 0)), ("pixel_shuffle", (MAPS, 3)),
    ("pixel_unshuffle", (MAPS, 4)),
    ("index", (Shape((2, 5)), INDEX)), ("index", (ROWS, INDEX)), ("index", (Shape((4,)), Shape((3,), torch.int64, -1, 2))),
    ("index", (Shape((4,)), Shape((3,), torch.int64))), ("index", (Shape((4,)), Shape((4,), torch.bool))),
    ("index_select", (ROWS, 1, Shape((3, 1), torch.int64, 0, 2))), ("index_select", (ROWS, 0, INDEX)),
])  # fmt: skip
def test_what_does_not_fit_is_refused(name, args):
    with pytest.raises(IntrafusionError):
        OPERATORS[name].made(args)


def test_sizes_hold_for_any_number_of_images():
    assert numel((3, Batch(2), 4)) == Batch(24)
    assert (total(Batch(2), Batch(3)), total(Batch(1), 0), total(2, -3)) == (Batch(5), Batch(1), -1)
    assert (divided(Batch(6), 3), divided(Batch(6), Batch(2)), divided(7, 2)) == (Batch(2), 3, 3)
    assert (remainder(Batch(6), 3), remainder(7, 4)) == (0, 3)
    assert broadcast((B, 1, 3), (4, 1)) == (B, 4, 3)
    assert fitted(MAPS, (-1, 36)) == (Batch(4), 36)


@pytest.mark.parametrize("call", [
    lambda: numel((B, B)), lambda: numel((2**20, 2**20, 2)), lambda: total(B, 1), lambda: divided(Batch(5), 2),
    lambda: divided(5, 0), lambda: divided(5, B), lambda: remainder(5, 0), lambda: remainder(B, 2),
    lambda: broadcast((B,), (2,)),
    lambda: Shape((1,) * 9), lambda: Shape((B, 0)), lambda: Shape((-1,)), lambda: Shape((True, 2**41)),
])  # fmt: skip
def test_sizes_that_do_not_are_refused(call):
    with pytest.raises(IntrafusionError):
        call()


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))


def test_random_programs_are_refused_or_do_what_was_proven():
    """200 of them, and 100 changed files, in a child that may take 6 GiB of addresses and two minutes of processor time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "support" / "program_fuzz.py"), "200"]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=_limited, timeout=600)
    assert told.returncode == 0, told.stderr[-2000:]
    found = json.loads(re.findall(r"\{.*\}", told.stdout)[-1])
    assert sum(found.values()) == 300
    assert min(found["ran"], found["refused"], found["file refused"]) > 20
