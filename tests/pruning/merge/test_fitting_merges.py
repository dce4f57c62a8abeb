"""Merges that fit: what can be recovered is, nothing gets worse, on every kind of coupling."""

import copy

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

import intrafusion as itf
from intrafusion._registry import MERGES
from intrafusion.pruning.groups.bn_folding import fold
from intrafusion.pruning.merge import calibrate
from intrafusion.pruning.merge.least_squares import Fit, Merged
from intrafusion.pruning.merge.ridge import Regression
from intrafusion.pruning.pruner import cut, prune_groups
from intrafusion.studies.measurement import run_spec
from intrafusion.studies.session import open_session

FITTED = [name for name, entry in MERGES.items() if entry.fit is not None and name != "fold-r"]


def outputs(network: nn.Module, data: itf.ImageData, names: list[str]) -> dict[str, torch.Tensor]:
    """What these layers write, and the logits, on the images that a network was fitted on."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda m, x, y, name=name: seen.__setitem__(name, y))
        for name in names
    ]
    seen["logits"] = network((data.images.float() / 255 - 0.5) / 0.3)
    for hook in hooks:
        hook.remove()
    return seen


def error(network: nn.Module, data: itf.ImageData, model: nn.Module, names: list[str]) -> float:
    """How far what these layers write is from what they write in the dense network, where the shapes are the same."""
    ours, theirs = (outputs(one, data, names) for one in (network, model))
    same = [name for name in names if ours[name].shape == theirs[name].shape] or ["logits"]
    return sum(float((ours[name] - theirs[name]).square().mean()) for name in same)


@pytest.mark.parametrize("base", ["drop", "fusion"])
def test_fits_every_kind_of_coupling(network, base):
    dense = network.folded
    for group in network.kinds:
        readers = [layer.name for layer in group.role("consumer")]
        plain, *fitted = (
            error(
                prune_groups(network.model, network.groups, 0.5, merge=name, groups=[group.name], data=network.data),
                network.data, dense, readers,
            )
            for name in {"drop": ("drop", "calibrated", "refit", "refit-all"), "fusion": ("fusion", "calibrated-fusion")}[base]
        )  # fmt: skip
        assert max(fitted) <= 1.05 * plain + 1e-9, (group.name, plain, fitted)


@pytest.mark.parametrize("merge", FITTED)
def test_nothing_to_prune_is_nothing_to_fit(networks, merge):
    network = networks("vgg")
    small = itf.prune(network.model, network.example, 0.0, merge=merge, data=network.data)
    torch.testing.assert_close(small(network.images), network.logits, rtol=1e-4, atol=1e-5)


def test_without_images_one_line(networks):
    network = networks("mlp")
    with pytest.raises(itf.IntrafusionError, match=r"^merge refit needs images; pass data=$"):
        itf.prune(network.model, network.example, 0.5, merge="refit")


def twice(model: nn.Sequential, first: int, reader: int) -> nn.Sequential:
    """Every odd channel of a layer is three times the one before it."""
    for tensor in (model[first].weight.data, model[first].bias.data):
        tensor[1::2] = 3 * tensor[::2]
    return model


class Axes(nn.Module):
    """The axes in another order."""

    def __init__(self, *order: int):
        super().__init__()
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.order)


POOLED = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


READERS: dict[str, list[nn.Module]] = {
    "padded": [nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), *POOLED],
    "strided": [nn.Conv2d(8, 6, 1, stride=2), nn.ReLU(), *POOLED],
    "flatten": [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 5)],
    "pooled": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)],
    "1-d": [nn.Flatten(2), nn.Conv1d(8, 6, 5, 2, padding=2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), *POOLED[1:]],
    "circular": [nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), nn.ReLU(), *POOLED],
    "same": [nn.Conv2d(8, 6, 4, padding="same"), nn.ReLU(), *POOLED],
    # maps of 6 pixels a side
    "channels last, as many as pixels": [Axes(0, 2, 3, 1), nn.Linear(8, 6), nn.ReLU(), Axes(0, 3, 1, 2), *POOLED],
    "channels last": [Axes(0, 2, 3, 1), nn.Linear(8, 7), nn.ReLU(), Axes(0, 3, 1, 2), nn.Conv2d(7, 6, 1), *POOLED],
    "tokens": [nn.Flatten(2), Axes(0, 2, 1), nn.Linear(8, 6), nn.ReLU(), Axes(0, 2, 1), nn.AdaptiveAvgPool1d(1), *POOLED[1:]],
}


@pytest.mark.parametrize("reader", READERS)
def test_what_the_kept_channels_determine_is_recovered(networks, random_weights, reader):
    torch.manual_seed(0)
    model = random_weights(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *copy.deepcopy(READERS[reader])))
    twice(model, 0, 2)
    data = networks("resnet-pad").data
    model.card = itf.ModelCard("twice", (0.5,) * 3, (0.3,) * 3, (3, 8, 8), 5, "noise")
    groups, images = itf.find_groups(model, torch.zeros(1, 3, 8, 8)), torch.randn(20, 3, 8, 8)
    errors = {
        merge: (prune_groups(model, groups, 0.5, merge=merge, groups=["0"], data=data)(images) - model(images)).norm()
        for merge in ("drop", *FITTED)
    }
    for merge in FITTED:
        assert errors[merge] < 0.05 * errors["drop"], merge


def test_an_intercept_is_right_at_the_border_on_average():
    """A channel that is always one: dropped, its reader's bias takes it, in so far as the padding leaves it there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(5, 5)).eval().requires_grad_(False)
    model[0].weight.data[3], model[0].bias.data[3] = 0, 1
    model.card = itf.ModelCard("constant", (0.5,) * 3, (0.3,) * 3, (3, 6, 6), 5, "noise")
    images = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8)
    data = itf.ImageData("noise", "train", images, torch.zeros(40, dtype=torch.int64), tuple("abcde"))
    small = itf.prune(model, torch.zeros(1, 3, 6, 6), 0.25, merge="calibrated", groups=["0"], data=data)
    assert small[0].out_channels == 3
    seen = (images.float() / 255 - 0.5) / 0.3
    torch.testing.assert_close(small[:3](seen).mean((0, 2, 3)), model[:3](seen).mean((0, 2, 3)), rtol=1e-3, atol=1e-3)


