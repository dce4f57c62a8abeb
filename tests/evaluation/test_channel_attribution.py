import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import intrafusion as itf
from intrafusion.evaluation.attribution import METHODS, activations_of_channels, channel_attribution, first_reader, top_images
from intrafusion.pruning.groups.feature_maps import feature_maps

MEAN, STD = 0.5, 0.25


def carded(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    model.eval().requires_grad_(False)
    model.card = itf.ModelCard("tiny", (MEAN,) * size[0], (STD,) * size[0], size, 2, "noise")
    return model


def normal(image: Tensor) -> Tensor:
    return (image.float() / 255 - MEAN) / STD


def group_named(model: nn.Module, name: str) -> itf.Group:
    groups = itf.find_groups(model, model.card.example())
    return next(group for group in groups if group.name == name)


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return carded(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2)), (1, 2, 2))


@pytest.fixture
def rectified() -> nn.Module:
    """Two pixels, two hidden layers of two and one neurons, everything by hand."""
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)
    )
    model[1].weight.data = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    model[3].weight.data = torch.tensor([[1.0, -1.0], [-1.0, 2.0]])
    return carded(model, (1, 1, 2))


IMAGE = torch.tensor([[[10, 200], [90, 140]]], dtype=torch.uint8)
PAIR = torch.tensor([[[191, 255]]], dtype=torch.uint8)  # normalised to about (1, 2)


class TestByHand:
    @pytest.mark.parametrize("channel", range(3))
    def test_a_linear_channel_is_its_weights_times_the_image(self, linear, channel):
        found = channel_attribution(linear, group_named(linear, "1"), channel, IMAGE)
        weight, bias = linear[1].weight[channel].view(1, 2, 2), float(linear[1].bias[channel])
        assert torch.allclose(found.pixels, weight * normal(IMAGE), atol=1e-5)
        assert found.baseline == pytest.approx(bias, abs=1e-6)
        assert found.activation == pytest.approx(float((weight * normal(IMAGE)).sum()) + bias, abs=1e-5)
        assert found.map.shape == (1, 1)

    def test_its_gradient_is_its_weights(self, linear):
        found = channel_attribution(linear, group_named(linear, "1"), 1, IMAGE, "gradient")
        assert torch.allclose(found.pixels, linear[1].weight[1].view(1, 2, 2))

    def test_a_convolved_channel_is_the_mean_over_positions(self):
        conv = nn.Conv2d(1, 2, 1, bias=False)
        conv.weight.data = torch.tensor([2.0, -8.0]).view(2, 1, 1, 1)
        model = carded(nn.Sequential(conv, nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(8, 2)), (1, 2, 2))
        found = channel_attribution(model, group_named(model, "0"), 1, IMAGE)
        assert torch.allclose(found.map, -8 * normal(IMAGE)[0], atol=1e-5)
        assert torch.allclose(found.pixels, -8 * normal(IMAGE) / 4, atol=1e-5)
        assert found.activation == pytest.approx(float(-8 * normal(IMAGE).mean()), abs=1e-5)

    @pytest.mark.parametrize(
        ("method", "expected"),
        [
            # x = (1, 2): hidden (5, 1), neuron 0 is 5 - 1, its gradient (1, -1) through both weights
            ("gradient", [1 - 3, 2 + 1]),
            ("guided-backprop", [1, 2]),  # the negative gradient does not pass the active ReLU
            ("deconvolution", [1, 2]),
        ],
    )
    def test_what_passes_a_relu(self, rectified, method, expected):
        found = channel_attribution(rectified, group_named(rectified, "3"), 0, PAIR, method)
        assert found.pixels.flatten().tolist() == pytest.approx(expected)
        assert found.activation == pytest.approx(4, abs=0.05)

    def test_deconvolution_ignores_which_relus_were_active_and_guided_does_not(self, rectified):
        rectified[1].weight.data = torch.tensor([[1.0, 2.0], [-3.0, 1.0]])  # hidden (5, 0)
        rectified[3].weight.data = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
        group = group_named(rectified, "3")
        guided = channel_attribution(rectified, group, 0, PAIR, "guided-backprop")
        sketch = channel_attribution(rectified, group, 0, PAIR, "deconvolution")
        assert guided.pixels.flatten().tolist() == pytest.approx([1, 2])
        assert sketch.pixels.flatten().tolist() == pytest.approx([1 - 3, 2 + 1])


