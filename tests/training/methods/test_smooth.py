import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.pruning.merge.interpolation import interpolation
from intrafusion.training.methods.smooth import PENALTIES, pays_below, penalty, truncate

G = torch.Generator().manual_seed(0)


def one(weight: torch.Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight
    return nn.Sequential(layer)


class TestPenalty:
    def test_nuclear_is_least_for_rank_one(self):
        rank_one = torch.randn(6, 1, generator=G) @ torch.randn(1, 9, generator=G)
        assert penalty(one(rank_one)).item() == pytest.approx(1, rel=1e-5)
        assert penalty(one(torch.eye(9))).item() == pytest.approx(3, rel=1e-5)  # 9 / sqrt(9)

    def test_differences_by_hand(self):
        ramp = torch.arange(4.0)[:, None] + torch.zeros(4, 5)
        assert penalty(one(ramp), "first").item() == pytest.approx(1 / 3.5)  # mean square 14 / 4
        assert penalty(one(ramp), "second").item() == pytest.approx(0, abs=1e-7)

    @pytest.mark.parametrize("kind", PENALTIES)
    def test_learning_makes_it_smaller(self, kind):
        model = itf.load_model("digits-mlp").requires_grad_(True)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        before = penalty(model, kind)
        for _ in range(10):
            optimiser.zero_grad()
            penalty(model, kind).backward()
            optimiser.step()
        assert penalty(model, kind) < 0.98 * before

    def test_unknown_is_one_line(self):
        with pytest.raises(itf.IntrafusionError, match="hope"):
            penalty(itf.load_model("digits-mlp"), "hope")

    def test_nothing_to_penalise_is_one_line(self):
        with pytest.raises(itf.IntrafusionError, match="no convolution or linear layer"):
            penalty(nn.ReLU())


class TestTruncate:
    def test_of_full_rank_nothing_changes(self, network):
        torch.testing.assert_close(truncate(network.model, energy=1.0)(network.images), network.logits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("layer", "inputs"),
        [
            (nn.Conv2d(8, 12, 3, 2, 1), torch.randn(2, 8, 9, 9, generator=G)),
            (nn.Linear(20, 30), torch.randn(5, 20, generator=G)),
        ],
        ids=["conv", "linear"],
    )
    def test_a_layer_of_low_rank_is_two_small_ones(self, layer, inputs):
        shape, m = layer.weight.shape, layer.weight[0].numel()
        layer.weight.data = (torch.randn(len(layer.weight), 2, generator=G) @ torch.randn(2, m, generator=G)).reshape(shape)
        small = truncate(nn.Sequential(layer), energy=0.999999)
        assert isinstance(small[0], nn.Sequential)
        assert len(small[0][1].weight[0]) == 2
        torch.testing.assert_close(small(inputs), layer(inputs), rtol=1e-3, atol=1e-3)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in layer.parameters())

    def test_no_layer_grows(self, network):
        for share in (0.2, 0.6, 0.99):
            small = truncate(network.model, share=share)
            assert small(network.images).shape == network.logits.shape
            count = sum(p.numel() for p in small.parameters())
            assert count <= sum(p.numel() for p in network.model.parameters())

    def test_error_is_that_of_the_singular_values_left_out(self):
        weight = torch.randn(40, 40, generator=G)
        small = truncate(one(weight), share=0.5)
        product = small[0][1].weight @ small[0][0].weight
        left = torch.linalg.svdvals(weight)[10:].norm()
        assert (product - weight).norm().item() == pytest.approx(left.item(), rel=1e-4)
        assert pays_below(one(weight)[0]) == 20

    @pytest.mark.parametrize("options", [{}, {"share": 0.5, "energy": 0.5}, {"share": 0.0}, {"energy": 1.5}])
    def test_bad_choices_are_one_line(self, options):
        with pytest.raises(itf.IntrafusionError, match="share"):
            truncate(itf.load_model("digits-mlp"), **options)


class TestInterpolate:
    def test_a_line_is_kept_exactly(self):
        ramp = torch.arange(10.0)[:, None] * torch.ones(1, 3)
        for count in (2, 4, 7, 10):
            torch.testing.assert_close(
                interpolation(10, count).float() @ ramp, torch.linspace(0, 9, count)[:, None] * torch.ones(1, 3)
            )

    def test_rows_sum_to_one(self):
        for n, count in ((1, 1), (2, 1), (9, 4), (9, 9)):
            matrix = interpolation(n, count)
            torch.testing.assert_close(matrix.sum(1), torch.ones(count).double())
        assert torch.equal(interpolation(5, 5), torch.eye(5).double())
