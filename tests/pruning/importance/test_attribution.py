import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerDeepLift
from torch import nn

import intrafusion as itf
from intrafusion.pruning.groups.feature_maps import private
from intrafusion.pruning.importance.attribution import separated


@pytest.mark.parametrize("criterion", ["activation-gradient", "deep-lift", "conductance"])
def test_by_hand(even_net, criterion):
    # the label's logit is 2 x + 2 x at x = 1 and 4 x + 0 at x = 0.2, linear in x on the way from 0
    model, group, data = even_net
    expected = torch.tensor([(2 + 0.8) / 2, (2 + 0) / 2]).double()
    if criterion == "conductance":  # 17 Gauss-Legendre points do not quite reach the ends of the way
        points = np.polynomial.legendre.leggauss(17)[0]
        expected *= (points[-1] - points[0]) / 2
    torch.testing.assert_close(itf.score(model, group, criterion, data), expected, rtol=1e-5, atol=0)


class TwoReaders(nn.Module):
    """Channels h that two layers read, one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        h = F.relu(self.first(x.flatten(1)))
        return self.left(h) + self.right(h)


@pytest.mark.parametrize("criterion", ["activation-gradient", "deep-lift", "conductance"])
def test_each_reader_answers_for_its_own_path(criterion):
    torch.manual_seed(0)
    model = TwoReaders().eval()
    model.first.bias.data.zero_()
    model.card = itf.ModelCard("two readers", (0.0,), (1.0,), (1, 2, 2), 2, "noise")
    data = itf.ImageData("noise", "test", torch.full((1, 1, 2, 2), 200, dtype=torch.uint8), torch.tensor([1]), ("a", "b"))
    h = F.relu(model.first(torch.full((1, 4), 200 / 255)))[0].detach()
    expected = ((h * model.left.weight[1]).abs() + (h * model.right.weight[1]).abs()) / 2
    scores = itf.score(model, itf.find_groups(model, model.card.example())[0], criterion, data)
    torch.testing.assert_close(scores, expected.detach().double(), rtol=0.02 if criterion == "conductance" else 1e-5, atol=1e-6)


def gap(model, layer, images, labels):
    """How far the attributions that enter the first layer are from adding up to the logits' difference to the baseline's."""
    explainer = LayerDeepLift(model, model.get_submodule(layer))
    images = images.double().requires_grad_()
    parts = explainer.attribute(images, target=labels, attribute_to_layer_input=True).detach().flatten(1).sum(1)
    with torch.no_grad():
        difference = (model(images) - model(torch.zeros_like(images)))[torch.arange(len(labels)), labels]
    return float((parts - difference).abs().max() / difference.abs().max())


class Activated(nn.Module):
    """An activation after each of two layers."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Linear(4, 3)
        self.activation = activation

    def forward(self, x):
        return self.third(self.activation(self.second(self.activation(self.first(x)))).mean((2, 3)))


ACTIVATIONS = {
    "one nn.ReLU": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "relu": lambda x: x.relu(),
    "relu_": lambda x: x.relu_(),
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "F.gelu": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": lambda x: x.sigmoid(),
    "torch.tanh": torch.tanh,
    "F.max_pool2d": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "nn.ReLU6": nn.ReLU6(),
    "nn.Hardswish": nn.Hardswish(),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_attributions_add_up_for_every_form_of_activation(name):
    torch.manual_seed(0)
    model = Activated(ACTIVATIONS[name]).double().eval()
    images, labels = torch.randn(5, 1, 6, 6), torch.tensor([0, 1, 2, 0, 1])
    assert gap(separated(model), "first", images, labels) < 1e-6


class Shared(nn.Module):
    """What enters an activation is read by another layer too."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(8, 3)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.first(x)
        return self.third(torch.cat([self.relu(x).mean((2, 3)), self.second(x).mean((2, 3))], 1))


class Windows(nn.Module):
    """Max-pooling whose windows overlap."""

    def __init__(self):
        super().__init__()
        self.first, self.pool, self.third = nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.third(self.pool(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "make",
    [Shared, Windows],
)
def test_attributions_add_up_where_captums_own_do_not(make):
    torch.manual_seed(0)
    model = make().double().eval()
    images, labels = torch.randn(5, 1, 7, 7), torch.tensor([0, 1, 2, 0, 1])
    assert gap(separated(model), "first", images, labels) < 1e-6
    assert gap(private(model), "first", images, labels) > 0.01


@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet-projection", "conv1"), ("fire", "body.0"), ("densenet", "features.conv0"), ("mobilenet", "features.0.0")],
)
def test_attributions_add_up_in_the_prepared_copy_alone(networks, name, layer):
    network = networks(name)
    model, labels = copy.deepcopy(network.model).double(), torch.tensor([0, 1, 2, 3])
    assert gap(separated(model), layer, network.images, labels) < 1e-6
    assert gap(private(model), layer, network.images, labels) > 0.01


def test_the_prepared_copy_computes_the_same_under_the_same_layer_names(network, same_logits):
    prepared = separated(network.model)
    same_logits(prepared(network.images), network.logits)
    for layer in (layer for group in network.prunable for layer in group.role("consumer")):
        assert type(prepared.get_submodule(layer.name)) is type(network.model.get_submodule(layer.name))


class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.first(x.flatten(1))
        return self.second(h if h.sum() > 0 else -h)


def test_a_network_that_cannot_be_traced_is_one_clear_line():
    with pytest.raises(itf.IntrafusionError, match=r"torch\.fx can trace") as caught:
        separated(Stubborn())
    assert "\n" not in str(caught.value)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) if self.bias is not None else x @ self.weight.T


def test_layers_of_a_users_own_class_are_kept_whole():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), OwnLinear(3, 2))
    assert "3" in {node.target for node in separated(model).graph.nodes}


def test_other_threads_may_run_networks_during_the_trace():
    other, seen = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), []

    class Meanwhile(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            with ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(other, torch.ones(1, 4)).result())
            return self.layer(x.flatten(1))

    prepared = separated(Meanwhile())
    torch.testing.assert_close(seen, [other(torch.ones(1, 4))])
    assert [node.target for node in prepared.graph.nodes if node.op == "call_module"] == ["layer"]
