"""Every recovery and every merge, on a small network of each structure: it runs, and leaves a network fit for use."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import intrafusion as itf
from intrafusion._registry import MERGES, RECOVERIES
from intrafusion.pruning.groups.group import CHANNELWISE
from intrafusion.pruning.groups.norms import norm_of
from intrafusion.pruning.merge.matrix_product import rows_of
from intrafusion.pruning.pruner import Pruned, cut
from intrafusion.training.recovery import RecoveryOptions, recover
from intrafusion.training.recovery.distillation import watching

AFTER_REFIT = ("depthwise", "grouped", "channels last")  # of the others dropping is recovered from
HOW = RecoveryOptions(epochs=0.5, rate=0.01, rank=2)
Batch = nn.BatchNorm2d


class Head(nn.Module):
    """A body, the mean of its channels over all positions, a linear head."""

    def __init__(self, *body: nn.Module, width: int = 6):
        super().__init__()
        self.body, self.head = nn.Sequential(*body), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(2).mean(2))


class Inverted(nn.Module):
    """MobileNet's: expanded, convolved channel by channel, gated, projected, and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(6, 8, 1, bias=False), Batch(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), Batch(8)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project, self.norm3 = nn.Conv2d(8, 6, 1, bias=False), Batch(6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm2(self.depthwise(F.relu6(self.norm1(self.expand(x))))))
        y = y * torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return x + self.norm3(self.project(y))


class ChannelsLast(nn.Module):
    """ConvNeXt's: two linear layers on (B, H, W, C); the maps are as wide as they have channels."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.wide, self.back = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        return (x.permute(0, 2, 3, 1) + self.back(F.gelu(self.wide(y)))).permute(0, 3, 1, 2)


class PreActivated(nn.Module):
    """Norms that read sums, and so stay."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = Batch(6), nn.Conv2d(6, 8, 3), Batch(8), nn.Conv2d(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return x[:, :, 2:-2, 2:-2] + y


