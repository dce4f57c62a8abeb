import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_results import made_result
from scipy.special import beta
from scipy.stats import binom, binomtest
from three_looks import three_looks

from intrafusion.errors import IntrafusionError
from intrafusion.evaluation.accuracy import stratified
from intrafusion.studies import paired_comparison as module
from intrafusion.studies.paired_comparison import Paired, is_decided, matched_wald, paired, sequential_interval


def answers(count: int, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < share


class TestPaired:
    def test_by_hand(self):
        first = made_result("a", 0.5, right=[1, 1, 1, 1, 1, 1, 1, 0, 0, 0])
        second = made_result("a", 0.5, "drop", right=[1, 1, 1, 0, 0, 0, 0, 1, 0, 0])
        found = paired(first, second)
        assert (found.only_first, found.only_second, found.count) == (4, 1, 10)
        assert found.difference == pytest.approx(0.3)
        # b = 4.5, c = 1.5, n = 12: (b - c) / n = 0.25, and 1.96 sqrt(6 - 9 / 12) / 12 = 0.3742
        assert found.interval == pytest.approx((0.25 - 0.37424, 0.25 + 0.37424), abs=1e-5)
        assert not found.decided
        assert found.p == pytest.approx(2 * (1 + 5) / 32)

    @pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 65, 1000])
    @pytest.mark.parametrize("other", [1, 8, 13, 1000])
    def test_counts_agree_with_booleans_on_the_common_images(self, count, other):
        a, b = answers(count, 0.7, 1), answers(other, 0.6, 2)
        found = paired(made_result("a", 0.5, right=a, total=1000), made_result("a", 0.5, "drop", b, total=1000))
        both = min(count, other)
        a, b = a[:both], b[:both]
        assert found.count == both
        assert (found.only_first, found.only_second) == ((a & ~b).sum(), (b & ~a).sum())
        assert found.difference == pytest.approx(a.mean() - b.mean())

    def test_what_lies_behind_the_last_image_does_not_count(self):
        first = made_result("a", 0.5, right=[1, 0, 1])
        dirty = replace(first, correct=bytes([first.correct[0] | 0b11111]))
        assert paired(dirty, first) == paired(first, first)

    def test_swapping_the_two_turns_the_sign(self):
        first, second = (made_result("a", 0.5, right=answers(200, share, 3)) for share in (0.8, 0.5))
        one, other = paired(first, second), paired(second, first)
        assert one.difference == -other.difference
        assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
        assert one.p == other.p
        assert one.decided

    def test_a_result_against_itself_is_undecided(self):
        found = paired(*[made_result("a", 0.5, right=answers(500, 0.7, 4))] * 2)
        assert (found.difference, found.only_first, found.only_second, found.p) == (0, 0, 0, 1)
        assert found.interval[0] == -found.interval[1] < 0
        assert not found.decided

    @pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (0, 7), (5, 5), (12, 30), (400, 380)])
    def test_p_is_the_exact_binomial_one(self, b, c):
        expected = binomtest(b, b + c).pvalue if b + c else 1.0
        assert Paired(0.0, (0.0, 0.0), b, c, 1000, 1000).p == pytest.approx(expected)

    @pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (9, 1), (1, 9), (12, 30), (100, 60)])
    def test_p_of_the_first_images_holds_at_any_time(self, b, c):
        """It is the likelihood ratio of a fair coin and one of uniformly distributed bias, of which 1 is the expectation."""
        expected = 0.5 ** (b + c) / beta(b + 1, c + 1)
        assert Paired(0.0, (0.0, 0.0), b, c, 1000, 2000).p == pytest.approx(min(1.0, expected))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"dataset": "cifar10"}, "dataset is digits and cifar10"),
            ({"data_path": "/elsewhere"}, "data_path is None and /elsewhere"),
            ({"limit": 50}, "limit is 2000 and 50"),
            ({"seed": 1}, "seed is 0 and 1"),
            ({"total": 300}, "100 and 300"),
        ],
    )
    def test_other_images_are_refused(self, change, says):
        with pytest.raises(IntrafusionError, match="results on different images") as caught:
            paired(made_result("a", 0.5), made_result("a", 0.5, "drop", **change))
        assert says in str(caught.value)

    def test_other_specs_on_the_same_images_are_not(self):
        assert paired(made_result("a", 0.5, model="x"), made_result("b", 0.3, "drop", criterion="l2")).count == 100

    def test_a_result_without_its_answers_is_refused(self):
        bare = replace(made_result("a", 0.5), correct=b"")
        with pytest.raises(IntrafusionError, match="has no predictions for 100 images"):
            paired(bare, made_result("a", 0.5))


