from dataclasses import replace

import numpy as np
import pytest
from made_results import made_result
from scipy.stats import binomtest

from intrafusion.errors import IntrafusionError
from intrafusion.studies.paired_comparison import Paired, matched_wald, paired


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
        assert Paired(0.0, (0.0, 0.0), b, c, 1000).p == pytest.approx(expected)

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