class Reading(nn.Module):
    """A linear layer whose weight the network reads itself, without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.mix.weight, self.mix.bias).movedim(-1, 1)


class SamePadded(nn.Conv2d):
    """Pads what it reads by itself, as many EfficientNets do."""

    def forward(self, x: Tensor) -> Tensor:
        more = [(taps - 1) // 2 for taps in reversed(self.kernel_size) for _ in (0, 1)]
        return F.conv2d(F.pad(x, more), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """Divides its weight by its deviation (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.std((1, 2, 3), keepdim=True), self.bias)


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Awkward(nn.Module):
    """A constant, one slope for all channels, a layer that runs twice, and a branch that depends on the size."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.slope, self.back, self.twice = (
            nn.Conv2d(6, 8, 1),
            nn.PReLU(),
            nn.Conv2d(8, 6, 1),
            nn.Conv2d(6, 6, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.back(self.slope(self.wide(x))) * torch.tensor(0.5)
        if x.shape[-1] > 3:
            y = self.twice(F.relu(self.twice(y)))
        return y


def _stem(kernel: int = 3) -> list[nn.Module]:
    return [nn.Conv2d(3, 6, kernel, bias=False), Batch(6), nn.ReLU()]


def _shared() -> nn.Module:
    """A layer with two names, and two that share a weight."""
    twins = [nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU()]
    model = Head(*_stem(1), *twins, nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1))
    model.body[5].weight = model.body[3].weight
    model.again = model.body[0]
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "depthwise": lambda: Head(*_stem(), Inverted()),
    "grouped": lambda: Head(*_stem(), nn.Conv2d(6, 8, 3, groups=2), Batch(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU()),
    "multiplier": lambda: Head(*_stem(), nn.Conv2d(6, 12, 3, groups=6), Batch(12), nn.ReLU(), nn.Conv2d(12, 6, 1)),
    "channels last": lambda: Head(*_stem(), ChannelsLast()),
    "1-d": lambda: Head(
        *_stem(), nn.Flatten(2), nn.Conv1d(6, 8, 3, 2, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3)
    ),
    "transposed": lambda: Head(
        *_stem(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), Batch(6), nn.ReLU(), nn.Conv2d(6, 6, 3)
    ),
    "pre-activated": lambda: Head(nn.Conv2d(3, 6, 3), PreActivated()),
    "instance norms": lambda: Head(
        *_stem(), nn.InstanceNorm2d(6, track_running_stats=True), nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1)
    ),
    "padded": lambda: Head(
        *_stem(), nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(8, 6, 2, padding="same")
    ),
    "read by itself": lambda: Head(*_stem(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), Reading()),
    "shared": _shared,
    "pads by itself": lambda: Head(*_stem(), SamePadded(6, 8, 3), Batch(8), nn.ReLU(), SamePadded(8, 6, 3)),
    "awkward": lambda: Head(*_stem(), Awkward()),
}


class Made:
    """A network, images for it, and what pruning made of it."""

    def __init__(self, name: str, fill: Callable[[nn.Module], nn.Module]):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = fill(NETWORKS[name]()).requires_grad_(True)
            images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
        self.model.card = itf.ModelCard(name, (0.5,) * 3, (0.3,) * 3, (3, 8, 8), 4, "noise")
        self.data = itf.ImageData("noise", "train", images, torch.arange(24) % 4, tuple("abcd"))
        self.images = (images.float() / 255 - 0.5) / 0.3
        self.groups = itf.find_groups(self.model, self.images[:1])
        self.logits = self.model(self.images).detach()

    def pruned(self, merge: str) -> Pruned:
        return cut(self.model, self.groups, 0.5, merge=merge, data=self.data)


@pytest.fixture(scope="module", params=NETWORKS)
def made(request: pytest.FixtureRequest, random_weights: Callable) -> Made:
    return Made(request.param, random_weights)


def in_turn(names: Sequence[str], each: int) -> list[tuple[str, str]]:
    """Give every network `each` of these names, so that every name has its share of the networks."""
    return [(network, names[(place * each + i) % len(names)]) for place, network in enumerate(NETWORKS) for i in range(each)]


def fit_for_use(small: nn.Module, made: Made) -> None:
    """In eval mode, with answers that are numbers, and ready for a step of training."""
    assert not any(layer.training for layer in small.modules() if not isinstance(layer, nn.Identity))
    logits = small(made.images)
    assert logits.isfinite().all()
    parameters = dict(small.named_parameters())
    assert all(p.requires_grad for p in parameters.values())
    assert not any(t.is_inference() for t in (*parameters.values(), *small.buffers()))
    before = small(made.images).detach()
    small.train()
    F.cross_entropy(small(made.images), made.data.labels).backward()
    assert all(p.grad is not None for p in parameters.values())
    torch.optim.SGD(parameters.values(), 0.1).step()
    assert not torch.equal(small(made.images), before)


@pytest.mark.parametrize(("made", "merge"), in_turn(list(MERGES), 4), indirect=["made"])
def test_every_merge(merge, made):
    if merge == "fold-r" and not any(isinstance(layer, _NormBase) for layer in made.model.modules()):
        pytest.skip("no norms")
    small = made.pruned(merge).small
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in made.model.parameters())
    fit_for_use(small, made)


@pytest.mark.parametrize(("made", "recovery"), in_turn([name for name in RECOVERIES if name != "none"], 4), indirect=["made"])
def test_every_recovery(recovery, made):
    pruned = made.pruned("refit" if made.model.card.name in AFTER_REFIT else "drop")
    shapes = {name: value.shape for name, value in pruned.small.state_dict().items()}
    before = pruned.small(made.images)
    recover(pruned, recovery, made.data, HOW)
    assert {name: value.shape for name, value in pruned.small.state_dict().items()} == shapes
    assert not torch.equal(pruned.small(made.images), before)
    fit_for_use(pruned.small, made)


@pytest.mark.parametrize(("made", "way"), in_turn(["refit-all", "repair", "finetune", "overparam"], 2), indirect=["made"])
def test_what_is_frozen_stays_so(way, made):
    name = next(name for name, p in made.model.named_parameters() if name.endswith("weight") and p.ndim > 1)
    weight = made.model.get_parameter(name)
    weight.requires_grad_(False)
    try:
        pruned = made.pruned(way if way in MERGES else "drop")
        if way in RECOVERIES:
            recover(pruned, way, made.data, HOW)
    finally:
        weight.requires_grad_(True)
    frozen = [name for name, p in pruned.small.named_parameters() if not p.requires_grad]
    assert frozen[0] == name
    assert len(frozen) <= 2  # the bias that it is given by folding, too


@pytest.mark.parametrize("merge", ["refit", "refit-all"])
def test_a_fit_is_nearer_than_dropping(merge, made):
    errors = {name: (made.pruned(name).small(made.images) - made.logits).square().mean() for name in ("drop", merge)}
    assert errors[merge] < 0.8 * errors["drop"]


def inputs_of_norms(small: nn.Module, made: Made) -> dict[str, Tensor]:
    """What the norms with running statistics read, by name, float64."""
    read: dict[str, Tensor] = {}
    for name, layer in small.named_modules():
        if isinstance(layer, _NormBase) and layer.running_mean is not None:
            layer.register_forward_pre_hook(lambda layer, x, name=name: read.__setitem__(name, x[0].double()))
    with torch.no_grad():
        small(made.images)
    return read


def test_bn_reset_measures_every_norm_that_stays(made):
    pruned = made.pruned("drop")
    recover(pruned, "bn-reset", made.data)
    for name, x in inputs_of_norms(pruned.small, made).items():
        norm, pixels = pruned.small.get_submodule(name), x.flatten(2)
        if isinstance(norm, nn.InstanceNorm2d):
            mean, var = pixels.mean((0, 2)), pixels.var(2).mean(0)
        else:
            mean, var = pixels.mean((0, 2)), pixels.transpose(0, 1).flatten(1).var(1)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-4, atol=1e-4)


def test_bn_reset_gives_folded_layers_the_statistics_of_their_norms(made):
    pruned = made.pruned("drop")
    recover(pruned, "bn-reset", made.data)
    fit = pruned.fit(made.data)
    folded = {name: norm for name, layer in fit.dense.named_modules() if (norm := norm_of(layer))}
    for name, norm in folded.items():
        layer, rows = pruned.small.get_submodule(name), fit.rows(name)
        with watching(pruned.small, [name]) as seen, torch.no_grad():
            pruned.small(made.images)
        outputs = seen[name].double().movedim(1, -1).flatten(0, -2)
        assert outputs.shape[1] == len(rows) == layer.out_channels
        torch.testing.assert_close(outputs.mean(0), rows @ norm.beta, rtol=1e-4, atol=1e-4)
        alive = outputs.std(0) > 1e-6
        torch.testing.assert_close(outputs.std(0, False)[alive], (rows @ norm.gamma.abs())[alive], rtol=1e-3, atol=1e-4)


def test_repair_gives_every_layer_its_statistics(made):
    pruned = made.pruned("drop")
    recover(pruned, "repair", made.data)
    fit = pruned.fit(made.data)
    names = fit.walk.cuts.layers()[:-1]
    with watching(pruned.small, names) as ours, watching(fit.dense, names) as theirs, torch.no_grad():
        pruned.small(made.images), fit.dense(made.images)
    for name in names:
        rows, layer = fit.rows(name).float(), pruned.small.get_submodule(name)
        small, dense = (rows_of(layer, seen[name]) for seen in (ours, theirs))
        torch.testing.assert_close(small.mean(0), rows @ dense.mean(0), rtol=1e-3, atol=1e-3)
        alive = small.std(0) > 1e-6
        torch.testing.assert_close(small.std(0)[alive], (rows @ dense.std(0))[alive], rtol=1e-3, atol=1e-3)


class TestALayerThatCannotBeFitted:
    @pytest.fixture(scope="class", params=[Standardised, Halved])
    def odd(self, request, random_weights) -> Made:
        layers = [nn.Conv2d(6, 8, 1), nn.ReLU(), request.param(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(NETWORKS, "odd", lambda: Head(*_stem(), *layers))
            return Made("odd", random_weights)

    @pytest.mark.parametrize("merge", ["calibrated", "refit", "refit-all"])
    def test_is_named_where_it_reads_what_went(self, merge, odd):
        if isinstance(odd.model.body[5], Standardised):
            assert next(group for group in odd.groups if group.name == "body.3").reason  # so it never reads fewer
            return
        with pytest.raises(itf.IntrafusionError, match=r"^cannot fit layer body\.5 \(Halved\)"):
            odd.pruned(merge)

    def test_is_left_alone_where_nothing_went(self, odd):
        small = cut(odd.model, odd.groups, 0.5, merge="refit-all", groups=["body.0"], data=odd.data).small
        assert torch.equal(small.body[5].weight, odd.model.body[5].weight)
        assert not torch.equal(small.head.weight, odd.model.head.weight)

    @pytest.mark.parametrize("recovery", [name for name in RECOVERIES if name != "none"])
    def test_recoveries_leave_it_as_it_is_or_train_it(self, recovery, odd):
        pruned = odd.pruned("drop")
        before = pruned.small.body[5].weight.clone()
        recover(pruned, recovery, odd.data, HOW)
        whole = recovery in ("finetune", "distill", "similarity", "perp-lora", "perp-masklora") or "over" in recovery
        assert torch.equal(pruned.small.body[5].weight, before) != whole
        fit_for_use(pruned.small, odd)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16], ids=str, scope="class")
class TestPrecision:
    """Networks in another precision, which they keep."""

    @pytest.fixture(scope="class")
    def other(self, kind, random_weights) -> Made:
        made = Made("depthwise", random_weights)
        made.model.to(kind)
        made.images = made.images.to(kind)
        made.groups = itf.find_groups(made.model, made.images[:1])
        made.logits = made.model(made.images).detach()
        return made

    @pytest.mark.parametrize("merge", MERGES)
    def test_merges(self, merge, other, kind):
        small = other.pruned(merge).small
        assert {value.dtype for value in small.state_dict().values()} - {torch.int64} == {kind}
        assert small(other.images).isfinite().all()

    @pytest.mark.parametrize("merge", ["calibrated", "refit"])
    def test_fits_are_nearer_than_dropping(self, merge, other, kind):
        with torch.no_grad():
            answers = [other.pruned(name).small(other.images) for name in ("drop", merge)]
        errors = [float((logits - other.logits).double().square().mean()) for logits in answers]
        assert errors[1] < 0.5 * errors[0]

    @pytest.mark.parametrize("recovery", ["bn-reset", "repair", "perp-lora", "overparam", "distill"])
    def test_recoveries(self, recovery, other, kind):
        pruned = other.pruned("drop")
        before = pruned.small(other.images)
        recover(pruned, recovery, other.data, HOW)
        assert {value.dtype for value in pruned.small.state_dict().values()} - {torch.int64} == {kind}
        assert not torch.equal(pruned.small(other.images), before)


class Twice(nn.Module):
    """A norm that reads two different maps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv1, self.conv2 = Batch(6), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.conv2(F.relu(self.conv1(self.norm(x)))))


