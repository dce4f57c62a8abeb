import copy

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.pruner.importance import FPGMImportance

import intrafusion as itf
from intrafusion.pruning.groups.channel_vectors import channel_vectors
from intrafusion.pruning.importance.magnitude import layer_adaptive


def hidden(model, example):
    return itf.find_groups(model, example)[0]


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


def test_norms_weigh_in_by_the_formula():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.25), nn.Flatten(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([2.0, -3.0]).view(2, 1, 1, 1)
    model[1].running_var.copy_(torch.tensor([0.75, 3.75]))  # standard deviations 1 and 2
    model[1].weight.data = torch.tensor([5.0, -4.0])
    model[3].weight.data = torch.tensor([[2.0, 6.0]])
    scores = itf.score(model.eval(), hidden(model, torch.zeros(1, 1, 1, 1)))
    torch.testing.assert_close(scores, torch.tensor([6.0, 6.0], dtype=torch.float64) / 6)


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([3, 1, 5, 0], [3 / 8, 1 / 9, 1, 0]),
        ([2, 1, 2, 1], [1 / 2, 1 / 6, 1 / 2, 1 / 6]),  # equal norms are equally important
        ([7], [1]),
    ],
)
def test_layer_adaptive_norms_by_hand(norms, expected):
    actual = layer_adaptive(torch.tensor(norms, dtype=torch.float64))
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_lamp_is_layer_adaptive_in_squares(hand_net):
    torch.testing.assert_close(itf.score(*hand_net, "lamp").tolist(), [1.0, 5.125 / 15.625])


def test_fpgm_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
    model[1].weight.data = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-6.0, -8.0]])  # 5, 10 and 15 apart
    model[3].weight.data = torch.tensor([[1.0, 0.0, -3.0]])  # 1, 4 and 3 apart
    scores = itf.score(model, hidden(model, torch.zeros(1, 1, 1, 2)), "fpgm")
    torch.testing.assert_close(scores.tolist(), [(15 + 5) / 2, (20 + 4) / 2, (25 + 7) / 2])


def test_fpgm_measures_no_distance_to_a_channel_that_the_layer_lacks(networks):
    network = networks("resnet-pad")
    model = itf.fold(network.model, network.example)
    distances = torch.full((8, 12), torch.nan, dtype=torch.float64)
    layers = (("conv1", 3), ("layer1.0.conv2", 3), ("layer2.0.conv2", 2), ("layer3.0.conv2", 0))
    layers += (("layer1.0.conv1", 3), ("layer2.0.conv1", 3), ("layer3.0.conv1", 2), ("linear", 0))
    for row, (name, first) in enumerate(layers):
        weight = model.get_submodule(name).weight.double()
        filters = (weight if row < 4 else weight.transpose(0, 1)).flatten(1)
        distances[row, first : first + len(filters)] = (filters[:, None] - filters).norm(dim=2).sum(1)
    torch.testing.assert_close(itf.score(model, network.group("conv1"), "fpgm"), distances.nanmean(0))


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet-projection"])
def test_weight_criteria_are_torch_prunings(networks, torch_pruning, same_up_to_scale, name):
    network = networks(name)
    folded = itf.fold(network.model, network.example).requires_grad_(True)
    for group in network.prunable:
        for criterion, importance in (
            ("l1", tp.importance.MagnitudeImportance(1)),
            ("l2", tp.importance.MagnitudeImportance(2)),
            ("lamp", tp.importance.LAMPImportance()),
        ):
            same_up_to_scale(itf.score(folded, group, criterion), torch_pruning(folded, group.name, importance))


def test_bn_scale_is_torch_prunings(networks, torch_pruning, same_up_to_scale):
    network = networks("resnet-projection")
    model = copy.deepcopy(network.model).requires_grad_(True)
    for group in network.prunable:
        theirs = torch_pruning(model, group.name, tp.importance.BNScaleImportance())
        same_up_to_scale(itf.score(model, group, "bn_scale"), theirs)


def test_torch_prunings_fpgm_forgets_the_signs(networks, torch_pruning, same_up_to_scale):
    # It takes |w|^p before the distance, so that a filter and its opposite are the same. Where no weight is negative and
    # p is 1 it computes what He et al. define, and so do we.
    network = networks("resnet-projection")
    folded = itf.fold(network.model, network.example).requires_grad_(True)
    group = network.group("layer2.0.conv1")
    for p in (1, 2):
        theirs = torch_pruning(folded, group.name, FPGMImportance(p))
        with pytest.raises(AssertionError):
            same_up_to_scale(itf.score(folded, group, "fpgm"), theirs, rtol=0.05)
    for parameter in folded.parameters():
        parameter.data.abs_()
    theirs = torch_pruning(folded, group.name, FPGMImportance(1))
    same_up_to_scale(itf.score(folded, group, "fpgm"), theirs)


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


@pytest.mark.reference
def test_lamp_is_the_authors_once_their_sort_is_undone(reference):
    # Torch-Pruning's old LAMP sorts descending and then gathers with the order of its sort where it should scatter:
    # theirs[i] = sorted[order[i]]. Its group norm is the mean of unsquared L2 norms, with the folded norm, gamma 1, as a
    # third layer.
    model = itf.load_model("cifar10-resnet20", weights=reference("weights/cifar10_resnet20.th"))
    expected = np.load(reference("reference/resnet20_criteria.npz"))
    groups = {group.name: group for group in itf.find_groups(model, model.card.example())}
    for name in [key.removesuffix(".lamp") for key in expected.files if key.endswith(".lamp")]:
        norms = sum(vectors.norm(dim=1) for _, vectors in channel_vectors(model, groups[name])) + 1
        order = norms.argsort(descending=True)
        in_order = torch.empty_like(norms)
        in_order[order] = torch.from_numpy(expected[f"{name}.lamp"]).double()
        torch.testing.assert_close(in_order, layer_adaptive(norms)[order], rtol=1e-5, atol=0)
