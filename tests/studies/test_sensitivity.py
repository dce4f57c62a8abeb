import math

import numpy as np
import pytest
from made_results import DENSE, made_result

from intrafusion.errors import IntrafusionError
from intrafusion.studies.measurement import Result
from intrafusion.studies.paired_comparison import paired
from intrafusion.studies.sensitivity import (
    UNMEASURED,
    UNPRUNED,
    Matrix,
    alone,
    difference,
    fragility,
    sensitivity_matrix,
    table,
)

SPARSITIES = (0.2, 0.4, 0.8)


def curve(group: str, accuracies: dict[float, float], merge: str = "fusion", **more: object) -> list[Result]:
    return [made_result(group, s, merge, accuracy, **more) for s, accuracy in accuracies.items()]  # type: ignore[arg-type]


def unpruned(group: str, sparsity: float, merge: str = "fusion") -> Result:
    return made_result(group, sparsity, merge, DENSE, channels=(4, 4))


class TestMatrix:
    def test_lays_out_what_is_known(self):
        made = sensitivity_matrix(
            [*curve("a", {0.8: 0.3, 0.2: 0.8}), *curve("b", {0.4: 0.5}), *curve("a", {0.2: 0.1}, "drop")], "fusion"
        )
        assert (made.groups, made.sparsities, made.merge, made.criterion) == (("a", "b"), SPARSITIES, "fusion", "l1")
        np.testing.assert_allclose(made.accuracy, [[0.8, np.nan, 0.3], [np.nan, 0.5, np.nan]])
        assert made.prunes.tolist() == [[True, False, True], [False, True, False]]
        assert not made.unpruned.any()

    def test_groups_and_sparsities_are_those_asked_for_in_network_order(self):
        made = sensitivity_matrix(
            [*curve("b", {0.2: 0.5}), *curve("a", {0.2: 0.6, 0.8: 0.2})], "fusion", groups="abc", sparsities=[0.4, 0.2]
        )
        assert (made.groups, made.sparsities) == (("a", "b", "c"), (0.2, 0.4))
        np.testing.assert_allclose(made.accuracy, [[0.6, np.nan], [0.5, np.nan], [np.nan, np.nan]])

    def test_what_prunes_nothing_is_told_apart(self):
        made = sensitivity_matrix([unpruned("a", 0.2), *curve("a", {0.4: 0.5})], "fusion")
        assert made.unpruned.tolist() == [[True, False]]
        assert made.prunes.tolist() == [[False, True]]

    def test_of_one_spec_the_last_result_counts(self):
        first, last = made_result("a", 0.2, right=[1, 0], total=4), made_result("a", 0.2, right=[1, 0, 0, 0])
        made = sensitivity_matrix([first, last], "fusion")
        assert made.cells["a", 0.2].results == (last,)
        assert made.cells["a", 0.2].complete
        assert not sensitivity_matrix([first], "fusion").cells["a", 0.2].complete

    def test_results_that_prune_several_groups_are_no_cells(self):
        both, everything = (made_result("a", 0.2).spec.but(groups=groups) for groups in (("a", "b"), "all"))
        others = [Result(**{**made_result("a", 0.2).__dict__, "spec": spec}) for spec in (both, everything)]
        assert alone([*others, made_result("b", 0.4)]) == [made_result("b", 0.4)]
        assert sensitivity_matrix(others, "fusion").cells == {}

    def test_computed_sparsities_fall_on_written_ones(self):
        made = sensitivity_matrix([made_result("a", 0.1 + 0.2), made_result("b", 0.3)], "fusion", sparsities=[0.3])
        assert made.sparsities == (0.3,)
        assert set(made.cells) == {("a", 0.3), ("b", 0.3)}

    def test_seeds_are_averaged_and_the_interval_spans_theirs(self):
        own = [made_result("a", 0.2, right=share, seed=seed) for seed, share in ((1, 0.5), (0, 0.8))]
        (cell,) = sensitivity_matrix(own, "fusion").cells.values()
        assert cell.seeds == 2
        assert cell.accuracy == pytest.approx(0.65)
        assert cell.loss == pytest.approx(DENSE - 0.65)
        assert cell.interval == (own[0].interval[0], own[1].interval[1])
        assert [result.spec.seed for result in cell.results] == [0, 1]

    @pytest.mark.parametrize("field", [{"criterion": "l2"}, {"solver": "sinkhorn"}, {"p": 2}, {"model": "digits-mlp"}])
    def test_cells_of_two_meanings_are_refused(self, field):
        mixed = [made_result("a", 0.2), made_result("b", 0.2, **field)]
        with pytest.raises(IntrafusionError, match=f"differ in {next(iter(field))}; choose one"):
            sensitivity_matrix(mixed, "fusion")

    def test_one_of_several_criteria_can_be_chosen(self):
        mixed = [made_result("a", 0.2, right=0.3), made_result("a", 0.2, right=0.6, criterion="l2")]
        assert sensitivity_matrix(mixed, "fusion", "l2").accuracy == [[0.6]]
        assert sensitivity_matrix(mixed, "fusion", "l1").criterion == "l1"

    def test_nothing_measured_is_an_empty_grid(self):
        made = sensitivity_matrix([], "fusion", groups="ab", sparsities=SPARSITIES)
        assert made.accuracy.shape == (2, 3)
        assert np.isnan(made.accuracy).all()
        assert math.isnan(made.dense)
        assert sensitivity_matrix([], "fusion").accuracy.shape == (0, 0)


