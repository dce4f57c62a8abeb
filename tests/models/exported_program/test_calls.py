"""Calls that people write in their networks: their programs open and give the same logits, or say what to write instead."""

import json
from collections.abc import Callable
from typing import Any

import own_files as files
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models import hub
from intrafusion.models.card import ModelCard
from intrafusion.models.exported_program import describe_program, read_program, tensors_of
from intrafusion.models.serialization import save_state
from intrafusion.models.sources import user
from intrafusion.runtime.paths import home

SIZE = (4, 8, 8)


class Calls(nn.Module):
    """Several calls of the images, pooled and joined as logits. made: what they need of modules and weights."""

    def __init__(self, *calls: Callable[[Any, Tensor], Tensor], **made: Any) -> None:
        super().__init__()
        self.calls = calls
        self.register_buffer("mask", torch.arange(64).reshape(8, 8) % 3 == 0)
        for name, one in made.items():
            setattr(self, name, one)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        return torch.cat([call(self, x).flatten(2).mean(2) for call in self.calls], 1)


def _check(model: nn.Module, path: Any, **options: bool) -> None:
    program, _, _ = read_program(files.export(model.eval(), path, SIZE, **options))
    images = torch.randn(5, *SIZE, generator=torch.Generator().manual_seed(0))
    for batch in (images, images[:1]):
        torch.testing.assert_close(program(batch), model(batch), rtol=1e-4, atol=1e-5)


def _accepted() -> nn.Module:
    return Calls(
        lambda on, x: torch.where(on.mask, x, x * 2) + torch.where(x > 0, x, 0.5) + torch.where(x <= 0, 0.5, x),
        lambda on, x: x * (x >= 0.1) + (x < 0.2) * x,
        lambda on, x: x.std((2, 3), keepdim=True) + x.var((2, 3), unbiased=False, keepdim=True),
        lambda on, x: x.add(x.abs(), alpha=3).sub(x.square(), alpha=-0.5),
        lambda on, x: F.glu(x, 1),
        lambda on, x: torch.zeros_like(x).add_(x.relu()) + torch.ones_like(x) + torch.full_like(x, 0.25),
        lambda on, x: F.interpolate(x, scale_factor=1.5) + F.interpolate(x, scale_factor=1.5, mode="bilinear"),
        lambda on, x: F.interpolate(x, scale_factor=0.25)[:, :, 0],
        lambda on, x: on.around(x),
        lambda on, x: F.conv2d(x, on.w) + F.conv2d(x, on.w, on.b, padding=0) + F.conv2d(x, on.w, dilation=2),
        lambda on, x: x * on.w.sum((0, 1, 2, 3)),
        around=nn.Conv2d(4, 3, 3, padding=2, padding_mode="circular"),
        w=nn.Parameter(torch.randn(3, 4, 1, 1)),
        b=nn.Parameter(torch.randn(3)),
    )


def test_what_people_write_gives_the_same_logits(tmp_path):
    torch.manual_seed(0)
    _check(_accepted(), tmp_path / "p.pt2")


@pytest.mark.parametrize("weighs", [True, False], ids=["shared", "before its layer"])
def test_a_weight_of_the_root_may_be_used_twice(tmp_path, weighs):
    torch.manual_seed(0)
    first: list[Callable[[Any, Tensor], Tensor]] = [
        lambda on, x: F.conv2d(x, on.w, padding=1),
        lambda on, x: F.conv2d(x, on.w, on.b) if weighs else x * on.w.mean((0, 1, 2, 3)),
    ]
    model = Calls(*first[:: 1 if weighs else -1], w=nn.Parameter(torch.randn(4, 4, 3, 3)), b=nn.Parameter(torch.randn(4)))
    _check(model, tmp_path / "p.pt2")


class Viewed(nn.Module):
    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined, self.head, self.token = joined, nn.Linear(64 if joined else 256, 3), nn.Parameter(torch.rand(1, 1, 64))

    def forward(self, x: Tensor) -> Tensor:
        if not self.joined:
            return self.head(x.view(x.size(0), -1))
        return self.head(torch.cat([self.token.expand(x.size(0), -1, -1), x.flatten(2)], 1)[:, 0])


def test_a_batch_of_one_size_is_enough_for_a_view_of_each_image(tmp_path):
    torch.manual_seed(0)
    _check(Viewed(joined=False), tmp_path / "p.pt2", dynamic=False)


def test_a_batch_of_one_size_is_named_where_it_is_in_the_way(tmp_path):
    with pytest.raises(IntrafusionError, match="export it with dynamic_shapes"):
        read_program(files.export(Viewed(joined=True).eval(), tmp_path / "p.pt2", SIZE, dynamic=False))


@pytest.mark.parametrize(
    ("call", "made", "advice"),
    [
        (lambda on, x: x.masked_fill(on.mask, float("-inf")).softmax(-1), {}, r"torch.finfo\(torch.float32\).min"),
        (lambda on, x: F.interpolate(x, scale_factor=1.3), {}, "pass F.interpolate a size"),
        (lambda on, x: on.up(x), {"up": nn.ConvTranspose2d(4, 4, 2)}, "F.interpolate and a convolution"),
        (
            lambda on, x: on.normed(x),
            {"normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))},
            "remove the weight norm",
        ),
    ],
    ids=["infinite", "scale", "transposed", "weight norm"],
)
def test_what_is_refused_says_what_to_do(tmp_path, call, made, advice):
    path = files.export(Calls(call, **made).eval(), tmp_path / "p.pt2", SIZE)
    with pytest.raises(IntrafusionError, match=advice):
        read_program(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return files.export(files.network(), tmp_path_factory.mktemp("calls") / "net.pt2")


def _graph(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda about: change(about["graph_module"]["graph"])


@pytest.mark.parametrize(
    "change",
    [
        _graph(lambda graph: graph.pop("tensor_values")),
        _graph(lambda graph: graph["nodes"][0]["inputs"][0].update(arg={})),
        _graph(lambda graph: graph.update(nodes=["x"])),
        lambda about: about.update(graph_module=[]),
        lambda about: about.update(schema_version="8"),
    ],
)
def test_a_damaged_archive_is_called_so(tmp_path, whole, change):
    path = files.with_graph(whole, tmp_path / "p.pt2", change)
    with pytest.raises(
        IntrafusionError, match=r"is damaged \(an error in its (graph|description)\); export the network again$"
    ):
        read_program(path)


@pytest.mark.parametrize(
    "change",
    [lambda about: 5, lambda about: {}, lambda about: {"format": 1}, lambda about: about | {"steps": [["relu", 1, 2]]}, None],
)
def test_a_kept_program_whose_description_makes_no_sense_is_listed_as_damaged(whole, change):
    program, _, _ = read_program(whole)
    about = json.loads(json.dumps(describe_program(program)))
    details = {"program": about if change is None else change(about)}
    card = ModelCard("x", (0.0,), (1.0,), (1, 8, 8), 3, "own", details=details)
    save_state(tensors_of(program), card, home() / "models" / "x")
    told = hub.describe("kept/x")["summary"]
    assert ("damaged" in told) == (change is not None)
    assert user.names(damaged=False) == (["kept/x"] if change is None else [])