@pytest.mark.parametrize("way", ["fold-r", "bn-reset"])
def test_a_norm_that_runs_twice_is_named(way, random_weights, monkeypatch):
    monkeypatch.setitem(NETWORKS, "twice", lambda: Head(nn.Conv2d(3, 6, 3), Twice()))
    made = Made("twice", random_weights)
    with pytest.raises(itf.IntrafusionError, match=r"^cannot fit body\.1\.norm: it does not run exactly once"):
        made.pruned("fold-r") if way == "fold-r" else recover(made.pruned("drop"), way, made.data)


def test_a_network_in_training_mode_comes_back_in_that_mode(made):
    pruned, again = made.pruned("drop"), made.pruned("drop")
    again.small.train()
    for one in (pruned, again):
        recover(one, "repair", made.data)
    assert again.small.training
    assert not pruned.small.training
    for ours, theirs in zip(pruned.small.parameters(), again.small.parameters(), strict=True):
        assert torch.equal(ours, theirs)


REAL = {  # a merge and a recovery on each
    "mobilenet_v2": ("refit", "finetune"),
    "efficientnet_b0": ("fold-r", "repair"),
    "regnet_y_400mf": ("refit", "bn-reset"),
    "resnext": ("refit", "repair"),
}


def _resnext(num_classes: int) -> nn.Module:
    """ResNeXt-50 with one block in each stage."""
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=num_classes, groups=32, width_per_group=4)


@pytest.mark.parametrize("name", REAL)
def test_real_networks(name):
    """Random weights, images of 32 pixels, the three smallest groups with a depthwise or grouped convolution."""
    from torchvision import models

    with torch.random.fork_rng():
        torch.manual_seed(0)
        make = getattr(models, name, _resnext)
        model = make(num_classes=4).eval()
    model.card = itf.ModelCard(name, (0.5,) * 3, (0.3,) * 3, (3, 32, 32), 4, "noise")
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = itf.ImageData("noise", "train", images, torch.arange(20) % 4, tuple("abcd"))
    found = itf.find_groups(model, torch.zeros(1, 3, 32, 32))
    mixing = [group for group in found if group.reason is None and group.role(CHANNELWISE)]
    chosen = [group.name for group in sorted(mixing, key=lambda group: group.size)[:3]]
    assert len(chosen) == 3
    merge, recovery = REAL[name]
    pruned = cut(model, found, 0.5, merge=merge, groups=chosen, data=data)
    before = pruned.small((images.float() / 255 - 0.5) / 0.3)
    recover(pruned, recovery, data, HOW)
    after = pruned.small((images.float() / 255 - 0.5) / 0.3)
    assert after.isfinite().all()
    assert not torch.equal(after, before)