class TestDifference:
    def test_compares_image_by_image(self):
        shares = {"fusion": [1, 1, 1, 0, 1, 0] * 20, "drop": [1, 0, 0, 1, 1, 0] * 20}
        results = {merge: made_result("a", 0.2, merge, right) for merge, right in shares.items()}
        fused, dropped = (sensitivity_matrix(results.values(), merge) for merge in shares)
        (gap,) = difference(fused, dropped).cells.values()
        expected = paired(results["fusion"], results["drop"])
        assert gap.pairs == (expected,)
        assert (gap.difference, gap.interval, gap.decided, gap.p) == (
            expected.difference, expected.interval, expected.decided, expected.p,
        )  # fmt: skip
        assert gap.count == 120

    def test_knows_only_what_both_know(self):
        fused = sensitivity_matrix([*curve("a", {0.2: 0.8, 0.4: 0.7}), unpruned("b", 0.2)], "fusion")
        dropped = sensitivity_matrix([*curve("a", {0.4: 0.5}, "drop"), unpruned("b", 0.2, "drop")], "drop")
        made = difference(fused, dropped)
        np.testing.assert_allclose(made.values("difference"), [[np.nan, 0.2], [0, np.nan]])
        assert made.unpruned.tolist() == [[False, False], [True, False]]

    def test_grid_holds_the_groups_and_sparsities_of_both(self):
        made = difference(
            sensitivity_matrix(curve("b", {0.4: 0.5}), "fusion"), sensitivity_matrix(curve("a", {0.2: 0.5}), "fusion")
        )
        assert (made.groups, made.sparsities, made.cells) == (("b", "a"), (0.2, 0.4), {})

    def test_is_incomplete_while_either_is(self):
        partly = sensitivity_matrix([made_result("a", 0.2, right=[1] * 50, total=100)], "fusion")
        (gap,) = difference(partly, sensitivity_matrix(curve("a", {0.2: 0.6}, "drop"), "drop")).cells.values()
        assert not gap.complete
        assert gap.count == 50

    def test_seeds_are_paired_with_themselves(self):
        fused = sensitivity_matrix(
            [made_result("a", 0.2, right=share, seed=s) for s, share in enumerate((0.6, 0.9, 0.7))], "fusion"
        )
        dropped = sensitivity_matrix(
            [made_result("a", 0.2, "drop", share, seed=s) for s, share in ((1, 0.5), (0, 0.58))], "drop"
        )
        (gap,) = difference(fused, dropped).cells.values()
        assert gap.difference == pytest.approx((0.02 + 0.4) / 2)
        assert gap.interval == (gap.pairs[0].interval[0], gap.pairs[1].interval[1])
        assert [pair.decided for pair in gap.pairs] == [False, True]
        assert not gap.decided
        assert gap.p == gap.pairs[0].p

    @pytest.mark.parametrize("images", [{"limit": 30}, {"seed": 5}, {"dataset": "cifar10"}])
    def test_other_images_are_refused(self, images):
        other = sensitivity_matrix([made_result("a", 0.2, "drop", **images)], "drop")
        with pytest.raises(IntrafusionError, match="different images"):
            difference(sensitivity_matrix([made_result("a", 0.2)], "fusion"), other)


def ranked(*results: Result, groups: str | None = None) -> dict:
    return {found.group: found for found in fragility(sensitivity_matrix(results, "fusion", groups=groups))}


