"""Forwards of every kind: cut networks answer as the whole ones, and merges that fit do better than dropping."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion as itf
from intrafusion.evaluation.incremental import Meter
from intrafusion.evaluation.output_mixing import remixed
from intrafusion.models.fx.partition import Cuts, trace
from intrafusion.models.fx.sharing import differing
from intrafusion.pruning.groups.feature_maps import private
from intrafusion.pruning.groups.find import find_groups
from intrafusion.pruning.groups.norms import fold_groups
from intrafusion.pruning.merge.layer_calls import Calls
from intrafusion.pruning.pruner import prune_groups

SIZE = 8  # of the images
CARD = itf.ModelCard("forward", (0.5,) * 3, (0.3,) * 3, (3, SIZE, SIZE), 5, "noise")


class Net(nn.Module):
    """Two convolutions and a linear layer. step(net, x, images): what lies between the convolutions."""

    def __init__(self, step: Callable):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 5)
        self.scale, self.step, self.plain = nn.Parameter(torch.tensor(0.7)), step, torch.tensor(0.3)
        self.register_buffer("shift", torch.linspace(0, 1, SIZE))
        self.own = Doubling()

    def forward(self, images: Tensor) -> Tensor:
        x = self.step(self, F.relu(self.a(images)), images)
        return self.c(F.relu(self.b(x)).mean((2, 3)))


class Doubling(nn.Module):
    """Its code depends on the shape, and it holds no layer."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != SIZE:
            raise ValueError("another size")
        return 2 * x


def _later(net: Net, x: Tensor, _: Tensor) -> Tensor:
    F.leaky_relu(x.sub_(0.2), 0.5, inplace=True)
    return x


def _behind(net: Net, x: Tensor, _: Tensor) -> Tensor:
    x[:, :, 2:5].mul_(-0.5)
    return x


def _set(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 0] = 0.5
    return x


CUT: dict[str, Callable] = {
    "a dict": lambda net, x, _: {"x": x}["x"],
    "sizes": lambda net, x, _: x.flatten(2).view(x.size(0), -1, SIZE, SIZE),
    "the images' sizes": lambda net, x, images: x.flatten(1).view(images.shape[0], -1, SIZE, images.size(3)),
    "a constant": lambda net, x, _: x * torch.tensor(0.5),
    "ones": lambda net, x, _: x + torch.ones(1, 1, SIZE, SIZE),
    "linspace": lambda net, x, _: x * torch.linspace(0.5, 1, x.shape[-1], device=x.device),
    "new_ones": lambda net, x, _: x + x.new_ones(1, 1, 1, SIZE),
    "a constant changed in place": lambda net, x, _: x + torch.zeros(SIZE).add_(net.shift),
    "a buffer": lambda net, x, _: x + net.shift,
    "a computed buffer": lambda net, x, _: x + (net.shift * 2 + 1).sqrt(),
    "a parameter": lambda net, x, _: x * net.scale,
    "a plain tensor": lambda net, x, _: x * net.plain,
    "float": lambda net, x, _: (x.float() * 0.5).to(torch.float32),
    "double and back": lambda net, x, _: x.double().exp().sqrt().to(net.b.weight.dtype),
    "a dtype": lambda net, x, _: x + torch.full((), 0.5, dtype=torch.float64),
    "a mask of the images": lambda net, x, images: x.masked_fill(images.mean(1, keepdim=True) > 0, 0.1),
    "indices of the images": lambda net, x, images: x * images.argmax(1, keepdim=True),
    "a module with code of its own": lambda net, x, _: net.own(x),
    "in place": lambda net, x, _: x.mul_(0.5).add_(1),
    "in place, read later": _later,
}
WHOLE: dict[str, Callable] = {
    "if": lambda net, x, _: x * 2 if x.shape[2] > 7 else x,
    "data": lambda net, x, images: x * 2 if images.sum() < 1e9 else x,
    "range": lambda net, x, _: torch.cat([x[i : i + 1] * 2 for i in range(x.shape[0])]),
    "len": lambda net, x, _: x * 2 if len(x) else x,
    "a root": lambda net, x, _: x.flatten(2).unflatten(2, (int(math.sqrt(SIZE * x.shape[-1])), -1)),
    "words": lambda net, x, _: {f"{SIZE}": x * 2}[f"{x.shape[-1]}"],
    "more images' sizes": lambda net, x, images: x.flatten(1).view(images.shape[0], -1, *images.shape[2:]),
    "expanded": lambda net, x, _: x + torch.zeros(1, 1, 1, 1).expand(x.shape[0], -1, SIZE, SIZE),
    "set": lambda net, x, _: _set(x),
    "in place, through a view": _behind,
}


