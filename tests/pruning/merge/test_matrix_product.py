"""What a layer's outputs see, times its weight, is what the layer computes; what is no such product is found out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.pruning.merge.matrix_product import (
    coverage,
    inputs_of,
    no_products,
    product,
    rows_of,
    scale_outputs,
    set_weight,
    weight_of,
    width_of,
)


class SamePadded(nn.Conv2d):
    """Pads what it reads by itself, to as many outputs as strides fit into the image."""

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for size, taps, step, move in zip(x.shape[2:], self.kernel_size, self.dilation, self.stride, strict=True):
            more = max((-(-size // move) - 1) * move + step * (taps - 1) + 1 - size, 0)
            sides = [more // 2, more - more // 2, *sides]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Framed(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1), value=2.0))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "linear on maps": (lambda: nn.Linear(6, 4, bias=False), (3, 4, 6, 6)),
    "1-d": (lambda: nn.Conv1d(6, 4, 3, 2, padding=1), (3, 6, 9)),
    "3-d": (lambda: nn.Conv3d(6, 4, (1, 2, 3), padding=(0, 1, 1)), (3, 6, 4, 5, 6)),
    "strided": (lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), bias=False), (3, 6, 9, 8)),
    "same": (lambda: nn.Conv2d(6, 4, (4, 3), padding="same", dilation=(1, 2)), (3, 6, 9, 8)),
    "valid": (lambda: nn.Conv2d(6, 4, 3, padding="valid"), (3, 6, 9, 8)),
    "reflected": (lambda: nn.Conv2d(6, 4, 3, padding=(2, 1), padding_mode="reflect"), (3, 6, 9, 8)),
    "circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (3, 6, 9, 8)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (3, 6, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (3, 6, 9, 8)),
    "depthwise, two a channel": (lambda: nn.Conv2d(6, 12, 3, groups=6), (3, 6, 9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), (3, 6, 4, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(6, 4, (2, 3), (3, 1), dilation=2, groups=2), (3, 6, 4, 5)),
    "transposed, 1-d": (lambda: nn.ConvTranspose1d(6, 4, 2, 3, 1, bias=False), (3, 6, 5)),
    "transposed, 3-d": (lambda: nn.ConvTranspose3d(6, 4, 2, 2), (3, 6, 2, 3, 4)),
    "pads by itself": (lambda: SamePadded(6, 4, 3, 2), (3, 6, 8, 9)),
    "pads with twos": (lambda: Framed(6, 4, 3), (3, 6, 8, 9)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make().requires_grad_(False), torch.randn(shape)


def multiplied(layer: nn.Module, seen: Tensor) -> Tensor:
    weight = weight_of(layer).flatten(1).unflatten(0, (seen.shape[1], -1))
    return torch.einsum("ngf,gof->ngo", seen, weight).flatten(1)


@pytest.mark.parametrize("name", LAYERS)
class TestLayers:
    def test_outputs_are_the_weight_times_what_they_see(self, name):
        layer, x = made(name)
        run = product(layer, x)
        bias = 0 if layer.bias is None else layer.bias
        torch.testing.assert_close(multiplied(layer, run.seen) + bias, rows_of(layer, layer(x)), rtol=1e-4, atol=1e-5)
        assert run.holds(x)

    def test_a_constant_one_reaches_the_outputs_as_far_as_the_padding_lets_it(self, name):
        layer, x = made(name)
        layer.bias = None
        ones, zeros = (layer(make(x[:1])) for make in (torch.ones_like, torch.zeros_like))
        reached = coverage(layer, x[:1])
        assert reached.shape == weight_of(layer).shape[1:]
        sums = (weight_of(layer) * reached).sum((1, 2))
        torch.testing.assert_close(sums, rows_of(layer, ones - zeros).mean(0), rtol=1e-4, atol=1e-5)

    def test_outputs_are_scaled_and_shifted(self, name):
        layer, x = made(name)
        before, width = rows_of(layer, layer(x)), width_of(layer)
        scale, shift = torch.randn(2, width, dtype=torch.float64)
        was = layer.weight
        scale_outputs(layer, scale, shift)
        torch.testing.assert_close(rows_of(layer, layer(x)), before * scale.float() + shift.float(), rtol=1e-4, atol=1e-4)
        assert layer.weight is not was  # which another layer may hold as well
        assert not layer.weight.requires_grad
        assert not layer.bias.requires_grad

    def test_a_weight_goes_in_as_it_came_out(self, name):
        layer, _ = made(name)
        before = layer.weight.clone()
        set_weight(layer, weight_of(layer).double())
        assert torch.equal(layer.weight, before)
        assert layer.weight.is_contiguous()


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.std((1, 2, 3), keepdim=True), self.bias)


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Unbiased(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, None)


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x - 0.5))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x)


ODD = {
    "another weight": lambda: Standardised(3, 4, 3),
    "more than the product": lambda: Halved(3, 4, 3),
    "no bias, were there one": lambda: Unbiased(3, 4, 3, bias=False),
    "another input": lambda: Rectified(8, 4),
    "twice the product": lambda: Doubled(8, 4),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_product_of_what_it_reads_is_found(name):
    torch.manual_seed(0)
    odd = ODD[name]()
    channels = 4 if isinstance(odd, nn.Conv2d) else 3
    model = nn.Sequential(nn.Conv2d(3, 3, 1), odd, nn.ReLU(), SamePadded(channels, 2, 3)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert no_products(model, torch.randn(1, 3, 8, 8)) == {"1"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model)


def test_inputs_are_those_of_the_first_run_of_layers_that_run():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(input=self.a(x))

    model, x = Twice(), torch.randn(2, 3)
    read = inputs_of(model, (nn.Linear,), x)
    assert list(read) == ["a"]
    assert torch.equal(read["a"], x)


def test_a_shared_weight_is_changed_in_one_layer_alone():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    before = copy.deepcopy(second.weight.data)
    set_weight(first, torch.zeros(3, 3, 1))
    assert torch.equal(second.weight.data, before)