class TestFragility:
    def test_by_hand(self):
        (found,) = ranked(*curve("a", {0.2: 0.9, 0.4: 0.8, 0.8: 0.2})).values()
        # losses 0, 0.1 and 0.7: (0.2 * 0.05 + 0.4 * 0.4) / 0.6
        assert found.loss == pytest.approx(0.17 / 0.6)
        assert found.over == SPARSITIES
        assert found.safe == 0.2
        assert found.note == ""

    def test_a_flat_curve_loses_its_loss_and_a_single_point_its_own(self):
        assert ranked(*curve("a", dict.fromkeys(SPARSITIES, 0.6)))["a"].loss == pytest.approx(0.3)
        assert ranked(*curve("a", {0.4: 0.6}))["a"].loss == pytest.approx(0.3)

    def test_ranks_by_loss_and_keeps_network_order_among_equals(self):
        found = ranked(*curve("a", {0.2: 0.8}), *curve("b", {0.2: 0.5}), *curve("c", {0.2: 0.8}), *curve("d", {0.2: 0.95}))
        assert list(found) == ["b", "a", "c", "d"]
        assert found["d"].loss == pytest.approx(-0.05)

    def test_what_was_not_pruned_or_not_measured_is_last_and_never_robust(self):
        found = ranked(unpruned("a", 0.2), unpruned("a", 0.4), *curve("c", {0.2: 0.89}), *curve("d", {0.4: 0.3}), groups="abcd")
        assert list(found) == ["d", "c", "a", "b"]
        assert (found["a"].note, found["b"].note) == (UNPRUNED, UNMEASURED)
        for name in "ab":
            assert math.isnan(found[name].loss)
            assert found[name].safe is None
            assert found[name].over == ()

    def test_cells_that_prune_nothing_do_not_flatter(self):
        pruned = curve("a", {0.4: 0.5, 0.8: 0.1})
        found = ranked(unpruned("a", 0.2), *pruned, *curve("b", {0.2: 0.9}))["a"]
        assert found.loss == ranked(*pruned)["a"].loss
        assert found.over == (0.4, 0.8)
        assert found.note == "2 of 3 sparsities"

    @pytest.mark.parametrize(
        ("accuracies", "safe"),
        [
            ({0.2: 0.9, 0.4: 0.89, 0.8: 0.5}, 0.4),
            ({0.2: 0.88, 0.4: 0.9, 0.8: 0.9}, 0.0),
            ({0.2: 0.9, 0.4: 0.88, 0.8: 0.9}, 0.2),
            ({0.2: 0.9, 0.4: 0.95, 0.8: 0.89}, 0.8),
        ],
        ids=["one point is within", "first one loses", "beyond a loss nothing is safe", "all within"],
    )
    def test_safe_is_the_largest_sparsity_up_to_which_no_more_than_a_point_goes(self, accuracies, safe):
        assert ranked(*curve("a", accuracies))["a"].safe == safe

    def test_interval_holds_the_loss_and_narrows_with_images(self):
        few, many = (ranked(made_result("a", 0.2, right=np.arange(n) < 0.6 * n))["a"] for n in (100, 10_000))
        for found in (few, many):
            assert found.interval[0] < found.loss < found.interval[1]
        assert few.interval[1] - few.interval[0] > 5 * (many.interval[1] - many.interval[0])
        cell = made_result("a", 0.2, right=0.6)
        assert few.interval == pytest.approx((DENSE - cell.interval[1], DENSE - cell.interval[0]))

    def test_no_group_has_no_ranking(self):
        assert fragility(Matrix((), (), {}, "fusion", "l1")) == []


class TestTable:
    def test_one_row_a_result_with_what_it_pruned_and_what_came_of_it(self):
        first, partly = (
            made_result("a", 0.2, right=0.8),
            made_result("a", 0.4, "drop", [1, 0], total=8, channels=(4, 4)),
        )
        rows = table([first, partly, first])
        assert list(rows["group"]) == ["a", "a"]
        assert list(rows["merge"]) == ["fusion", "drop"]
        assert rows["accuracy"].tolist() == [0.8, 0.5]
        assert rows["loss"].tolist() == pytest.approx([DENSE - 0.8, DENSE - 0.5])
        assert rows[["low", "high"]].to_numpy().tolist() == [list(first.interval), list(partly.interval)]
        assert rows["prunes"].tolist() == [True, False]
        assert rows["complete"].tolist() == [True, False]
        assert rows[["count", "total"]].to_numpy().tolist() == [[100, 100], [2, 8]]

    def test_fields_that_differ_are_columns(self):
        rows = table([made_result("a", 0.2), made_result("a", 0.2, solver="sinkhorn")])
        assert rows["solver"].tolist() == ["exact", "sinkhorn"]
        assert "p" not in rows
        assert len(set(rows.columns)) == len(rows.columns)

    def test_nothing_is_an_empty_table_with_the_same_columns(self):
        assert list(table([]).columns) == list(table([made_result("a", 0.2)]).columns)