def made(step: Callable, fill: Callable) -> nn.Module:
    torch.manual_seed(0)
    net = fill(Net(step) if not isinstance(step, type) else step())
    net.card = CARD
    return net


@pytest.fixture(scope="module")
def data() -> itf.ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (150, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return itf.ImageData("noise", "train", images, torch.arange(150) % 5, tuple("abcde"))


def inputs(data: itf.ImageData) -> Tensor:
    return (data.images.float() / 255 - 0.5) / 0.3


ALL = {**CUT, **WHOLE}


@pytest.mark.parametrize("name", ALL)
def test_what_can_be_cut(name, random_weights):
    net = made(ALL[name], random_weights)
    before = {*vars(net)}
    assert (trace(net, torch.randn(4, 3, SIZE, SIZE)) is not None) == (name in CUT)
    assert {*vars(net)} == before


@pytest.mark.parametrize("step", CUT.values(), ids=CUT)
def test_head_and_tail_are_the_network(step, random_weights, data, same_logits):
    dense, images = private(made(step, random_weights)), inputs(data)[:7]
    cuts, groups = Cuts(dense, images), find_groups(dense, images[:1])
    for chosen in (["a"], ["b"], ["a", "b"]):
        small = prune_groups(dense, groups, 0.5, groups=chosen)
        names = cuts.in_front_of(differing(dense, small))
        with torch.inference_mode():
            values = cuts.head(cuts.input, names)(dense, images)
            kept = [value.clone() for value in values]
            for part in (slice(None), slice(2, 3), slice(4, 7)):  # of each value
                same_logits(cuts.tail(names)(small, *(value[part] for value in values))[0], small(images[part]))
            assert all(map(torch.equal, values, kept))


@pytest.mark.parametrize("step", ALL.values(), ids=ALL)
def test_sweeps_count_what_the_networks_get_right(step, random_weights, data, monkeypatch):
    monkeypatch.setattr("intrafusion.evaluation.incremental.has_bf16", lambda device: False)
    dense = private(made(step, random_weights))
    dense.card = CARD
    groups, meter = find_groups(dense, inputs(data)[:1]), Meter(dense, data, batch=64)
    for chosen in (["b"], ["a", "b"], ["a"]):
        small = prune_groups(dense, groups, 0.5, groups=chosen)
        found = meter.correct(small, differing(dense, small), 0, 100)
        with torch.inference_mode():
            right = small(inputs(data)[meter.order]).argmax(1) == meter.labels
        assert torch.equal(found, right[:100])


def errors(net: nn.Module, data: itf.ImageData, *merges: str) -> list[float]:
    """How far the logits of half the network are from its own on the images, by the merge that made it."""
    groups, found = find_groups(net, inputs(data)[:1]), []
    with torch.inference_mode():
        expected = net(inputs(data))
    for merge in merges:
        small = prune_groups(net, groups, 0.5, merge=merge, data=data)
        with torch.inference_mode():
            found.append(float((small(inputs(data)) - expected).square().mean()))
    return found


@pytest.mark.parametrize("step", ALL.values(), ids=ALL)
def test_merges_that_fit_are_closer_than_dropping(step, random_weights, data):
    drop, calibrated, refit = errors(made(step, random_weights), data, "drop", "calibrated", "refit")
    assert calibrated < drop
    assert refit < 0.7 * drop


class Padded(nn.Conv2d):
    """Pads by itself, as the convolutions of many EfficientNets do."""

    def forward(self, x: Tensor) -> Tensor:
        more = max(0, (x.shape[2] - 1) // self.stride[0] * self.stride[0] + self.kernel_size[0] - x.shape[2])
        x = F.pad(x, (more // 2, more - more // 2) * 2) if more else x
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / deviation, self.bias)


class Activated(nn.BatchNorm2d):
    """A norm with its activation inside."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError("no maps")
        return self.act(super().forward(x))


class Scaling(nn.Linear):
    """With a layer of its own kind inside: the trace goes into it."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.more = nn.Linear(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * self.more(x)


class Subclasses(nn.Module):
    """body: layers from 8 to 8 channels, each of which must be a layer of the trace."""

    def __init__(self, *body: nn.Module):
        super().__init__()
        self.stem, self.body, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(*body), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(self.body(F.relu(self.stem(x))))).mean((2, 3)))


OWN = Padded, Standardised, Activated
SUBCLASSES: dict[str, Callable[[], list[nn.Module]]] = {
    "padded": lambda: [Padded(8, 8, 3, stride=2), nn.ReLU()],
    "padded, grouped": lambda: [Padded(8, 8, 3, stride=2, groups=8), nn.ReLU()],
    "norm and activation": lambda: [nn.Conv2d(8, 8, 1), nn.ReLU(), Activated(8)],
    "standardised": lambda: [Standardised(8, 8, 3, padding=1), nn.ReLU()],
}


@pytest.mark.parametrize("body", SUBCLASSES.values(), ids=SUBCLASSES)
def test_layers_with_a_forward_of_their_own_are_kept_whole(body, random_weights, data, same_logits):
    torch.manual_seed(0)
    net, images = random_weights(Subclasses(*body())), inputs(data)[:5]
    groups = find_groups(net, images[:1])
    dense = private(net)
    fold_groups(dense, groups)
    cuts = Cuts(dense, images)
    assert cuts.layers() == Calls(dense, images).layers()
    assert cuts.layers(*OWN) == [name for name, layer in dense.named_modules() if isinstance(layer, OWN)] != []
    prunable = [group.name for group in groups if group.reason is None]
    assert prunable
    for name in prunable:
        small = prune_groups(dense, groups, 0.5, groups=[name])
        mixed, again = remixed(dense, small, cuts.first_of(differing(dense, small)))
        assert not again.intersection(cuts.layers(*OWN))
        names = cuts.in_front_of(differing(dense, small), again)
        with torch.inference_mode():
            values = cuts.head(cuts.input, names)(dense, images)
            same_logits(cuts.tail(names, again)(mixed, *values)[0], small(images))
        assert cuts.misfit(small, images) is None


def test_a_layer_with_layers_inside_is_traced_into(random_weights):
    net = random_weights(nn.Sequential(nn.Flatten(), Scaling(12, 8), nn.ReLU(), nn.Linear(8, 5)))
    assert Cuts(net, torch.randn(3, 3, 2, 2)).layers() == ["1.more", "3"]


class Twofold(nn.Module):
    """Its first layers have two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.more = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.body = nn.Sequential(self.conv, nn.ReLU(), self.more, nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Reused(nn.Module):
    """One layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.inner, self.last, self.head = nn.Conv2d(8, 9, 1), nn.Conv2d(9, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.conv(x))))))
        return self.head(F.relu(self.last(F.relu(self.inner(x)))).mean((2, 3)))


