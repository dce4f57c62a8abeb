from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom, spearmanr

import intrafusion as itf
from intrafusion.pruning.agreement import chance, compare_criteria, overlap, spearman, stays
from intrafusion.studies.session import open_session


@pytest.fixture(scope="module")
def model():
    return open_session("digits-resnet")


def group_of(session, name="layer2.0.conv1"):
    return next(group for group in session.groups if group.name == name)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


class TestSpearman:
    def test_by_hand(self):
        """One swap of neighbours in four: 1 - 6 * 2 / (4 * 15)."""
        found = spearman(np.array([[1.0, 2, 3, 4], [1, 2, 4, 3], [8, 6, 4, 2]]))
        assert found == pytest.approx(np.array([[1, 0.8, -1], [0.8, 1, -0.8], [-1, -0.8, 1]]))

    @pytest.mark.parametrize("ties", [False, True])
    def test_agrees_with_scipy(self, ties):
        scores = noise(4, 30)
        scores = scores.round(1) if ties else scores
        assert spearman(scores) == pytest.approx(spearmanr(scores, axis=1).statistic)

    def test_equal_scores_rank_nothing_and_leave_the_others_alone(self):
        found = spearman(np.array([[1.0, 2, 3], [5, 5, 5], [2, 4, 6]]))
        assert np.isnan(found[1]).all()
        assert np.isnan(found[:, 1]).all()
        assert found[0, 2] == pytest.approx(1)

    def test_one_criterion_is_a_square_too(self):
        assert spearman(noise(1, 5)).shape == (1, 1)


class TestKept:
    @pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.95])
    @pytest.mark.parametrize("name", ["layer2.0.conv1", "conv1"])
    def test_is_what_the_plan_keeps(self, model, name, sparsity):
        group = group_of(model, name)
        scores = torch.from_numpy(noise(group.size).round(1))  # with ties
        made = compare_criteria({"noise": scores}, group, sparsity)
        plan = itf.plan(model.model, group, scores, sparsity)
        assert made.kept[0].nonzero()[0].tolist() == plan.kept.tolist()
        assert (made.k, made.pruned) == (len(plan.kept), group.size - len(plan.kept))

    def test_is_what_the_plan_keeps_in_every_block(self, networks: Callable):
        network = networks("resnet-pad")
        group = next(group for group in network.prunable if len(group.block.unique()) > 1)
        scores = torch.from_numpy(noise(group.size))
        made = compare_criteria({"noise": scores}, group, 0.5)
        assert made.kept[0].nonzero()[0].tolist() == itf.plan(network.model, group, scores, 0.5).kept.tolist()

    def test_of_equals_the_first_stay(self):
        assert stays(np.array([1.0, 2, 1, 1]), np.zeros(4), [2]).tolist() == [True, True, False, False]

    def test_overlap_by_hand(self):
        kept = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]], bool)
        assert overlap(kept) == pytest.approx(np.array([[3, 2, 1], [2, 3, 2], [1, 2, 3]]) / 3)


class TestChance:
    def test_one_block_shares_k_of_n(self):
        luck = chance([32], [22])
        assert luck.overlap == pytest.approx(22 / 32)
        assert [luck.low * 22, luck.high * 22] == pytest.approx(hypergeom(32, 22, 22).ppf([0.025, 0.975]))

    def test_nothing_pruned_leaves_nothing_to_chance(self):
        luck = chance([8, 4], [8, 4])
        assert (luck.overlap, luck.low, luck.high) == (1, 1, 1)

    def test_blocks_are_what_blind_criteria_share(self):
        block, counts = np.repeat([0, 1, 2], [16, 16, 32]), [11, 11, 22]
        kept = np.stack([stays(noise(64, seed=seed), block, counts) for seed in range(600)])
        shares = overlap(kept)[np.triu_indices(600, 1)]
        luck = chance([16, 16, 32], counts)
        assert shares.mean() == pytest.approx(luck.overlap, abs=0.005)
        assert 0.95 <= ((shares >= luck.low) & (shares <= luck.high)).mean() <= 0.99  # steps of one channel

    def test_correlation_is_what_blind_criteria_stay_below(self):
        found = np.abs(spearman(noise(600, 32))[np.triu_indices(600, 1)])
        assert (found < chance([32], [22]).correlation).mean() == pytest.approx(0.95, abs=0.005)

    def test_too_few_channels_bound_nothing(self):
        assert np.isnan(chance([3], [2]).correlation)


def test_a_comparison_holds_what_its_pictures_need(model):
    group = group_of(model)
    scores = {"l1": torch.arange(32.0), "l2": -torch.arange(32.0), "flat": torch.ones(32)}
    made = compare_criteria(scores, group, 0.25)
    assert made.names == ("l1", "l2", "flat")
    assert made.ranks[0].tolist() == list(range(32, 0, -1))
    assert made.ranks[2].tolist() == [1] * 32
    assert made.k == 24
    assert made.shared(0, 1) == 16  # the first 24 and the last 24 of 32
    assert made.spearman[0, 1] == pytest.approx(-1)