def shuffled(signs: np.ndarray, runs: int, seed: int = 0) -> np.ndarray:
    """Orders of the signs, all equally probable: (runs, n)."""
    return np.random.default_rng(seed).permuted(np.tile(signs, (runs, 1)), axis=1)


def population(total: int, discordant: float, difference: float = 0.0) -> np.ndarray:
    """Signs of as many images, of which a share is discordant, and with a given mean."""
    ahead, behind = (round(total * (discordant + sign * difference) / 2) for sign in (1, -1))
    return np.repeat([1, -1, 0], [ahead, behind, total - ahead - behind])


def rejections(signs: np.ndarray, total: int, mean: float = 0.0) -> np.ndarray:
    """In which runs the interval excludes a mean at any time, after whichever image."""
    return module._rejects(signs, total, mean) | module._rejects(-signs, total, -mean)


def at_most_5_percent(found: np.ndarray) -> bool:
    """Whether a probability of 5 % would give so many or more at least once in a thousand times."""
    return found.sum() <= binom.ppf(0.999, len(found), 0.05)


class TestSequentialInterval:
    @pytest.mark.parametrize(("total", "runs"), [(500, 2000), (2000, 500), (10_000, 120)])
    @pytest.mark.parametrize("discordant", [0.02, 0.1, 0.6])
    def test_no_look_ever_excludes_an_equality_in_more_than_5_of_100_runs(self, total, runs, discordant):
        assert at_most_5_percent(rejections(shuffled(population(total, discordant), runs), total))

    @pytest.mark.parametrize("difference", [0.02, -0.1])
    def test_no_look_ever_excludes_the_true_difference_in_more_than_5_of_100_runs(self, difference):
        signs = population(500, 0.2, difference)
        assert at_most_5_percent(rejections(shuffled(signs, 2000), 500, signs.mean()))

    def test_a_fixed_interval_after_every_batch_would(self):
        """What the simulation is able to see."""
        signs = shuffled(population(2000, 0.1), 300)
        looks = [[not np.prod(matched_wald((s == 1).sum(), (s == -1).sum(), len(s))) <= 0 for s in (run[:n] for n in
                 range(50, 2000, 50))] for run in signs]  # fmt: skip
        assert not at_most_5_percent(np.any(looks, axis=1))

    @pytest.mark.parametrize("share", [0.1, 0.5])
    def test_classes_in_turn_do_no_harm_even_where_they_disagree(self, share):
        """In half of the classes only the first network is ever right alone, in the other half only the second is."""
        labels = torch.arange(10).repeat(50)
        signs = np.where(np.arange(500) // 10 < 50 * share, np.where(labels < 5, 1, -1), 0)
        runs = np.stack([signs[stratified(labels, seed).numpy()] for seed in range(800)])
        assert at_most_5_percent(rejections(runs, 500))

    @pytest.mark.parametrize("signs", [(1, -1, 0, 0, 0, 0), (1, 1, -1, -1, 0, 0), (1, 1, 1, -1, 0, 0), (1, -1, -1, -1, -1, -1)])
    def test_capital_is_expected_to_stay_as_it_is(self, signs):
        orders = np.array(list(itertools.permutations(signs)))
        capital = np.exp(module._log_capital(orders, 6, np.mean(signs)))
        assert capital.mean(0) == pytest.approx(np.ones(6))
        assert capital.std(0)[:-2].min() > 0

    @pytest.mark.parametrize(("points", "most"), [(1, 1650), (2, 1050), (5, 380)])
    def test_takes_fewer_images_than_three_looks(self, points, most):
        """At 2,000 images of which 10 % are discordant, with a look after every 100 images."""
        signs = shuffled(population(2000, 0.1, points / 100), 300)
        capital = np.maximum.accumulate(module._log_capital(signs, 2000, 0.0), axis=1)[:, 99::100] >= np.log(40)
        taken = np.where(capital.any(1), 100 * (1 + capital.argmax(1)), 2000)
        assert taken.mean() < min(most, three_looks(signs).mean())
        assert module._rejects(-signs, 2000).mean() <= 0.025  # for the wrong one of the two

    @pytest.mark.parametrize("discordant", [0.05, 0.5])
    def test_holds_what_no_bet_rejects_and_shrinks(self, discordant):
        signs, inner = shuffled(population(60, discordant, 1 / 30), 1)[0], (-1.0, 1.0)
        for seen in range(61):
            low, high = sequential_interval(signs[:seen], 60)
            left, sum_ = 60 - seen, signs[:seen].sum()
            kept = [m for m in range(sum_ - left, sum_ + left + 1) if not rejections(signs[:seen], 60, m / 60)]
            assert (low, high) == pytest.approx((kept[0] / 60, kept[-1] / 60))
            assert kept == list(range(kept[0], kept[-1] + 1))
            assert inner[0] <= low <= high <= inner[1]
            inner = low, high
        assert low == high == pytest.approx(signs.mean())

    def test_is_that_of_the_first_images_and_the_fixed_one_that_of_all(self):
        first, second = (made_result("a", 0.5, right=answers(200, share, 5)) for share in (0.8, 0.6))
        part = replace(first, count=120)
        signs = (np.unpackbits(np.frombuffer(result.correct, np.uint8)).astype(int) for result in (first, second))
        expected = sequential_interval(np.subtract(*signs)[:120], 200)
        assert paired(part, second).interval == expected != (0, 0)
        assert paired(second, part).interval == pytest.approx((-expected[1], -expected[0]))
        assert not paired(part, second).complete
        whole = paired(first, second)
        assert whole.complete
        assert whole.interval == matched_wald(whole.only_first, whole.only_second, 200)

    @pytest.mark.parametrize("shares", [(0.9, 0.5), (0.7, 0.7), (0.3, 0.8)])
    @pytest.mark.parametrize("count", [1, 20, 77, 300])
    def test_decides_where_it_excludes_zero(self, shares, count):
        first, second = (made_result("a", 0.5, right=answers(count, s, i), total=400) for i, s in enumerate(shares))
        assert is_decided(first, second) == is_decided(second, first) == paired(first, second).decided
        assert is_decided(first, second) == (count >= 300 or (shares[0] != shares[1] and count >= 77))

    def test_other_images_are_no_decision(self):
        with pytest.raises(IntrafusionError, match="different images"):
            is_decided(made_result("a", 0.5), made_result("a", 0.5, seed=1))


class TestInterval:
    @pytest.mark.parametrize("count", [60, 500])
    @pytest.mark.parametrize(("only_first", "only_second"), [(0.05, 0.02), (0.1, 0.1), (0.4, 0.1), (0.02, 0.005)])
    def test_covers_the_true_difference_in_95_of_100_cases(self, count, only_first, only_second):
        cells = [only_first, only_second, 1 - only_first - only_second]
        draws = np.random.default_rng(0).multinomial(count, cells, 4000)
        ends = np.array([matched_wald(b, c, count) for b, c, _ in draws.tolist()])
        covered = ((ends[:, 0] <= only_first - only_second) & (only_first - only_second <= ends[:, 1])).mean()
        assert 0.935 <= covered <= 1.0  # Agresti and Min: a little conservative where few images are disputed
        if (only_first + only_second) * count > 50:
            assert covered <= 0.97

    @pytest.mark.parametrize(("b", "c", "count"), [(16, 4, 100), (0, 3, 40), (150, 86, 1600)])
    def test_is_walds_of_the_table_with_half_a_pair_more_in_each_cell(self, b, c, count):
        shares = (np.array([count - b - c - 7, b, c, 7]) + 0.5) / (count + 2)
        contrast = np.array([0, 1, -1, 0])
        variance = contrast @ (np.diag(shares) - np.outer(shares, shares)) @ contrast / (count + 2)
        expected = contrast @ shares + np.array([-1, 1]) * 1.959964 * np.sqrt(variance)
        assert matched_wald(b, c, count) == pytest.approx(expected)

    @pytest.mark.parametrize(("b", "c", "count"), [(0, 0, 1), (1, 0, 1), (0, 3, 3), (5, 0, 5), (0, 0, 9), (2000, 0, 2000)])
    def test_lies_in_range_and_holds_the_measured_difference(self, b, c, count):
        low, high = matched_wald(b, c, count)
        assert -1 <= low <= (b - c) / count <= high <= 1

    def test_narrows_with_images_and_widens_with_confidence(self):
        def width(*args: float) -> float:
            low, high = matched_wald(*args)  # type: ignore[arg-type]
            return high - low

        assert width(100, 50, 1000) < width(10, 5, 100)
        assert width(10, 5, 100) < width(10, 5, 100, 3.0)

    @pytest.mark.parametrize("bad", [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
    def test_impossible_counts_are_refused(self, bad):
        with pytest.raises(IntrafusionError, match="an interval"):
            matched_wald(*bad)