class OneByOne(Twofold):
    """From image to image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(OneByOne, self).forward(x[i : i + 1]) for i in range(x.shape[0])])


class Explaining(Twofold):
    """Its code has words of its own for every exception."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x if len(x) else -x)
        except Exception as error:
            raise RuntimeError("the network failed") from error


class Packed(Twofold):
    def forward(self, *args: Tensor, mask: Tensor | None = None) -> Tensor:
        (x,) = args
        return super().forward(x if mask is None else x * mask)


class Named(Twofold):
    """Its layers are given what they read by its name."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.more(input=F.relu(self.conv(input=x))))
        return self.head(input=x.mean((2, 3)))


class Normalising(Twofold):
    """It works on its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.1).mul_(1.5))


class NormalisingWhole(Twofold):
    """And torch.fx cannot follow it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.1).mul_(1.5) if len(x) else x)


class Encoder(nn.Module):
    """Its layers are hidden in one of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class Windows(Twofold):
    """Its second convolution sees four windows an image, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        count, channels = x.shape[0], x.shape[1]
        x = x.reshape(count, channels, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, 4, 4)
        x = F.relu(self.more(x))
        return self.head(x.mean((2, 3)).reshape(count, 4, -1).mean(1))


FORMS = (Twofold, Reused, OneByOne, Explaining, Packed, Named, Normalising, NormalisingWhole, Encoder, Windows)


@pytest.mark.parametrize("form", FORMS)
def test_merges_and_sweeps_of_other_forms(form, random_weights, data, monkeypatch):
    monkeypatch.setattr("intrafusion.evaluation.incremental.has_bf16", lambda device: False)
    net = made(form, random_weights)
    drop, calibrated, refit = errors(net, data, "drop", "calibrated", "refit")
    assert calibrated < drop
    assert refit < 0.7 * drop
    dense = private(net)
    dense.card = CARD
    groups, meter = find_groups(dense, inputs(data)[:1]), Meter(dense, data, batch=64)
    for name in [group.name for group in groups if group.reason is None]:
        small = prune_groups(dense, groups, 0.5, groups=[name])
        found = meter.correct(small, differing(dense, small), 0, 100)
        with torch.inference_mode():
            right = small(inputs(data)[meter.order]).argmax(1) == meter.labels
        assert torch.equal(found, right[:100]), name
