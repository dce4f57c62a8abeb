import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import intrafusion as itf
from intrafusion.models.hub import ARCHITECTURES

# CIFAR-100's architectures are CIFAR-10's with another head, and deeper networks repeat the layers of shallower ones
REPEATED = ("resnet32", "resnet44", "resnet56", "resnet110", "vgg16_bn", "conv4", "conv6")
ZOO = [name for name in ARCHITECTURES if not name.startswith("cifar100") and not name.endswith(REPEATED)]


def norms(model):
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize("name", ZOO)
def test_folding_changes_no_logits_on_any_architecture_of_the_zoo(random_weights, same_logits, name):
    torch.manual_seed(0)
    model = random_weights(itf.load_model(name, weights="random"))
    images = torch.randn(2, *model.card.input_size)
    folded = itf.fold(model, model.card.example())
    assert not norms(folded)
    same_logits(folded(images), model(images))


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_folding_is_exact_whatever_eps(networks, same_logits, eps):
    network = networks("resnet-projection")
    model = copy.deepcopy(network.model)
    for norm in norms(model):
        norm.eps = eps
    folded = itf.fold(model, network.example)
    assert not norms(folded)
    same_logits(folded(network.images), model(network.images), tolerance=1e-5)


def test_folding_changes_no_logits(network, same_logits):
    same_logits(itf.fold(network.model, network.example)(network.images), network.logits)


def test_a_fold_is_the_formula():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=0.25), nn.Flatten(), nn.Linear(2, 2)).eval()
    conv, norm = model[0], model[1]
    conv.weight.data, conv.bias.data = torch.tensor([2.0, -3.0]).view(2, 1, 1, 1), torch.tensor([1.0, 0.5])
    norm.running_mean.copy_(torch.tensor([3.0, -1.0]))
    norm.running_var.copy_(torch.tensor([0.75, 3.75]))
    norm.weight.data, norm.bias.data = torch.tensor([5.0, -4.0]), torch.tensor([0.5, 2.0])
    folded = itf.fold(model, torch.zeros(1, 1, 1, 1))
    # std = sqrt(var + eps) = 1 and 2: w' = w gamma / std, b' = (b - mean) gamma / std + beta
    assert folded[0].weight.flatten().tolist() == [10.0, 6.0]
    assert folded[0].bias.tolist() == [-9.5, -1.0]


@pytest.mark.parametrize(("name", "left"), [("densenet", 6), ("pre-activation", 2), ("flat-norm", 1)])
def test_norms_that_read_a_sum_or_a_concatenation_stay(networks, name, left):
    network = networks(name)
    assert len(norms(itf.fold(network.model, network.example))) == left


class _Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.conv(x)
        return self.head((self.norm(x) + x.abs()).mean((2, 3)))


