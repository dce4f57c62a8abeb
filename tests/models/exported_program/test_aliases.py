"""Several names of one tensor: a program that changes one of them in place gives its network's logits, or is refused."""

import random
from collections.abc import Callable
from typing import Any

import own_files as files
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program import read_program

SIZE = (4, 4, 4)
Calls = list[tuple[str, int, int]]  # the name of a call, and the places of two earlier values


def _set(x: Tensor, value: Tensor) -> Tensor:
    x[:, :2] = value[:, 2:]
    return x


MAKES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda x, y: x.relu(),
    "sum": lambda x, y: x + y,
    "clone": lambda x, y: x.clone(),
    "detach": lambda x, y: x.detach(),
    "same": lambda x, y: x.to(torch.float32),
    "copy": lambda x, y: x.to(torch.float32, copy=True),
    "like": lambda x, y: x.type_as(y),
    "cpu": lambda x, y: x.to("cpu"),
    "drop": lambda x, y: F.dropout(x, training=False),
    "contiguous": lambda x, y: x.contiguous(),
    "last": lambda x, y: x.contiguous(memory_format=torch.channels_last),
    "to last": lambda x, y: x.to(memory_format=torch.channels_last),
    "turned": lambda x, y: x.transpose(2, 3),
    "not turned": lambda x, y: x.transpose(2, 2),
    "moved": lambda x, y: x.permute(0, 2, 3, 1),
    "view": lambda x, y: x.view(x.shape),
    "whole": lambda x, y: x[:, :],
    "shuffle": lambda x, y: F.channel_shuffle(x, 1),
    "pad": lambda x, y: F.pad(x, (0, 0)),
    "reshape": lambda x, y: x.reshape(-1, 16, 4).reshape(-1, 4, 4, 4),
    "flat": lambda x, y: x.flatten(1).unflatten(1, (4, 4, 4)),
    "expand": lambda x, y: x[:, :1].expand(-1, 4, -1, -1),
    "sized": lambda x, y: y.sub(1).reshape(x.size(0), x.size(2), -1).reshape(x.shape),
    "part": lambda x, y: torch.cat([x[:, 2:], y.chunk(2, 1)[0]], 1),
}
CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul_": lambda x, y: x.mul_(2),
    "relu_": lambda x, y: x.relu_(),
    "add_": lambda x, y: x.add_(y),
    "copy_": lambda x, y: x.copy_(y),
    "zero_": lambda x, y: x[:, :, 1].zero_(),
    "part_": lambda x, y: x[:, 1:].mul_(3),
    "set": _set,
    "shift": lambda x, y: x[:, 1:2].sub_(x[:, 2:3]),
    "turn_": lambda x, y: x.transpose_(2, 3),
    "view_": lambda x, y: x.view(-1, 64).add_(1),
    "drop_": lambda x, y: F.dropout(x, training=False, inplace=True),
    "first_": lambda x, y: x.chunk(2, 1)[0].mul_(-1),
    "deep_": lambda x, y: x[:, 1:][:, :, 2:].add_(1),
}


class Aliased(nn.Module):
    """Calls of earlier values, whose results, those of places, are summed up with different weights."""

    def __init__(self, calls: Calls, read: list[int]) -> None:
        super().__init__()
        self.calls, self.read = calls, read
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [x * 1.5]
        for name, one, other in self.calls:
            made = (MAKES | CHANGES)[name](values[one], values[other])
            if made.shape == x.shape:
                values.append(made)
        return self.head(sum((n + 1) * values[place % len(values)] for n, place in enumerate(self.read)).flatten(1))


def random_calls(rng: random.Random) -> Aliased:
    calls: Calls = []
    for _ in range(rng.randint(2, 6)):
        made = rng.choice(list(MAKES) if rng.random() < 0.6 else list(CHANGES))
        calls.append((made, rng.choice((0, -1, -1, -2)) if len(calls) > 1 else 0, rng.choice((0, -1))))
    return Aliased(calls, [rng.choice((0, 1, 2, -1, -2)) for _ in range(rng.randint(1, 3))]).eval()