class TestEveryNetwork:
    def test_integrated_gradients_add_up_to_what_the_image_changes(self, network):
        group = network.prunable[0]
        for channel in (0, group.size - 1):
            found = channel_attribution(network.model, group, channel, network.data.images[0])
            change = found.activation - found.baseline
            scale = abs(change) + float(found.map.abs().max())  # 50 steps leave an error where many ReLUs switch
            assert float(found.pixels.sum()) == pytest.approx(change, abs=0.05 * scale)
            assert found.pixels.shape == network.data.images[0].shape

    @pytest.mark.parametrize("method", METHODS)
    def test_the_model_is_not_touched(self, network, method):
        before = {name: value.clone() for name, value in network.model.state_dict().items()}
        group = network.prunable[-1]
        with contextlib.suppress(itf.IntrafusionError):  # of networks without ReLUs
            channel_attribution(network.model, group, 0, network.data.images[0], method)
        assert all(torch.equal(value, before[name]) for name, value in network.model.state_dict().items())
        assert not any(p.requires_grad for p in network.model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in network.model.modules())

    def test_activations_are_the_means_of_what_the_first_reader_reads(self, network):
        for group in network.prunable:
            found = torch.cat(list(activations_of_channels(network.model, group, network.data)))
            assert found.shape == (len(network.data), group.size)
            maps = [dict(batch) for batch in feature_maps(network.model, group, network.data)]
            for channel in range(group.size):
                layer = first_reader(group, channel)
                seen = torch.cat([batch[layer][:, channel].mean((1, 2)) for batch in maps])
                assert torch.allclose(found[:, channel], seen, atol=1e-5)

    def test_an_attribution_sees_the_activation_that_ranked_its_image(self, network):
        group = network.prunable[0]
        values = torch.cat(list(activations_of_channels(network.model, group, network.data)))[:, 0]
        first = top_images(values, 1)[0]
        found = channel_attribution(network.model, group, 0, network.data.images[first], "gradient")
        assert found.activation == pytest.approx(float(values.max()), abs=1e-4 * (1 + abs(float(values.max()))))


def test_top_images_come_strongest_first_and_equals_in_order():
    assert top_images(torch.tensor([0.0, 3, 1, 3]), 3) == [1, 3, 2]
    assert top_images(torch.tensor([1.0, 2]), 8) == [1, 0]


def test_unknown_methods_are_named(linear):
    with pytest.raises(itf.IntrafusionError, match=r"unknown attribution method 'lime'.*integrated-gradients"):
        channel_attribution(linear, group_named(linear, "1"), 0, IMAGE, "lime")


class Rounded(nn.Sequential):
    """Reads whole numbers, which have no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.long().float())


def test_a_network_without_gradients_is_one_clear_line(linear):
    model = carded(Rounded(*linear), (1, 2, 2))
    group = group_named(model, "1")
    with pytest.raises(itf.IntrafusionError, match="cannot compute this network's gradients"):
        channel_attribution(model, group, 0, torch.zeros(1, 2, 2, dtype=torch.uint8), "gradient")


def test_methods_that_change_relus_say_that_there_are_none(linear):
    with pytest.raises(itf.IntrafusionError, match="this network has none; choose gradient"):
        channel_attribution(linear, group_named(linear, "1"), 0, IMAGE, "guided-backprop")


def test_networks_that_never_reuse_a_module_need_no_relu_module(networks: Callable):
    """ResNets call F.relu: guided backpropagation still differs from the gradient there."""
    network = networks("resnet-projection")
    group = network.prunable[-1]
    found = {m: channel_attribution(network.model, group, 0, network.data.images[0], m).pixels for m in METHODS}
    assert not torch.allclose(found["guided-backprop"], found["gradient"])
