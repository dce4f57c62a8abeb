"""Copies of networks in plain form: computed weights written out, wrappers gone, shared names kept."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as masks

import intrafusion as itf
from intrafusion.models.fx.sharing import replace_layers, replaced, twin, with_plain_weights


def masked(layer):
    masks.l1_unstructured(layer, "weight", 0.5)
    masks.random_unstructured(layer, "weight", 0.25)
    masks.l1_unstructured(layer, "bias", 0.5)
    return layer


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "masks": masked,
}


def net(wrap=lambda layer: layer):
    torch.manual_seed(0)
    return nn.Sequential(
        wrap(nn.Conv2d(1, 8, 3)), nn.BatchNorm2d(8), nn.ReLU(), wrap(nn.Conv2d(8, 8, 3)), nn.Flatten(), nn.Linear(128, 5)
    )  # fmt: skip


def trained(model):
    """After a step of training, when computed weights are results with a history."""
    model.train()(torch.randn(4, 1, 8, 8)).sum().backward()
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("train", [False, True])
def test_computed_weights_are_written_out_and_the_network_stays_as_it_was(kind, train):
    model = net(COMPUTED[kind])
    model = trained(model) if train else model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = twin(model)
    assert model.training == train
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for name, _ in made.named_parameters()] == [name for name, _ in net().named_parameters()]
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in made.parameters())
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(made(images), model.eval()(images), rtol=0, atol=0)
    model(images)  # its own layers still compute their weights


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_networks_with_computed_weights_are_scored_folded_and_pruned_like_plain_ones(kind, same_logits):
    model, images = trained(net(COMPUTED[kind])), torch.randn(4, 1, 8, 8)
    written = twin(model)
    group = itf.find_groups(model, images[:1])[0]
    assert group.reason is None
    assert torch.equal(itf.score(model, group), itf.score(written, group))
    plans = [itf.plan(one, group, itf.score(written, group)) for one in (model, written)]
    assert torch.equal(plans[0].coupling, plans[1].coupling)
    for made, expected in (
        (itf.fold(model, images[:1]), written),
        (itf.prune(model, images[:1], 0.5), itf.prune(written, images[:1], 0.5)),
    ):
        same_logits(made.eval()(images), expected(images))


def test_a_weight_computed_in_an_unknown_way_is_named():
    class Own(nn.Conv2d):
        def __init__(self):
            super().__init__(1, 4, 3)
            self.free = nn.Parameter(self.weight.detach())
            del self.weight

        @property
        def weight(self):
            return self.free * 2

    model = nn.Sequential(Own(), nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(itf.IntrafusionError, match="the weight of 0 is computed in each forward pass"):
        itf.find_groups(model, torch.zeros(1, 1, 8, 8))


class TestWrappers:
    def test_compiled_networks_and_layers_are_unwrapped(self):
        model, example = net().eval(), torch.zeros(1, 1, 8, 8)
        expected = itf.prune(model, example, 0.5).state_dict()
        whole, part = torch.compile(copy.deepcopy(model)), copy.deepcopy(model)
        part[3] = torch.compile(part[3])
        for wrapped in (whole, part):
            assert [g.name for g in itf.find_groups(wrapped, example)] == [g.name for g in itf.find_groups(model, example)]
            small = itf.prune(wrapped, example, 0.5).state_dict()
            assert small.keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in small.items())

    def test_a_scripted_network_is_refused_with_what_to_do(self):
        scripted = torch.jit.trace(net().eval(), torch.zeros(1, 1, 8, 8))
        with pytest.raises(itf.IntrafusionError, match=r"pass the nn\.Module that was scripted"):
            itf.prune(scripted, torch.zeros(1, 1, 8, 8))

    def test_a_network_that_cannot_be_copied_is_told_in_one_line(self):
        model = net()
        model.source = (number for number in range(3))
        with pytest.raises(itf.IntrafusionError, match="cannot copy the network: TypeError"):
            itf.fold(model, torch.zeros(1, 1, 8, 8))

    def test_results_that_a_network_keeps_of_its_last_pass_do_not_stop_a_copy(self):
        model = trained(net())
        model.seen = [model[0](torch.randn(1, 1, 8, 8))]
        assert twin(model).seen[0].is_leaf


class TestNames:
    """A layer may be registered under several names."""

    def twice(self):
        model = net().eval()
        model.add_module("stem", nn.Sequential(model[0], model[1]))
        return model

    def test_a_layer_is_put_and_replaced_under_all_of_them(self):
        model, other = self.twice(), nn.Identity()
        changed = replaced(model, {"1": other})
        assert changed[1] is changed.stem[1] is other
        assert changed[0] is model[0]
        assert model[1] is model.stem[1] is not other
        replace_layers(model, {"stem.1": other})
        assert model[1] is model.stem[1] is other

    def test_copies_share_what_they_are_given(self):
        model = self.twice()
        copied = twin(model, {"0": model[0]})
        assert copied[0] is copied.stem[0] is model[0]
        assert copied[1] is copied.stem[1] is not model[1]


def test_a_plain_network_is_not_copied():
    model = net()
    assert with_plain_weights(model) is model
    assert with_plain_weights(net(masked)) is not model