class TestRegression:
    def test_is_ridge_regression(self):
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(200, 6, generator=g) + 1, torch.randn(200, 3, generator=g)
        ours = Regression()
        for part in range(4):
            ours.add(x[part * 50 : part * 50 + 50], y[part * 50 : part * 50 + 50])
        weights, intercept = ours.solve()
        strength = ours.best * float(x.square().sum(0).mean())
        theirs = Ridge(strength).fit(x.numpy(), y.numpy())
        torch.testing.assert_close(weights.T, torch.from_numpy(theirs.coef_).double(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(intercept, torch.from_numpy(theirs.intercept_).double(), rtol=1e-3, atol=1e-4)

    def test_noise_wants_a_strong_ridge_and_exact_data_a_weak_one(self):
        g = torch.Generator().manual_seed(0)
        chosen = []
        for noise in (0.0, 30.0):
            ours = Regression()
            for _ in range(8):
                x = torch.randn(6, 20, generator=g)
                ours.add(x, x[:, :4] + noise * torch.randn(6, 4, generator=g))
            ours.solve()
            chosen.append(ours.best)
        assert chosen == [1e-4, 1e-1]

    def test_where_the_data_say_nothing_it_stays(self):
        ours, start = Regression(), torch.arange(8.0, dtype=torch.float64).reshape(4, 2)
        x = torch.zeros(10, 3)
        x[:, 0] = torch.arange(10)
        ours.add(x, x[:, :1].repeat(1, 2))
        weights, _ = ours.solve(start)
        torch.testing.assert_close(weights[1:], start[1:3])
        torch.testing.assert_close(weights[0], torch.ones(2, dtype=torch.float64), rtol=0.02, atol=0)


def test_the_sum_of_a_block_is_what_is_fitted(networks):
    """The last layer of a block makes up for what its shortcut lacks."""
    network = networks("resnet-projection")
    dense = fold(network.model, network.example)
    dense.card = network.model.card
    group = next(group for group in network.prunable if len(group.role("producer")) > 1)
    small, kept = copy.deepcopy(dense), torch.arange(group.size)
    for layer in group.role("producer")[:1]:
        layer.views(small)["weight"].mul_(0.5)
    fit = Fit(dense, small, [Merged(group, torch.eye(group.size, dtype=torch.float64), kept)], network.data)
    name = group.role("producer")[-1].name
    last = next(n for n, m in dense.named_modules() if isinstance(m, nn.Linear))
    before = error(small, network.data, network.model, [last])
    fit.refit(name)
    assert error(small, network.data, network.model, [last]) < before


class TestExplained:
    def test_is_the_share_of_the_variance(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(400, 3, generator=generator)
        noise = torch.randn(400, generator=generator)
        y = torch.stack([x @ torch.tensor([1.0, 2, 3]), x[:, 0] + noise, noise, torch.full((400,), 2.0)], 1)
        regression = Regression()
        for rows in range(0, 400, 50):
            regression.add(x[rows : rows + 50], y[rows : rows + 50])
        weights, intercept = regression.solve()
        found = regression.explained(weights, intercept)
        left = y - (x.double() @ weights + intercept)
        expected = 1 - left.square().sum(0) / (y - y.mean(0)).square().sum(0).clamp(min=1e-9)
        torch.testing.assert_close(found[:3], expected[:3], rtol=1e-4, atol=1e-4)
        assert found[0] > 0.999
        assert found[3] == 1  # nothing to predict

    def test_a_map_tells_it_of_each_channel(self, networks):
        network = networks("vgg")
        group = network.prunable[0]
        made = cut(network.model, network.groups, 0.5, merge="drop", groups=[group.name], data=network.data)
        fit = made.fit(network.data)
        calibrate(fit)
        (kept,) = [merged.kept for merged in made.merged]
        for learned in fit.maps:
            assert learned.matrix.shape == (group.size, len(kept))
            assert learned.explained.shape == (group.size,)
            assert float(learned.explained[kept].min()) > 0.9
            assert float(learned.explained.max()) <= 1 + 1e-9


NUMBERS = {  # merge, criterion, calibration images -> sparsity: accuracy in percent that quick prototypes reached
    ("calibrated", "l1", 512): {0.5: 64.9},  # some seconds each: 84.4 at 30 %, 22.4 at 70 %
    ("calibrated", "greedy", 512): {0.5: 73.1},  # 85.5 at 30 %, 44.0 at 70 %
    ("refit", "greedy", 1024): {0.5: 79.6},  # half a minute each: 87.8 at 30 %, 60.5 at 70 %
}


@pytest.fixture(scope="module")
def resnet20(reference):
    reference("data/cifar10_train.npz")
    spec = itf.PruneSpec(
        model="cifar10-resnet20", dataset="cifar10", weights=str(reference("weights/cifar10_resnet20.th")),
        data_path=str(reference("data/cifar10_test.npz")), limit=1000,
    )  # fmt: skip
    return spec, open_session(spec)


@pytest.mark.parametrize("way", NUMBERS, ids=lambda way: "-".join(map(str, way)))
def test_real_images_reach_the_numbers(resnet20, way):
    """ResNet-20 on CIFAR-10, the nine inner groups together, within a point on 1,000 images."""
    merge, criterion, images = way
    spec, session = resnet20
    inner = tuple(group.name for group in session.groups if group.name.endswith("conv1") and group.name != "conv1")
    spec = spec.but(merge=merge, criterion=criterion, calibration=images, groups=inner)
    for sparsity, least in NUMBERS[way].items():
        result = run_spec(spec.but(sparsity=sparsity), session)
        assert 100 * result.accuracy > least - 1, sparsity


EMBEDDED = {"digits-mlp": 0.8, "digits-vgg": 0.6, "digits-resnet": 0.5}


@pytest.mark.parametrize("name", EMBEDDED)
def test_solving_beats_fusion_on_every_embedded_model(name):
    spec = itf.PruneSpec(model=name, sparsity=EMBEDDED[name], limit=None, calibration=128)
    session = open_session(spec)
    fusion, *others = (
        run_spec(spec.but(merge=merge), session).accuracy for merge in ("fusion", "calibrated", "refit", "refit-all")
    )
    assert min(others) > fusion


def test_solving_beats_fusion_on_the_embedded_cifar_resnet(reference):
    reference("data/cifar10_train.npz")
    spec = itf.PruneSpec(
        model="cifar10-resnet20", dataset="cifar10", data_path=str(reference("data/cifar10_test.npz")), sparsity=0.4,
        limit=500, calibration=128,
    )  # fmt: skip
    session = open_session(spec)
    fusion, *others = (run_spec(spec.but(merge=merge), session).accuracy for merge in ("fusion", "calibrated", "refit"))
    assert min(others) > fusion
