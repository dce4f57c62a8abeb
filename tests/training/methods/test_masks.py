"""Masks over frozen weights: what they draw, what flows through them, and what is left when they are decided."""

import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.training import finalise, mask
from intrafusion.training.methods.masks import METHODS, EdgePopup, GumbelMask, Supermask, masks, what_learns

G = torch.Generator().manual_seed(0)


def own() -> torch.Generator:
    return torch.Generator().manual_seed(1)


class TestDraws:
    @pytest.mark.parametrize("kind", [GumbelMask, Supermask])
    @pytest.mark.parametrize("m", [-2.0, -0.5, 0.0, 1.0])
    def test_the_mean_of_a_mask_is_the_sigmoid_of_its_score(self, kind, m):
        made = kind(torch.zeros(400, 500), own())
        made.scores.data.fill_(m)
        share = float((made.drawn() > 0).float().mean())
        assert share == pytest.approx(torch.sigmoid(torch.tensor(m)).item(), abs=4e-3)

    def test_the_mean_slope_at_zero_is_a_sixth(self):
        """E[s (1 - s)] with s uniform."""
        made = GumbelMask(torch.zeros(400, 500), own())
        made.drawn().sum().backward()
        assert made.scores.grad.mean().item() == pytest.approx(1 / 6, abs=2e-3)

    def test_supermask_makes_up_for_what_goes(self):
        made = Supermask(torch.zeros(300, 300), own())
        assert made.drawn().mean().item() == pytest.approx(1)
        made.eval()
        made.scores.data[:150] = -1
        assert made.decided().mean().item() == pytest.approx(1)
        assert made.decided().max().item() == pytest.approx(2)

    def test_edge_popup_keeps_the_largest_half(self):
        made = EdgePopup(torch.zeros(20, 30), own())
        kept = made.kept()
        assert int(kept.sum()) == 300
        size = made.scores.detach().abs()
        assert size[kept].min() >= size[~kept].max()
        made.drawn().sum().backward()
        torch.testing.assert_close(made.scores.grad, made.scores.detach().sign() * 2**0.5)

    def test_training_draws_anew_and_eval_decides(self):
        made = GumbelMask(torch.ones(50, 50), own())
        weight = torch.ones(50, 50)
        assert not torch.equal(made(weight), made(weight))
        made.eval()
        assert torch.equal(made(weight), made(weight))


@pytest.mark.parametrize("method", METHODS)
class TestMask:
    def test_weights_stay_bit_for_bit_while_masks_learn(self, method):
        data = itf.load_data("digits", "train").subset(256)
        masked = mask(itf.load_model("digits-mlp", weights="random"), method, seed=3)
        names = [name for name, p in masked.named_parameters() if not p.requires_grad]
        before = {name: masked.get_parameter(name).clone() for name in names}
        rate = {"aslp": 200.0, "supermask": 1.0, "edge-popup": 0.1}[method]
        optimiser = torch.optim.SGD(what_learns(masked, rate), momentum=0.9)
        images, losses = (data.images.float() / 255 - 0.3) / 0.4, []
        masked.train()
        for _ in range(30):
            loss = nn.functional.cross_entropy(masked(images), data.labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        assert all(torch.equal(masked.get_parameter(name), value) for name, value in before.items())
        assert len(before) == 2 * 3  # three layers' weights and biases

    def test_finalised_it_is_a_plain_network_that_answers_the_same(self, method, network):
        masked = mask(network.model, method, seed=1).eval()
        for made in masks(masked).values():
            made.scores.data += torch.randn(made.scores.shape, generator=G)
        plain = finalise(masked)
        assert plain.state_dict().keys() == network.model.state_dict().keys()
        assert [type(layer) for layer in plain.modules()] == [type(layer) for layer in network.model.modules()]
        torch.testing.assert_close(plain(network.images), masked(network.images))
        for name, made in masks(masked).items():
            zeros = plain.get_submodule(name).weight == 0
            assert torch.equal(zeros, ~made.kept())

    def test_same_seed_same_network(self, method):
        model = itf.load_model("digits-mlp")
        one, two, other = (mask(model, method, seed=seed).train() for seed in (5, 5, 6))
        images = torch.rand(4, 1, 8, 8, generator=G)
        assert torch.equal(one(images), two(images))
        assert not torch.equal(one(images), other(images))

    def test_the_model_itself_stays(self, method):
        model = itf.load_model("digits-mlp")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        mask(model, method)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TestWeights:
    def test_kaiming(self):
        masked = mask(itf.load_model("digits-vgg", weights="random"), weights="kaiming")
        weight = masked.features[10].parametrizations.weight.original
        assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.02)

    def test_signed_constant(self):
        masked = mask(itf.load_model("digits-vgg", weights="random"), weights="signed")
        weight = masked.features[10].parametrizations.weight.original
        assert weight.abs().unique().numel() == 1
        assert (weight > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)

    def test_keep(self):
        model = itf.load_model("digits-vgg")
        masked = mask(model, weights="keep").eval()
        images = torch.rand(4, 1, 8, 8, generator=G)
        torch.testing.assert_close(masked(images), model(images))  # all scores are 0, so everything stays


@pytest.mark.parametrize("choice", [{"method": "hope"}, {"weights": "hope"}])
def test_unknown_choices_are_one_line(choice):
    with pytest.raises(itf.IntrafusionError, match="hope"):
        mask(itf.load_model("digits-mlp"), **choice)


@pytest.mark.parametrize("method", METHODS)
def test_finalised_it_has_its_parameters_in_the_order_of_the_plain_network(method):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False), nn.Flatten(),
                            nn.Linear(64, 64), nn.Linear(64, 3))  # fmt: skip
    plain = finalise(mask(network, method))
    assert [(name, p.shape) for name, p in plain.named_parameters()] == [
        (name, p.shape) for name, p in network.named_parameters()
    ]
    assert list(plain.state_dict()) == list(network.state_dict())
    assert plain[2].bias is None


def test_a_plain_network_has_nothing_to_finalise():
    with pytest.raises(itf.IntrafusionError, match="has no masks"):
        finalise(itf.load_model("digits-mlp"))