class _Twice(_Forked):
    def forward(self, x):
        return self.head(self.norm(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("make", [_Forked, _Twice])
def test_a_norm_whose_input_or_self_is_used_twice_is_not_folded(random_weights, same_logits, make):
    torch.manual_seed(0)
    model, images = random_weights(make()), torch.randn(4, 3, 8, 8)
    folded = itf.fold(model, images[:1])
    assert len(norms(folded)) == 1
    same_logits(folded(images), model(images))


@pytest.mark.parametrize("name", ["vgg", "resnet-projection", "resnet-pad", "densenet", "multiplier", "flat-norm"])
def test_pruning_the_folded_network_is_pruning_the_network(networks, same_logits, name):
    network = networks(name)
    folded = itf.fold(network.model, network.example)
    small, small_folded = (itf.prune(model, network.example, 0.5, merge="drop") for model in (network.model, folded))
    same_logits(small_folded(network.images), small(network.images))


class _OwnForward(nn.Conv2d):
    """Weights standardised at each pass: what folding multiplies does not come out multiplied."""

    def forward(self, x):
        weight = self.weight / self.weight.flatten(1).std(1).view(-1, 1, 1, 1)
        return F.conv2d(x, weight, self.bias, padding=1)


class _Read(nn.Module):
    """A convolution whose output is read by its norm, and once more in a way that no gradient shows."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)
        self.read = read

    def forward(self, x):
        y = self.conv(x)
        return self.head((self.norm(y) * self.read(y)).mean((2, 3)))


class _Tokens(nn.Module):
    """A linear layer on six tokens of six numbers, and a norm over the tokens, not over the numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.norm, self.head = (
            nn.Conv2d(3, 6, 3),
            nn.Linear(36, 6),
            nn.BatchNorm1d(6),
            nn.Linear(6, 5),
        )

    def forward(self, x):
        return self.head(self.norm(self.linear(self.conv(x).flatten(2))).mean(1))


class _Hooked(_Read):
    """A convolution whose output a hook keeps and the forward reads again."""

    def __init__(self):
        super().__init__(None)
        self.conv.register_forward_hook(self.keep)

    @staticmethod
    def keep(module, inputs, output):
        module.seen = output.detach()

    def forward(self, x):
        return self.head((self.norm(self.conv(x)) * self.conv.seen.tanh()).mean((2, 3)))


class _Names(nn.Module):
    """The same layers under two names: the first is where they are found, the second is how they run."""

    def __init__(self, whole):
        super().__init__()
        self.whole, self.stem, self.rest = whole, whole[:2], whole[2:]

    def forward(self, x):
        return self.rest(self.stem(x))


def _transposed(groups):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=groups, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


# network -> how many norms must stay as they are
HIDDEN = {
    "a transposed convolution": (lambda: _transposed(1), 1),
    "a transposed convolution in groups": (lambda: _transposed(4), 1),
    "a layer with a forward of its own": (
        lambda: nn.Sequential(_OwnForward(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(384, 5)), 1,
    ),
    "a detached reader": (lambda: _Read(lambda y: y.detach().sigmoid()), 1),
    "a comparison": (lambda: _Read(lambda y: (y > 0.1).float()), 1),
    "a hook": (_Hooked, 1),
    "a norm over tokens": (_Tokens, 1),
    "two names": (
        lambda: _Names(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))), 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HIDDEN)
def test_no_fold_changes_the_logits_unseen(random_weights, same_logits, case):
    torch.manual_seed(0)
    make, left = HIDDEN[case]
    model, images = random_weights(make()), torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(model).double()(images.double())
    for made in (itf.fold(model, images[:1]), itf.prune(model, images[:1], 0.0)):
        assert len(norms(made)) == left
        same_logits(made.double()(images.double()), expected, tolerance=1e-5)


def test_a_fold_that_loses_its_numbers_to_rounding_is_not_made(same_logits):
    """A mean 10^6 deviations from zero: a bias of that size has no room for the channel's own numbers in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 5)).eval()
    model[0].bias.data += 1e6
    model[1].running_mean.fill_(1e6)
    images = torch.randn(4, 3, 8, 8)
    same_logits(itf.fold(model, images[:1]).double()(images.double()), copy.deepcopy(model).double()(images.double()), 1e-4)


def test_folding_touches_nothing(networks):
    network = networks("resnet-pad")
    model = copy.deepcopy(network.model)
    state = copy.deepcopy(model.state_dict())
    folded = itf.fold(model, network.example)
    assert len(norms(model)) == len(norms(network.model)) > 0
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    folded.conv1.weight.data.zero_()
    folded.linear.weight.data.zero_()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_folding_twice_is_folding_once(networks):
    network = networks("resnet-pad")
    once = itf.fold(network.model, network.example)
    twice = itf.fold(once, network.example)
    assert all(torch.equal(value, twice.state_dict()[key]) for key, value in once.state_dict().items())


class Compared(nn.Module):
    """A layer whose output is compared with a number, too, which autograd's graph does not show."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Linear(channels, 4)

    def forward(self, x):
        y = self.conv(x)
        return self.head((self.norm(y) * (y > 0).to(y.dtype)).mean((2, 3)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_norm_stays_whose_layer_is_compared_with_a_number(channels, seed):
    torch.manual_seed(seed)
    model = Compared(channels).eval()  # with statistics of a new network, few of whose signs folding changes
    assert isinstance(itf.fold(model, torch.zeros(1, 3, 5, 5)).norm, nn.BatchNorm2d)
