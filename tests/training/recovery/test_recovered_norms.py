"""What stands in for a layer during training gives the same before, and is one layer again afterwards."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from intrafusion.pruning.merge.matrix_product import rows_of, weight_of
from intrafusion.training.recovery.batchnorm import Normed, absorb_norms, balance, insert_norms
from intrafusion.training.recovery.lora import LowRank, add_low_rank, merge_low_rank

G = torch.Generator().manual_seed(0)
IMAGES = torch.randn(16, 3, 8, 8, generator=G) * 2 + 1


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def test_norms_change_nothing_and_can_be_folded_back_after_training():
    model = network()
    before = model(IMAGES)
    insert_norms(model, ["0", "2", "4"], [IMAGES[:8], IMAGES[8:]])
    assert [isinstance(layer, Normed) for layer in model] == [True, False, True, False, True]
    torch.testing.assert_close(model(IMAGES), before, rtol=0, atol=1e-4)
    model.train()  # whose batch has the statistics that were measured
    torch.testing.assert_close(model(IMAGES), before, rtol=0, atol=1e-2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval()
    trained = model(IMAGES)
    absorb_norms(model)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Flatten, nn.Linear]
    torch.testing.assert_close(model(IMAGES), trained, rtol=0, atol=1e-4)


def test_the_norms_statistics_are_those_of_all_images():
    model = network()
    outputs = model[0](IMAGES)
    insert_norms(model, ["0"], [IMAGES[:3], IMAGES[3:]])
    norm = model[0][1]
    torch.testing.assert_close(norm.bias, outputs.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, outputs.var((0, 2, 3), unbiased=False))


KINDS = {
    "linear on maps": (lambda: nn.Linear(3, 5), (4, 6, 5, 3)),
    "linear on tokens": (lambda: nn.Linear(3, 5, bias=False), (4, 5, 3)),
    "1-d": (lambda: nn.Conv1d(3, 5, 2), (4, 3, 6)),
    "3-d": (lambda: nn.Conv3d(3, 5, 2), (4, 3, 3, 4, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3), (4, 3, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, 2, groups=2), (4, 4, 3, 3)),
}


@pytest.mark.parametrize("name", KINDS)
def test_norms_of_every_kind_of_layer(name):
    torch.manual_seed(0)
    make, shape = KINDS[name]
    model, x = nn.Sequential(make()).requires_grad_(False), torch.randn(shape) * 2 + 1
    outputs = rows_of(model[0], model(x))
    before = model(x)
    insert_norms(model, ["0"], [x])
    torch.testing.assert_close(model[0][1].bias, outputs.mean(0))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.train()(x), before, rtol=0, atol=1e-3)  # whose batch has these statistics
    model[0][1].weight.data *= torch.linspace(-1, 2, outputs.shape[1])
    balance(model.eval())
    filters = weight_of(model[0][0]).flatten(1).norm(dim=1)
    assert float(filters.mean()) == pytest.approx(2**0.5, rel=1e-4)
    trained = model(x)
    absorb_norms(model)
    assert isinstance(model[0], type(make()))
    torch.testing.assert_close(model(x), trained, rtol=0, atol=1e-4)


class Standardised(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


def test_layers_that_could_not_take_a_norm_back_get_none():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Standardised(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.again = model[3]  # a second name
    model.forward = lambda x: nn.Sequential.forward(model[:5], x)
    x = torch.randn(8, 4)
    before = model(x)
    insert_norms(model, [*"01234"], [x])
    assert [isinstance(layer, Normed) for layer in model[:5]] == [False, False, False, True, True]
    assert model.again is model[3]
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-4)
    absorb_norms(model)
    assert model.again is model[3]
    assert isinstance(model.again, nn.Linear)


def test_low_rank_changes_of_every_kind_of_layer():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    for make, shape in KINDS.values():
        model, x = nn.Sequential(make()), torch.randn(shape)
        assert len(add_low_rank(model, 2)) == 2
        for parameter in model.parameters():
            parameter.data += 0.3
        changed = model(x)
        merge_low_rank(model)
        assert type(model[0]) is type(make())
        torch.testing.assert_close(model(x), changed)
    twins = nn.ModuleList([shared, nn.Linear(6, 6), spectral_norm(nn.Linear(3, 3))])
    twins[1].weight = shared.weight
    kinds = [type(layer) for layer in twins]
    assert add_low_rank(twins, 2) == []
    assert [type(layer) for layer in merge_low_rank(twins)] == kinds


@pytest.mark.parametrize("masked", [False, True])
def test_low_rank_changes_merge_exactly(masked):
    model = network()
    model[2].weight.data[:, ::2] = 0
    before, plain = model(IMAGES), copy.deepcopy(model)
    learning = add_low_rank(model, 2, seed=1, masked=masked)
    torch.testing.assert_close(model(IMAGES), before, rtol=0, atol=0)
    assert sum(p.numel() for p in learning) == 2 * (6 + 27) + 2 * (4 + 54) + 2 * (5 + 64)
    for parameter in learning:
        parameter.data += 0.3 * torch.randn_like(parameter)
    changed = model(IMAGES)
    assert not torch.allclose(changed, before)
    assert merge_low_rank(model) is model
    assert [type(layer) for layer in model] == [type(layer) for layer in plain]
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(IMAGES), changed, rtol=0, atol=0)
    difference = model[2].weight - plain[2].weight
    assert torch.linalg.matrix_rank((model[4].weight - plain[4].weight).double(), atol=1e-5) == 2
    assert bool((difference[:, ::2] == 0).all()) == masked


def test_both_factors_learn_after_one_step():
    weight = torch.randn(5, 4, generator=G)
    change = LowRank(weight, 9, G)  # more than the weight has
    assert (change.A.shape, change.B.shape) == ((4, 4), (5, 4))
    change(weight).sum().backward()
    assert change.B.grad.abs().min() > 0
    assert change.A.grad.abs().max() == 0  # until B is no longer zero