def outcome(model: nn.Module, path: Any, size: tuple[int, ...] = SIZE, core: bool = False) -> str:
    """ "same", "refused", or "not exported". Fails where the logits of the read program are others."""
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    try:
        expected = model(images.clone())
        files.export(model, path, size, core=core)
    except Exception:  # PyTorch itself cannot run or export it
        return "not exported"
    try:
        program, _, _ = read_program(path)
    except IntrafusionError:
        return "refused"
    torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-5)
    return "same"


@pytest.mark.parametrize("seed", range(16))
def test_a_random_program_gives_its_networks_logits_or_is_refused(tmp_path, seed):
    torch.manual_seed(seed)
    model = random_calls(random.Random(seed))
    outcome(model, tmp_path / "p.pt2")


RELU = ("relu", 0, 0)


@pytest.mark.parametrize(
    ("calls", "read", "expected"),
    [
        ([RELU, ("copy", 1, 0), ("mul_", 2, 0)], [1, 2], "same"),
        ([RELU, ("same", 1, 0), ("mul_", 2, 0)], [1, 2], "same"),
        ([RELU, ("drop", 1, 0), ("mul_", 1, 0)], [1, 2], "same"),
        ([RELU, ("shift", 1, 0)], [1], "same"),
        ([RELU, ("deep_", 1, 0)], [1], "same"),
        *(
            ([RELU, (maybe, 1, 0), ("mul_", changed, 0)], [1, 2], "refused")
            for maybe in ("last", "to last", "reshape", "flat", "view")
            for changed in ((1, 2) if maybe == "last" else (2,))
        ),
        ([RELU, ("last", 1, 0), ("mul_", 2, 0)], [2, 0], "same"),
        ([RELU, ("expand", 1, 0), ("contiguous", 2, 0), ("mul_", 3, 0)], [3], "refused"),
        ([RELU, ("view", 1, 0), ("mul_", 2, 0), ("sized", 1, 2)], [3, 4], "same"),
        ([RELU, ("view", 1, 0), ("mul_", 2, 0), ("sized", 2, 1)], [3, 4], "refused"),
        ([RELU, ("detach", 1, 0), ("turn_", 2, 0)], [1, 2], "refused"),
    ],
)
def test_what_may_be_changed_under_another_name_is_not_read(tmp_path, calls, read, expected):
    assert outcome(Aliased(calls, read).eval(), tmp_path / "p.pt2") == expected


class Product(nn.Module):
    """A product with a square weight, which a call has turned, or not."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product, self.w, self.b = product, nn.Parameter(torch.randn(10, 10)), nn.Parameter(torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.flatten(1)[:, :10], self.w, self.b)


@pytest.mark.parametrize("core", [False, True], ids=["as written", "core operators"])
@pytest.mark.parametrize(
    "product",
    [
        lambda x, w, b: torch.mm(x, w.permute(0, 1)) + torch.mm(x, w.permute(-1, 0)),
        lambda x, w, b: torch.addmm(b, x, w.transpose(0, 0)) + torch.addmm(b, x, w.transpose(0, -1)),
        lambda x, w, b: (
            torch.mm(x, w.permute(0, -1)) + torch.mm(x, w.t().t()) + torch.mm(x, w.T) + torch.mm(x, w.swapaxes(1, 1))
        ),
    ],
    ids=["permute", "transpose", "twice"],
)
def test_a_square_weight_is_turned_where_the_network_turns_it(tmp_path, product, core):
    assert outcome(Product(product).eval(), tmp_path / "p.pt2", core=core) == "same"


def test_weights_are_never_changed_through_what_may_be_a_copy(tmp_path):
    model = Product(lambda x, w, b: torch.mm(x, w.contiguous().mul_(2.0)))
    with torch.no_grad(), pytest.raises(IntrafusionError, match="its own weights in place"):
        read_program(files.export(model.eval(), tmp_path / "p.pt2", SIZE))
