import pytest
import torch
import torch.nn.functional as F
from torch import nn

import intrafusion as itf
from intrafusion.pruning.groups.feature_maps import feature_maps, maps_of, normalised, private, reading
from intrafusion.pruning.groups.group import CONSUMER, Layer

PRESENT = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1)


def consumer(positions, name="0"):
    return Layer(name, CONSUMER, torch.tensor(positions))


def test_a_private_copy_shares_nothing():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True), nn.Dropout(0.5)).train()
    twin = private(model)
    twin[0].weight.data.zero_()
    assert model[0].weight.abs().sum() > 0
    assert (model.training, model[1].inplace, model[0].weight.requires_grad) == (True, True, True)
    assert (twin.training, twin[1].inplace, twin[0].weight.requires_grad) == (False, False, False)


def test_images_are_normalised_by_the_card(networks):
    network = networks("resnet-pad")
    batches = list(normalised(network.model, network.data, most=10))
    assert [len(labels) for _, labels in batches] == [10, 10, 4]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(labels, network.data.labels)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (network.model.card.mean, network.model.card.std))
    torch.testing.assert_close(images, (network.data.images / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_a_model_without_a_card_is_one_clear_line(networks):
    with pytest.raises(itf.IntrafusionError, match="no card"):
        next(normalised(nn.Linear(2, 2), networks("mlp").data))


@pytest.mark.parametrize(
    ("reader", "positions", "shape", "expected"),
    [
        # a slice of a convolution's input; the second channel is not there
        (nn.Conv2d(3, 1, 1), [[2], [-1], [0]], (2, 3, 4, 5), lambda read: read[:, [2, 0, 0]] * PRESENT),
        # the same channel twice in a concatenation
        (nn.Conv2d(4, 1, 1), [[0, 2], [1, 3]], (2, 4, 3, 5), lambda read: torch.cat([read[:, :2], read[:, 2:]], 2)),
        # one number a channel
        (nn.Linear(3, 1), [[1], [0]], (2, 3), lambda read: read[:, [1, 0], None, None]),
        # flattened 2x2 maps
        (nn.Linear(8, 1), [[0, 1, 2, 3], [4, 5, 6, 7]], (3, 8), lambda read: read.view(3, 2, 2, 2)),
        # flattened maps of no known sides
        (nn.Linear(6, 1), [[0, 1, 2], [3, 4, 5]], (3, 6), lambda read: read.view(3, 2, 1, 3)),
        # tokens, channels last
        (nn.Linear(3, 1), [[2], [0]], (2, 7, 3), lambda read: read[..., [2, 0]].transpose(1, 2)[:, :, None]),
        # pixels, channels last
        (nn.Linear(3, 1), [[2], [0]], (2, 4, 5, 3), lambda read: read[..., [2, 0]].permute(0, 3, 1, 2)),
    ],
)  # fmt: skip
def test_maps_of_the_groups_channels(reader, positions, shape, expected):
    read = torch.randn(shape)
    assert torch.equal(maps_of(nn.Sequential(reader), consumer(positions), read), expected(read))


def test_hooks_go_even_when_the_network_fails(networks):
    network = networks("mlp")
    model = private(network.model)
    with pytest.raises(RuntimeError), reading(model, network.prunable[0]):
        model(torch.zeros(1, 1))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_feature_maps_are_what_the_next_layers_read(networks, monkeypatch):
    network = networks("resnet-pad")
    model, group = network.model, network.group("layer2.0.conv1")
    monkeypatch.setattr("intrafusion.data.datasets._PIXELS", 10 * 64)
    batches = []
    for batch in feature_maps(model, group, network.data):
        assert not torch.is_inference_mode_enabled()  # nothing leaks into the caller's loop
        batches.append(batch)
    assert [layer.name for layer, _ in batches[0]] == ["layer2.0.conv2"]
    maps = torch.cat([maps for ((_, maps),) in batches])
    images = torch.cat([images for images, _ in normalised(model, network.data)])
    before = model.layer1(F.relu(model.bn1(model.conv1(images))))
    block = model.layer2[0]
    torch.testing.assert_close(maps, F.relu(block.bn1(block.conv1(before))))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_feature_maps_of_a_sum_are_those_of_every_reader(networks):
    network = networks("resnet-pad")
    (batch,) = feature_maps(network.model, network.group("conv1"), network.data)
    assert {layer.name: tuple(maps.shape) for layer, maps in batch} == {
        "layer1.0.conv1": (24, 12, 8, 8),
        "layer2.0.conv1": (24, 12, 8, 8),
        "layer3.0.conv1": (24, 12, 4, 4),
        "linear": (24, 12, 1, 1),
    }
    for layer, maps in batch:
        assert not maps[:, ~layer.present()].any()
        assert maps[:, layer.present()].any()
