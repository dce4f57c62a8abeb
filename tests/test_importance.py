from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import intrafusion as itf


def hidden(model, example):
    return itf.find_groups(model, example)[0]


@pytest.fixture
def hand_net():
    """Two hidden channels: row sums 3 and 3.5, column sums 4 and 1; in squares 5 and 9.25, 16 and 1."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    model[1].weight.data = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    model[1].bias.data = torch.tensor([100.0, -100.0])  # biases do not count
    model[3].weight.data = torch.tensor([[4.0, -1.0], [0.0, 0.0]])
    return model, hidden(model, torch.zeros(1, 1, 1, 2))


@pytest.mark.parametrize(("criterion", "means"), [("l1", [3.5, 2.25]), ("l2", [10.5, 5.125])])
def test_magnitudes_by_hand(hand_net, criterion, means):
    expected = torch.tensor(means, dtype=torch.float64)
    torch.testing.assert_close(itf.score(*hand_net, criterion), expected / expected.mean())


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_magnitudes_are_means_over_the_layers_that_hold_the_channel(networks, criterion, power):
    network = networks("resnet-pad")
    model = itf.fold(network.model, network.example)
    sums, counts = torch.zeros(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    # stages of 4, 7 and 12 channels: the pads before them put stage 1 at channels 3 to 6 and stage 2 at 2 to 8
    layers = [
        *((name, 0, first) for name, first in (("conv1", 3), ("layer1.0.conv2", 3))),
        *((name, 0, first) for name, first in (("layer2.0.conv2", 2), ("layer3.0.conv2", 0))),
        *((name, 1, first) for name, first in (("layer1.0.conv1", 3), ("layer2.0.conv1", 3))),
        *((name, 1, first) for name, first in (("layer3.0.conv1", 2), ("linear", 0))),
    ]
    for name, axis, first in layers:
        weight = model.get_submodule(name).weight.double().abs() ** power
        values = weight.transpose(0, axis).flatten(1).sum(1)
        sums[first : first + len(values)] += values
        counts[first : first + len(values)] += 1
    expected = sums / counts
    torch.testing.assert_close(itf.score(model, network.group("conv1"), criterion), expected / expected.mean())


def test_a_flattened_channel_counts_all_of_its_inputs():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 1)).eval()
    model[0].weight.data = torch.tensor([2.0, -6.0]).view(2, 1, 1, 1)
    model[2].weight.data = torch.arange(8.0)[None]  # channel 0 reads 0 to 3, channel 1 reads 4 to 7
    scores = itf.score(model, hidden(model, torch.zeros(1, 1, 2, 2)))
    expected = torch.tensor([(2 + 6) / 2, (6 + 22) / 2], dtype=torch.float64)
    torch.testing.assert_close(scores, expected / expected.mean())


def test_a_depthwise_convolution_is_a_layer_of_its_own():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1, groups=2), nn.Conv2d(2, 1, 1), nn.Flatten()).eval()
    for index, values in ((0, [1.0, 2.0]), (1, [3.0, -5.0]), (2, [8.0, 2.0])):
        model[index].weight.data = torch.tensor(values).view_as(model[index].weight)
    scores = itf.score(model, hidden(model, torch.zeros(1, 1, 2, 2)))
    torch.testing.assert_close(scores, torch.tensor([4.0, 3.0], dtype=torch.float64) / 3.5)


@pytest.mark.parametrize("criterion", ["l1", "l2", "random"])
def test_scores_see_norms_folded(network, criterion):
    folded = itf.fold(network.model, network.example)
    for group in network.prunable:
        scores = itf.score(network.model, group, criterion)
        assert scores.shape == (group.size,)
        assert scores.dtype == torch.float64
        torch.testing.assert_close(itf.score(folded, group, criterion), scores, rtol=1e-5, atol=1e-6)


def test_norms_weigh_in_by_the_formula():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.25), nn.Flatten(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([2.0, -3.0]).view(2, 1, 1, 1)
    model[1].running_var.copy_(torch.tensor([0.75, 3.75]))  # standard deviations 1 and 2
    model[1].weight.data = torch.tensor([5.0, -4.0])
    model[3].weight.data = torch.tensor([[2.0, 6.0]])
    scores = itf.score(model.eval(), hidden(model, torch.zeros(1, 1, 1, 1)))
    torch.testing.assert_close(scores, torch.tensor([6.0, 6.0], dtype=torch.float64) / 6)


def test_random_is_a_seeded_lottery(networks):
    network = networks("digits-vgg")
    group = network.prunable[0]
    first, again, other = (itf.score(network.model, group, "random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first.tolist())) == group.size
    assert (first >= 0).all()
    assert (first < 1).all()


def test_bn_scale_is_the_absolute_gamma(networks):
    network = networks("digits-vgg")
    gamma = network.model.features[1].weight
    assert (gamma < 0).any()
    torch.testing.assert_close(itf.score(network.model, network.group("features.0"), "bn_scale"), gamma.abs().double())


def test_bn_scale_of_a_sum_is_the_mean_over_its_norms(networks):
    network = networks("resnet-projection")
    norms = [network.model.bn1, network.model.layer1[0].bn2, network.model.layer1[1].bn2]
    expected = torch.stack([norm.weight.abs().double() for norm in norms]).mean(0)
    torch.testing.assert_close(itf.score(network.model, network.group("conv1"), "bn_scale"), expected)


@pytest.mark.parametrize("name", ["resnet-pad", "densenet", "multiplier", "resnext", "flat-norm"])
def test_bn_scale_is_the_same_before_and_after_folding(networks, name):
    network = networks(name)
    folded = itf.fold(network.model, network.example)
    for group in network.prunable:
        if not any(hasattr(network.model.get_submodule(layer.name), "running_var") for layer in group.layers):
            continue
        before, after = (itf.score(model, group, "bn_scale") for model in (network.model, folded))
        assert torch.equal(before, after)
        assert before.min() > 0


def test_bn_scale_of_a_folded_network_whose_groups_are_found_anew(networks):
    network = networks("resnet-pad")
    folded = itf.fold(network.model, network.example)
    for before, after in zip(network.prunable, itf.find_groups(folded, network.example), strict=False):
        expected = itf.score(network.model, before, "bn_scale")
        torch.testing.assert_close(itf.score(folded, after, "bn_scale"), expected)


def test_a_norm_without_scales_has_none_after_folding_either(networks):
    network = networks("plain-norm")
    for model in (network.model, itf.fold(network.model, network.example)):
        with pytest.raises(itf.IntrafusionError, match="bn_scale needs a BatchNorm"):
            itf.score(model, network.prunable[0], "bn_scale")


@pytest.mark.parametrize(("name", "group"), [("mlp", "1"), ("resnext", "body.6")])
def test_bn_scale_without_a_norm_is_one_clear_line(networks, name, group):
    network = networks(name)
    with pytest.raises(itf.IntrafusionError) as caught:
        itf.score(network.model, network.group(group), "bn_scale")
    assert group in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_requests_are_one_clear_line(networks, monkeypatch):
    network = networks("mlp")
    monkeypatch.setitem(
        itf.registry("criterion"), "hungry", replace(itf.registry("criterion")["l1"], name="hungry", needs="images")
    )
    for group, criterion, words in (
        (network.prunable[0], "vibes", "unknown criterion 'vibes'"),
        (network.prunable[0], "hungry", "needs images"),
        (network.groups[-1], "l1", "outputs"),
    ):
        with pytest.raises(itf.IntrafusionError) as caught:
            itf.score(network.model, group, criterion)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert len(itf.score(network.model, network.prunable[0], "hungry", data=itf.load_data("digits"))) == 8


@pytest.mark.reference
@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_magnitudes_are_the_authors(reference, criterion):
    model = itf.load_model("cifar10-resnet20", weights=reference("weights/cifar10_resnet20.th"))
    expected = np.load(reference("reference/resnet20_criteria.npz"))
    groups = {group.name: group for group in itf.find_groups(model, model.card.example())}
    names = [key.removesuffix(f".{criterion}") for key in expected.files if key.endswith(f".{criterion}")]
    assert len(names) == 9
    for name in names:
        scores, theirs = itf.score(model, groups[name], criterion).numpy(), expected[f"{name}.{criterion}"]
        np.testing.assert_allclose(scores / scores.mean(), theirs / theirs.mean(), rtol=1e-4)
        assert scores.argsort().tolist() == theirs.argsort().tolist()
