"""Over-parameterized layers compute what the compact ones did, and are compact ones again afterwards."""

import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.training.recovery import Widened, contract, expand

IMAGES = torch.randn(3, 12, 9, 9, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "conv": (lambda: nn.Conv2d(12, 8, 3, padding=1), IMAGES),
    "no bias": (lambda: nn.Conv2d(12, 8, 3, bias=False), IMAGES),
    "stride 2": (lambda: nn.Conv2d(12, 8, 3, 2, 1), IMAGES),
    "dilated": (lambda: nn.Conv2d(12, 8, 3, padding=2, dilation=2), IMAGES),
    "oblong": (lambda: nn.Conv2d(12, 8, (1, 5), padding=(0, 2)), IMAGES),
    "padding same": (lambda: nn.Conv2d(12, 8, 3, padding="same"), IMAGES),
    "padding reflected": (lambda: nn.Conv2d(12, 8, 3, padding=1, padding_mode="reflect"), IMAGES),
    "1x1": (lambda: nn.Conv2d(12, 8, 1), IMAGES),
    "depthwise": (lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12), IMAGES),
    "depthwise, two a channel": (lambda: nn.Conv2d(12, 24, 3, 2, groups=12), IMAGES),
    "grouped": (lambda: nn.Conv2d(12, 8, 3, padding=1, groups=4), IMAGES),
    "1-d": (lambda: nn.Conv1d(12, 8, 3, 2, padding=1, groups=2), IMAGES.flatten(2)),
    "3-d": (lambda: nn.Conv3d(12, 8, (1, 2, 3)), IMAGES[..., None, :] + torch.zeros(2, 1)),
    "linear": (lambda: nn.Linear(12, 7), ROWS),
    "linear on maps": (lambda: nn.Linear(12, 7), IMAGES.movedim(1, -1)),
    "linear without bias": (lambda: nn.Linear(12, 7, bias=False), ROWS),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    make, inputs = LAYERS[name]
    return make(), inputs


@pytest.mark.parametrize("ratio", [1, 2, 2.5, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_the_start_is_exact(name, ratio):
    layer, inputs = made(name)
    wide = expand(nn.Sequential(layer), ratio, seed=3)
    assert isinstance(wide[0], Widened)
    torch.testing.assert_close(wide(inputs), layer(inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_contracts_to_the_compact_layer_whatever_the_factors_learned(name):
    layer, inputs = made(name)
    wide = expand(nn.Sequential(layer), 2)
    for parameter in wide.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    small = contract(wide)
    assert type(small[0]) is type(layer)
    assert small[0].extra_repr() == layer.extra_repr()
    assert {n: p.shape for n, p in small[0].named_parameters()} == {n: p.shape for n, p in layer.named_parameters()}
    torch.testing.assert_close(
        small(inputs), wide(inputs), rtol=0, atol=1e-5 * float(wide(inputs).detach().abs().max().clamp(min=1))
    )


@pytest.mark.parametrize("name", LAYERS)
def test_every_factor_learns_from_the_first_step(name):
    layer, inputs = made(name)
    wide = expand(nn.Sequential(layer), 2)
    wide(inputs).square().sum().backward()
    for parameter in wide.parameters():
        assert (parameter.grad.abs() > 1e-8).double().mean() > 0.9


def test_the_middle_factor_has_the_taps_and_the_ratio():
    layer, _ = made("conv")
    first, middle, last = expand(nn.Sequential(layer), 4)[0]
    assert [tuple(f.weight.shape) for f in (first, middle, last)] == [(48, 12, 1, 1), (32, 48, 3, 3), (8, 32, 1, 1)]
    assert (first.bias, middle.bias) == (None, None)
    torch.testing.assert_close(first.weight[:, :, 0, 0].T @ first.weight[:, :, 0, 0], torch.eye(12), rtol=0, atol=1e-5)
    torch.testing.assert_close(last.weight[:, :, 0, 0] @ last.weight[:, :, 0, 0].T, torch.eye(8), rtol=0, atol=1e-5)


def test_every_network(network):
    wide = expand(network.model, 2)
    torch.testing.assert_close(wide(network.images), network.logits, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in network.model.parameters())
    small = contract(wide)
    assert {n: v.shape for n, v in small.state_dict().items()} == {n: v.shape for n, v in network.model.state_dict().items()}
    torch.testing.assert_close(small(network.images), network.logits, rtol=1e-4, atol=1e-4)


def test_same_seed_same_factors_other_seed_others():
    layer, _ = made("conv")
    one, two, other = (expand(nn.Sequential(layer), 2, seed)[0][0].weight for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_the_model_itself_stays():
    layer, inputs = made("linear")
    before = {n: v.clone() for n, v in layer.state_dict().items()}
    contract(expand(layer))
    assert all(torch.equal(v, before[n]) for n, v in layer.state_dict().items())
    assert isinstance(expand(layer), Widened)
    torch.testing.assert_close(contract(expand(layer))(inputs), layer(inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.5, 0, -1, float("inf"), float("nan")])
def test_a_ratio_that_narrows_is_refused(ratio):
    with pytest.raises(itf.IntrafusionError, match=r"^ratio must be a number of at least 1, not"):
        expand(nn.Linear(3, 3), ratio)


class Halved(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def test_what_cannot_be_a_product_of_three_is_left_alone():
    twins = [nn.Linear(12, 12), nn.Linear(12, 12)]
    twins[1].weight = twins[0].weight
    model = nn.ModuleList([*twins, Halved(12, 12), nn.ConvTranspose2d(12, 12, 2), nn.Linear(12, 12)])
    wide = expand(model)
    assert [isinstance(layer, Widened) for layer in wide] == [False] * 4 + [True]
    assert wide[0].weight is wide[1].weight


def test_a_layer_with_two_names_is_one_layer():
    model = nn.Module()
    model.a = model.b = nn.Linear(12, 4)
    wide = expand(model)
    assert isinstance(wide.a, Widened)
    assert wide.a is wide.b
    small = contract(wide)
    assert type(small.a) is nn.Linear
    assert small.a is small.b


@pytest.mark.parametrize("name", LAYERS)
def test_weight_and_bias_are_the_layers(name):
    """As a network that reads them itself finds them, and learns by them."""
    layer, _ = made(name)
    wide = expand(nn.Sequential(layer), 2)[0]
    torch.testing.assert_close(wide.weight, layer.weight, rtol=0, atol=1e-5)
    assert (wide.bias is None) == (layer.bias is None)
    wide.weight.sum().backward()
    assert all(factor.weight.grad is not None for factor in wide)
