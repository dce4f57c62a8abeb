"""Two networks side by side: what each layer reads and writes, whichever way it is found."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion as itf
from intrafusion.models.fx.partition import Cuts, trace
from intrafusion.pruning.merge.layer_calls import Calls
from intrafusion.pruning.merge.lockstep import InStep
from intrafusion.pruning.pruner import prune_groups


@pytest.fixture
def by_hooks(monkeypatch) -> None:
    monkeypatch.setattr("intrafusion.pruning.merge.lockstep.trace", lambda model, images: None)


def heard(model: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer reads and writes while the network runs."""
    found = []

    def keep(module: nn.Module, args: tuple, result: Tensor) -> None:
        found.append((args[0].clone(), result.clone()))  # what follows may work in place

    hook = model.get_submodule(layer).register_forward_hook(keep)
    model(images)
    hook.remove()
    ((read, wrote),) = found
    return read, wrote


@pytest.mark.parametrize("way", [Cuts, Calls])
def test_values_are_those_of_the_networks(network, way, request):
    if way is Calls:
        request.getfixturevalue("by_hooks")
    model, batches = network.model, network.images.split(3)
    small = prune_groups(model, network.groups, 0.5, merge="drop")
    walk = InStep(model, small, batches)
    assert isinstance(walk.cuts, way)
    once = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert sorted(walk.cuts.layers()) == sorted(once)
    for layer in walk.cuts.layers():
        source, output, _ = walk.cuts.around(layer)
        for images, found in zip(batches, walk.at(layer, (output,), (output,)), strict=True):
            for one, values in zip((model, small), found, strict=True):
                for value, expected in zip((values[source], values[output]), heard(one, layer, images), strict=True):
                    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("merge", ["calibrated", "refit"])
def test_hooks_lead_to_the_same_merges(networks, merge, request):
    network = networks("vgg")  # no sums
    by_cuts = prune_groups(network.model, network.groups, 0.5, merge=merge, data=network.data)
    request.getfixturevalue("by_hooks")
    by_hooks = prune_groups(network.model, network.groups, 0.5, merge=merge, data=network.data)
    for ours, theirs in zip(by_cuts.parameters(), by_hooks.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_nothing_is_left_on_the_networks(networks, by_hooks):
    network = networks("vgg")
    model = copy.deepcopy(network.model)
    walk = InStep(model, copy.deepcopy(model), network.images.split(2))
    for layer in walk.cuts.layers():
        list(walk.at(layer))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


class Reused(nn.Module):
    """`twice` runs twice, `never` does not; `both` returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.never, self.both = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), Both(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(self.twice(F.relu(self.twice(self.first(x)))))[0]


class Both(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


@pytest.mark.parametrize("way", [Cuts, Calls])
@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("twice", "^cannot fit twice: it does not run exactly once in a forward pass; choose drop or fusion$"),
        ("never", "^cannot fit never: it does not run exactly once"),
        ("both", "^cannot fit both: its input or output is not one tensor; choose drop or fusion$"),
    ],
)
def test_a_layer_that_cannot_be_fitted_is_named(way, layer, line, request):
    if way is Calls:
        request.getfixturevalue("by_hooks")
    torch.manual_seed(0)
    net = Reused().eval()
    walk = InStep(net, copy.deepcopy(net), [torch.randn(3, 4)])
    assert isinstance(walk.cuts, way)
    assert walk.cuts.layers() == ["first", "both"]
    with pytest.raises(itf.IntrafusionError, match=line):
        list(walk.at(layer, (f"output of {layer}" if way is Calls else layer,)))


class Written(nn.Module):
    """It holds the shape of one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.width = nn.Linear(6, 8), nn.Linear(8, 5), 4

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).view(-1, 2, self.width).flatten(1))


def test_where_the_trace_does_not_fit_the_layer_is_named():
    torch.manual_seed(0)
    dense, images = Written().eval(), torch.randn(4, 6)
    small = copy.deepcopy(dense)
    small.first, small.second, small.width = nn.Linear(6, 4), nn.Linear(4, 5), 2
    cuts = trace(dense, images)
    assert cuts.misfit(dense, images) is None
    assert cuts.misfit(small, images) == "second: its input is (2, 8) in the trace, but (4, 4) in the network"
    small.first = nn.Linear(6, 6)
    small.second, small.width = nn.Linear(6, 5), 3
    assert cuts.misfit(small, images).startswith("second: its input ")
    assert isinstance(InStep(dense, small, [images]).cuts, Calls)


def test_a_network_that_fails_is_one_line():
    dense, images = Written().eval(), torch.randn(4, 6)
    small = copy.deepcopy(dense)
    small.first = nn.Linear(6, 7)
    with pytest.raises(itf.IntrafusionError, match=r"^cannot fit the network: it fails on these images: shape '"):
        InStep(dense, small, [images])
