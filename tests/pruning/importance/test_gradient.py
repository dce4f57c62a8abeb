import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

import intrafusion as itf
from intrafusion.data.datasets import normalise
from intrafusion.pruning.importance import gradient


def losses(model, data):
    """The cross-entropy of each image, float (N,)."""
    images = normalise(data.images, model.card.mean, model.card.std)
    return F.cross_entropy(model(images), data.labels, reduction="none")


@pytest.mark.parametrize(
    ("criterion", "written", "read"),
    [
        # over both images the slopes at the weights are (0.4, -0.2) where written and +-(0.2, 0.4) where read
        ("taylor", [0.4, 0.4], [1.2, 0.4]),
        ("taylor_sum", [0.4, 0.4], [0.8 - 0.4, 0.4]),
        # and their squares 0.52 (1, 1/4) and 0.13 (1, 4) on average
        ("obd", [0.52, 0.52], [0.13 * 20, 0.52]),
    ],
)
def test_by_hand(even_net, criterion, written, read):
    model, group, data = even_net
    scores = itf.score(model, group, criterion, data)
    torch.testing.assert_close(scores, torch.tensor([written, read]).double().mean(0), rtol=1e-5, atol=0)


def test_a_flattened_channel_counts_all_of_its_weights(networks):
    network = networks("vgg")
    model = copy.deepcopy(network.model)
    last = model.classifier[0]
    last.weight.requires_grad_()
    losses(model, network.data).mean().backward()
    change = (last.weight * last.weight.grad).detach().unflatten(1, (8, 4)).transpose(0, 1).flatten(1)  # 2x2 pixels each
    conv = model.features[4]
    conv.weight.requires_grad_()
    losses(model, network.data).mean().backward()
    written = (conv.weight * conv.weight.grad).detach().flatten(1)
    for criterion, expected in (
        ("taylor", (change.abs().sum(1) + written.abs().sum(1)) / 2),
        ("taylor_sum", (change.sum(1).abs() + written.sum(1).abs()) / 2),
    ):
        scores = itf.score(network.model, network.group("features.4"), criterion, network.data)
        torch.testing.assert_close(scores, expected.double(), rtol=1e-4, atol=1e-8)


class ReadsWhatItWrites(nn.Module):
    """The middle layer is a producer and a consumer of the same channels."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.first(x.flatten(1))
        return self.last(F.relu(h + self.middle(F.relu(h))))


def test_a_layer_that_reads_what_it_writes_counts_twice():
    torch.manual_seed(0)
    model = ReadsWhatItWrites().eval()
    model.card = itf.ModelCard("loop", (0.0,), (1.0,), (1, 2, 2), 2, "noise")
    data = itf.ImageData("noise", "test", torch.randint(256, (1, 1, 2, 2), dtype=torch.uint8), torch.tensor([1]), ("a", "b"))
    (group,) = (group for group in itf.find_groups(model, model.card.example()) if group.reason is None)
    losses(model, data).sum().backward()
    first, middle, last = (layer.weight.detach() * layer.weight.grad for layer in model.children())
    for criterion, power in (("taylor", 1), ("obd", 2)):
        rows = first.abs() ** power, middle.abs() ** power, middle.T.abs() ** power, last.T.abs() ** power
        expected = torch.stack([row.sum(1) for row in rows]).mean(0)
        torch.testing.assert_close(itf.score(model, group, criterion, data), expected.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet-projection"])
def test_gradient_criteria_are_torch_prunings(networks, torch_pruning, same_up_to_scale, name):
    network = networks(name)
    folded = itf.fold(network.model, network.example).requires_grad_(True)
    losses(folded, network.data).mean().backward()
    for group in network.prunable:
        theirs = torch_pruning(folded, group.name, tp.importance.TaylorImportance())
        same_up_to_scale(itf.score(network.model, group, "taylor", network.data), theirs)
        if name != "vgg":  # it sums over each input of a flattened channel by itself
            theirs = torch_pruning(folded, group.name, tp.importance.TaylorImportance(multivariable=True))
            same_up_to_scale(itf.score(network.model, group, "taylor_sum", network.data), theirs, rtol=1e-3)
    squares = {parameter: torch.zeros_like(parameter) for parameter in folded.parameters()}
    for loss in losses(folded, network.data):
        folded.zero_grad()
        loss.backward(retain_graph=True)
        for parameter, total in squares.items():
            total += parameter.grad**2
    for parameter, total in squares.items():
        parameter.grad = total
    for group in network.prunable:
        theirs = torch_pruning(folded, group.name, tp.importance.HessianImportance())
        same_up_to_scale(itf.score(network.model, group, "obd", network.data), theirs)


def test_torch_prunings_accumulated_hessian_is_the_last_images(networks, torch_pruning):
    # accumulate_grad asks for the parameter's name in a dict whose keys are the parameters, so it always starts anew
    network = networks("mlp")
    model = copy.deepcopy(network.model).requires_grad_(True)
    scores = []
    for images in (range(7), [6]):
        importance = tp.importance.HessianImportance()
        for image in images:
            model.zero_grad()
            losses(model, network.data)[image].backward()
            importance.accumulate_grad(model)
        scores.append(torch_pruning(model, "1", importance))
    assert torch.equal(*scores)


def test_obd_does_not_depend_on_how_many_gradients_are_held(networks, monkeypatch):
    network = networks("resnet-pad")
    arguments = network.model, network.group("layer2.0.conv1"), "obd", network.data
    expected = itf.score(*arguments)
    monkeypatch.setattr(gradient, "_PER_SAMPLE", 5000)  # 7 x 4 and 7 x 7 filters of 9: 7 images at once, 3 at the end
    torch.testing.assert_close(itf.score(*arguments), expected, rtol=1e-5, atol=0)


def test_images_without_a_label_are_left_out(networks):
    network = networks("mlp")
    labels = network.data.labels.clone()
    labels[::3] = -1
    some = replace(network.data, labels=labels)
    known = replace(network.data, images=network.data.images[labels >= 0], labels=labels[labels >= 0])
    for criterion in (entry.name for entry in itf.registry("criterion").values() if entry.needs == "labels"):
        scores = [itf.score(network.model, network.prunable[0], criterion, data) for data in (some, known)]
        assert torch.equal(*scores)
        with pytest.raises(itf.IntrafusionError, match="no image of noise has a label") as caught:
            itf.score(network.model, network.prunable[0], criterion, replace(some, labels=torch.full_like(labels, -1)))
        assert "\n" not in str(caught.value)


@pytest.mark.reference
def test_taylor_is_the_authors(reference, same_up_to_scale):
    model = itf.load_model("cifar10-resnet20", weights=reference("weights/cifar10_resnet20.th"))
    expected = np.load(reference("reference/resnet20_criteria.npz"))
    parity = np.load(reference("reference/resnet20_parity.npz"))
    images = torch.from_numpy(parity["images_uint8_nhwc"]).permute(0, 3, 1, 2)
    data = itf.ImageData("cifar10", "test", images, torch.from_numpy(parity["labels"]), tuple("0123456789"))
    groups = {group.name: group for group in itf.find_groups(model, model.card.example())}
    names = [key.removesuffix(".taylor") for key in expected.files if key.endswith(".taylor")]
    assert len(names) == 9
    for name in names:
        same_up_to_scale(itf.score(model, groups[name], "taylor", data), expected[f"{name}.taylor"])
