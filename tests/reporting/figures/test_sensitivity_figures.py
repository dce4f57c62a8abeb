from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import pytest
from figure_reading import check_both_themes, serialised, title, traces
from made_results import DENSE, made_result

from intrafusion.evaluation.accuracy import Size
from intrafusion.reporting.figures.fragility import fragility_bars, suggestion_bars
from intrafusion.reporting.figures.sensitivity import (
    compare_studies,
    difference_heatmap,
    gain,
    sensitivity_headline,
    sensitivity_heatmap,
    sensitivity_panels,
)
from intrafusion.reporting.figures.theme import DARK, LIGHT, Palette
from intrafusion.studies.allocation import Suggestion
from intrafusion.studies.measurement import Result
from intrafusion.studies.sensitivity import Difference, Matrix, difference, fragility, sensitivity_matrix

GROUPS = ("conv1", "layer1.0.conv1", "layer2.0.conv1")
SPARSITIES = (0.2, 0.5, 0.8)


def share(right: float, count: int = 400) -> np.ndarray:
    return np.arange(count) < round(right * count)


def study(merge: str, shift: float = 0.0) -> list[Result]:
    """Every kind of cell: pruned, partly measured, nothing pruned, and (the last group's last) unknown."""
    return [
        made_result("conv1", 0.2, merge, share(0.88 + shift)),
        made_result("conv1", 0.5, merge, share(0.6 + shift)),
        made_result("conv1", 0.8, merge, share(0.2 + shift, 100), total=400),
        made_result("layer1.0.conv1", 0.2, merge, share(0.9), channels=(4, 4)),
        made_result("layer1.0.conv1", 0.5, merge, share(0.7)),
        made_result("layer1.0.conv1", 0.8, merge, share(0.5 + shift / 100)),
        made_result("layer2.0.conv1", 0.2, merge, share(0.9)),
        made_result("layer2.0.conv1", 0.5, merge, share(0.85)),
    ]


def grid(results: Sequence[Result], merge: str, groups: Sequence[str] = GROUPS) -> Matrix:
    return sensitivity_matrix(results, merge, groups=groups, sparsities=SPARSITIES)


@pytest.fixture
def fused() -> Matrix:
    return grid(study("fusion", 0.1), "fusion")


@pytest.fixture
def dropped() -> Matrix:
    return grid(study("drop"), "drop")


@pytest.fixture
def gaps(fused: Matrix, dropped: Matrix) -> Difference:
    return difference(fused, dropped)


def many(rows: int = 40) -> Matrix:
    return sensitivity_matrix([made_result(f"g{i}", s, right=i / rows) for i in range(rows) for s in SPARSITIES], "fusion")


def drawn(fig: go.Figure, axis: str = "x") -> np.ndarray:
    """What all heatmaps of a subplot show together; a cell that two of them show fails."""
    layers = np.stack([np.array(trace.z, float) for trace in traces(fig, "heatmap") if (trace.xaxis or "x") == axis])
    assert (np.isfinite(layers).sum(0) <= 1).all()
    return np.where(np.isfinite(layers).any(0), np.nansum(layers, 0), np.nan)


def written(fig: go.Figure, axis: str = "x") -> list[list[str]]:
    layers = [np.array(trace.text, object) for trace in traces(fig, "heatmap") if (trace.xaxis or "x") == axis]
    return np.sum(layers, 0).tolist()


def pointers(fig: go.Figure) -> list[go.Scatter]:
    """The traces that a pointer finds, one a subplot."""
    return [trace for trace in traces(fig, "scatter") if trace.customdata is not None]


def marked(fig: go.Figure, symbol: str) -> list[tuple[int, int]]:
    return [
        (round(y), round(x))
        for trace in traces(fig, "scatter")
        if trace.marker.symbol == symbol
        for x, y in zip(trace.x, trace.y, strict=True)
    ]


class TestHeatmap:
    def test_shows_the_accuracy_where_channels_went_and_nothing_elsewhere(self, fused):
        fig = sensitivity_heatmap(fused)
        np.testing.assert_allclose(drawn(fig), np.where(fused.prunes, 100 * fused.accuracy, np.nan))
        assert written(fig) == [["98", "70", "30"], ["", "70", "50"], ["90", "85", ""]]
        serialised(fig)

    def test_nothing_pruned_is_hollow_partly_measured_dotted_and_both_are_said(self, fused):
        fig = sensitivity_heatmap(fused)
        assert marked(fig, "square-open-dot") == [(1, 0)]
        assert marked(fig, "circle") == [(0, 2)]
        words = fig.layout.title.subtitle.text
        assert "nothing was pruned" in words
        assert "fewer images so far" in words
        whole = grid([made_result("conv1", 0.2)], "fusion")
        assert "pruned" not in sensitivity_heatmap(whole).layout.title.subtitle.text
        assert "fewer" not in sensitivity_heatmap(whole).layout.title.subtitle.text

    def test_rows_are_the_groups_from_the_top_and_columns_the_sparsities(self, fused):
        fig = sensitivity_heatmap(fused)
        assert tuple(fig.layout.yaxis.ticktext) == GROUPS
        assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1]
        assert list(fig.layout.xaxis.ticktext) == ["20", "50", "80"]
        assert "%" in fig.layout.xaxis.title.text

    def test_every_cell_can_be_clicked_and_tells_its_numbers(self, fused):
        (marks,) = pointers(sensitivity_heatmap(fused))
        assert [tuple(place) for place in marks.customdata] == [(g, s) for g in GROUPS for s in SPARSITIES]
        found = dict(
            zip(
                ((GROUPS[y], SPARSITIES[x]) for x, y in zip(marks.x, marks.y, strict=True)),
                marks.hovertext,
                strict=True,
            )
        )
        result = fused.cells["conv1", 0.5].least
        low, high = result.interval
        for words in ("<b>conv1</b> at 50 %", "70.0%", f"{low:.1%} to {high:.1%}", "on 400 images",
                      "5 of 10 channels", "params 95.0%", "MACs 90.0%"):  # fmt: skip
            assert words in found["conv1", 0.5]
        assert "100 of 400 images so far" in found["conv1", 0.8]
        assert "all 4 channels are kept" in found["layer1.0.conv1", 0.2]
        assert "90" not in found["layer1.0.conv1", 0.2]
        assert "not measured yet" in found["layer2.0.conv1", 0.8]

    def test_seeds_are_told(self):
        results = [made_result("conv1", 0.5, right=right, seed=seed) for seed, right in enumerate((0.5, 0.6))]
        (marks,) = pointers(sensitivity_heatmap(grid(results, "fusion")))
        assert "highest end of 2 seeds" in marks.hovertext[1]

    def test_many_cells_have_a_colour_bar_instead_of_numbers(self, fused):
        (heat,) = traces(sensitivity_heatmap(many(60)), "heatmap")
        assert heat.showscale
        assert heat.text is None
        assert not any(trace.showscale for trace in traces(sensitivity_heatmap(fused), "heatmap"))

    def test_colour_ends_at_the_dense_accuracy(self, fused):
        for trace in traces(sensitivity_heatmap(grid(study("drop"), "drop")), "heatmap"):
            assert (trace.zmin, trace.zmax) == (0, 100 * DENSE)
        assert traces(sensitivity_heatmap(fused), "heatmap")[0].zmax == pytest.approx(98)

    def test_selected_cell_is_framed_and_an_unknown_one_is_not(self, fused):
        (frame,) = sensitivity_heatmap(fused, ("layer1.0.conv1", 0.8)).layout.shapes
        assert (frame.x0, frame.x1, frame.y0, frame.y1) == (1.5, 2.5, 0.5, 1.5)
        assert frame.line.color == LIGHT.second
        assert not sensitivity_heatmap(fused, ("gone", 0.8)).layout.shapes

    def test_nothing_measured_is_said_and_drawn(self):
        fig = sensitivity_heatmap(grid([], "fusion"))
        assert title(fig) == "Nothing is measured yet"
        assert np.isnan(drawn(fig)).all()
        assert len(pointers(fig)[0].x) == 9
        check_both_themes(lambda dark: sensitivity_heatmap(grid([], "fusion"), None, dark))

    @pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
    def test_numbers_can_be_read_on_their_cells(self, colours, gaps):
        def light(colour: Sequence[float]) -> float:
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

        def parts(colour: str) -> list[float]:
            return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]

        dark = colours is DARK
        for fig in (sensitivity_heatmap(many(), None, dark), difference_heatmap(gaps, dark=dark)):
            for trace in traces(fig, "heatmap"):
                z = np.array(trace.z, float)
                stops = [at for at, _ in trace.colorscale]
                ends = np.array([parts(colour) for _, colour in trace.colorscale])
                for value in z[np.isfinite(z)]:
                    at = (value - trace.zmin) / (trace.zmax - trace.zmin)
                    cell, text = (
                        light([np.interp(at, stops, end) for end in ends.T]),
                        light(parts(trace.textfont.color)),
                    )
                    assert max(cell, text) / min(cell, text) >= 3

    def test_both_themes(self, fused):
        check_both_themes(lambda dark: sensitivity_heatmap(fused, ("conv1", 0.2), dark))


class TestDifference:
    def test_shows_points_bold_where_decided_and_faint_where_not(self, gaps):
        fig = difference_heatmap(gaps)
        np.testing.assert_allclose(drawn(fig), np.where(gaps.prunes, 100 * gaps.values("difference"), np.nan), atol=1e-9)
        assert written(fig) == [["+10", "+10", "+10"], ["", "0", "0"], ["0", "0", ""]]
        decided = gaps.values("decided") == 1
        for trace in traces(fig, "heatmap"):
            shown = np.isfinite(np.array(trace.z, float))
            assert (decided[shown] == (trace.textfont.weight == "bold")).all()
            assert trace.zmin == -trace.zmax
            middle = [colour for at, colour in trace.colorscale if at == 0.5]
            assert middle == [LIGHT.paper]
            strongest = trace.colorscale[-1][1]
            assert (strongest == LIGHT.fusion) == (trace.textfont.weight == "bold")

    def test_small_differences_do_not_fill_the_scale(self):
        even = difference(grid(study("fusion"), "fusion"), grid(study("drop"), "drop"))
        assert {trace.zmax for trace in traces(difference_heatmap(even), "heatmap")} == {5}

    def test_hover_says_that_the_first_images_speak_of_all(self):
        cells = [sensitivity_matrix([made_result("a", 0.5, right=share, total=2000)], "fusion") for share in (0.9, 0.4)]
        (marks,) = pointers(difference_heatmap(difference(*cells), ("new", "old")))
        (words,) = marks.hovertext
        assert "<br>95 % for all 2,000 images: +" in words

    def test_hover_tells_the_interval_and_the_images_that_decide(self, gaps):
        (marks,) = pointers(difference_heatmap(gaps, ("new", "old")))
        words = dict(zip(map(tuple, marks.customdata), marks.hovertext, strict=True))
        gap = gaps.cells["conv1", 0.5]
        assert "new − old: +10.0 points" in words["conv1", 0.5]
        assert f"+{100 * gap.interval[0]:.1f} to +{100 * gap.interval[1]:.1f}, paired" in words["conv1", 0.5]
        assert "only new correct on 40, only old on 0 of 400 images" in words["conv1", 0.5]
        assert "undecided" in words["layer1.0.conv1", 0.5]
        assert "nothing was pruned" in words["layer1.0.conv1", 0.2]
        assert "not measured yet" in words["layer2.0.conv1", 0.8]

    def test_two_studies_are_counted(self, gaps):
        fig = compare_studies(gaps, ("taylor", "l1"))
        assert title(fig) == "taylor is better than l1 in 3 of 7 cells, worse in 0; 4 are undecided"
        np.testing.assert_allclose(drawn(fig), drawn(difference_heatmap(gaps)))
        apart = difference(grid(study("drop")[:1], "drop"), grid(study("drop")[1:], "drop"))
        assert title(compare_studies(apart, ("a", "b"))) == "a and b share no cell with removed channels"

    def test_both_themes(self, gaps):
        check_both_themes(lambda dark: difference_heatmap(gaps, selected=("conv1", 0.2), dark=dark))
        check_both_themes(lambda dark: compare_studies(gaps, ("a", "b"), None, dark))


class TestPanels:
    def test_show_both_merges_and_their_difference_in_the_same_rows(self, fused, dropped, gaps):
        fig = sensitivity_panels(fused, dropped, gaps)
        for axis, alone in (
            ("x", sensitivity_heatmap(dropped)),
            ("x2", sensitivity_heatmap(fused)),
            ("x3", difference_heatmap(gaps)),
        ):
            np.testing.assert_allclose(drawn(fig, axis), drawn(alone))
            assert written(fig, axis) == written(alone)
        assert [note.text for note in fig.layout.annotations] == ["drop", "fusion", "fusion − drop"]
        assert [axis.matches for axis in (fig.layout.yaxis2, fig.layout.yaxis3)] == ["y", "y"]
        assert tuple(fig.layout.yaxis.ticktext) == GROUPS

    def test_one_colour_means_one_accuracy(self, fused, dropped, gaps):
        fig = sensitivity_panels(fused, dropped, gaps)
        ends = {(t.zmin, t.zmax, t.colorscale) for t in traces(fig, "heatmap") if t.xaxis != "x3"}
        assert len(ends) == 1

    def test_each_panel_can_be_clicked_and_frames_the_selected_cell(self, fused, dropped, gaps):
        fig = sensitivity_panels(fused, dropped, gaps, ("conv1", 0.5))
        places = [[list(place) for place in trace.customdata] for trace in pointers(fig)]
        assert places == [[[g, s] for g in GROUPS for s in SPARSITIES]] * 3
        assert len(fig.layout.shapes) == 3

    def test_matrices_of_other_groups_stand_in_the_common_rows(self, fused):
        dropped = sensitivity_matrix(study("drop")[4:6], "drop")
        fig = sensitivity_panels(fused, dropped, difference(fused, dropped))
        assert drawn(fig, "x").shape == drawn(fig, "x2").shape == (3, 3)
        np.testing.assert_allclose(drawn(fig, "x")[1], [np.nan, 70, 50])

    def test_many_cells_have_two_colour_bars(self):
        fig = sensitivity_panels(many(60), many(60), difference(many(60), many(60)))
        assert [bar.colorbar.title.text for bar in traces(fig, "heatmap") if bar.showscale] == ["accuracy, %", "points"]
        assert len(fig.to_json()) < 300_000

    def test_both_themes(self, fused, dropped, gaps):
        check_both_themes(lambda dark: sensitivity_panels(fused, dropped, gaps, ("conv1", 0.2), dark))


def gap_of(*cells: tuple[str, float, float, float]) -> Difference:
    """Cells of (group, sparsity, accuracy of fusion, accuracy of drop)."""
    both = [
        sensitivity_matrix([made_result(g, s, merge, share(cell[i])) for g, s, *cell in cells], merge)
        for i, merge in enumerate(("fusion", "drop"))
    ]
    return difference(*both)


GAINS = {
    "gains and loses nothing": (
        gap_of(("a", 0.5, 0.8, 0.59)),
        "Fusion gains most in a at 50 %: +21 points; it loses nowhere",
    ),
    "loses a little somewhere": (
        gap_of(("a", 0.5, 0.8, 0.59), ("b", 0.2, 0.8, 0.805)),
        "Fusion gains most in a at 50 %: +21 points; it loses nowhere by more than 1 point",
    ),
    "gains and loses": (
        gap_of(("a", 0.5, 0.8, 0.59), ("b", 0.2, 0.5, 0.7), ("c", 0.2, 0.9, 0.2)),
        "Fusion gains most in c at 20 %: +70 points; it loses most in b at 20 %: −20",
    ),
    "only loses": (
        gap_of(("a", 0.5, 0.5, 0.59), ("b", 0.2, 0.8, 0.8)),
        "Fusion has no significant gain; it loses most in a at 50 %: −9",
    ),
    "too little to tell": (
        gap_of(("a", 0.5, 0.7, 0.69)),
        "No clear difference between fusion and drop on these images",
    ),
    "nothing yet": (gap_of(), "Nothing is measured yet"),
}


class TestTitles:
    @pytest.mark.parametrize(("gaps", "words"), GAINS.values(), ids=GAINS)
    def test_tells_where_the_first_gains_and_loses(self, gaps, words):
        assert gain(gaps) == words
        assert title(difference_heatmap(gaps)) == words

    def test_of_many_cells_one_is_ahead_by_chance(self):
        lucky = gap_of(*[(f"g{i}", 0.5, 0.5 + 0.015 * (i == 7), 0.5) for i in range(60)])
        assert lucky.cells["g7", 0.5].decided
        assert "No clear difference" in gain(lucky)

    def test_nothing_pruned_is_said(self):
        whole = [grid([made_result("conv1", 0.2, m, DENSE, channels=(4, 4))], m) for m in ("fusion", "drop")]
        assert gain(difference(*whole)).startswith("Nothing was pruned")
        assert sensitivity_headline(whole[0]).startswith("Nothing was pruned")

    def test_tells_the_cell_that_loses_most(self, dropped):
        assert sensitivity_headline(dropped) == "With drop, accuracy is lowest for conv1 at 80 %: 20 %"
        assert sensitivity_headline(grid([made_result("conv1", 0.2, right=0.95)], "fusion")).endswith(
            "no group alone loses any accuracy"
        )


class TestFragility:
    def test_bars_are_the_losses_the_most_fragile_on_top(self, fused, dropped):
        ranked = {"drop": fragility(dropped), "fusion": fragility(fused)}
        fig = fragility_bars(ranked)
        assert list(fig.layout.yaxis.ticktext) == [found.group for found in ranked["drop"]]
        assert fig.layout.yaxis.range[0] > fig.layout.yaxis.range[1]
        for bars, (merge, own) in zip(traces(fig, "bar"), ranked.items(), strict=True):
            assert bars.name == merge
            assert bars.marker.color == LIGHT.merge(merge)
            for row, x, up, down, group in zip(
                bars.y, bars.x, bars.error_x.array, bars.error_x.arrayminus, bars.customdata, strict=True
            ):
                (found,) = [f for f in own if f.group == group]
                assert fig.layout.yaxis.ticktext[row] == group
                assert (x, x - down, x + up) == pytest.approx((100 * found.loss, *(100 * end for end in found.interval)))
        first = ranked["drop"][0]
        assert title(fig).startswith(
            f"{first.group} is the most fragile group: it loses {100 * first.loss:.1f} points with drop"
        )
        assert all(merge in fig.layout.title.subtitle.text for merge in ranked)

    def test_what_was_not_pruned_or_not_measured_is_said_and_has_no_bar(self):
        made = grid([made_result("conv1", 0.2, right=DENSE, channels=(4, 4)), made_result("layer2.0.conv1", 0.5)], "fusion")
        fig = fragility_bars({"fusion": fragility(made)})
        assert list(fig.layout.yaxis.ticktext) == ["layer2.0.conv1", "conv1", "layer1.0.conv1"]
        assert list(traces(fig, "bar")[0].customdata) == ["layer2.0.conv1"]
        notes = {note.y: note.text for note in fig.layout.annotations}
        assert notes == {0: "1 of 3 sparsities", 1: "nothing was pruned", 2: "not measured yet"}

    def test_hover_tells_what_is_safe(self):
        results = [made_result("conv1", s, right=right) for s, right in ((0.2, 0.9), (0.5, 0.89), (0.8, 0.3))]
        (bars,) = traces(fragility_bars({"fusion": fragility(grid(results, "fusion"))}), "bar")
        assert "from 20 % to 80 %" in bars.hovertext[0]
        assert "loses at most 1 point up to 50 %" in bars.hovertext[0]
        worse = fragility(grid([made_result("conv1", 0.2, right=0.1)], "fusion"))
        assert "loses more than 1 point at the smallest" in traces(fragility_bars({"fusion": worse}), "bar")[0].hovertext[0]

    @pytest.mark.parametrize(
        ("results", "words"),
        [
            ([], "Nothing is measured yet"),
            ([made_result("conv1", 0.2, channels=(4, 4))], "Nothing was pruned, so no group can be called robust"),
        ],
    )
    def test_without_a_fragile_group_the_title_says_why(self, results, words):
        assert title(fragility_bars({"fusion": fragility(sensitivity_matrix(results, "fusion"))})) == words

    def test_both_themes(self, fused, dropped):
        ranked = {"fusion": fragility(fused), "drop": fragility(dropped)}
        check_both_themes(lambda dark: fragility_bars(ranked, dark))


def suggestion(merge: str = "fusion", note: str = "") -> Suggestion:
    return Suggestion(
        merge, {"conv1": 0.0, "layer1.0.conv1": 0.5}, {"conv1": (16, 16), "layer1.0.conv1": (1024, 2048)},
        0.8234, 0.9, Size(400, 300), Size(1000, 600), not note, note,
    )  # fmt: skip


class TestSuggestion:
    def test_one_bar_a_group_with_what_stays(self):
        (bars,) = (fig := suggestion_bars(suggestion())).data
        assert list(bars.customdata) == list(fig.layout.yaxis.ticktext) == ["conv1", "layer1.0.conv1"]
        assert list(bars.x) == [0, 50]
        assert list(bars.text) == ["all 16 kept", "50 %: 1,024 of 2,048 kept"]
        assert title(fig) == "82.3 % expected with 40 % of the parameters and 50 % of the MACs"
        assert "add up" in fig.layout.title.subtitle.text

    def test_a_target_out_of_reach_is_said(self):
        assert suggestion_bars(suggestion(note="out of reach")).layout.title.subtitle.text == "out of reach"

    @pytest.mark.parametrize(("merge", "colours"), [("drop", LIGHT), ("fusion", DARK)])
    def test_colour_tells_the_merge(self, merge: str, colours: Palette):
        (bars,) = suggestion_bars(suggestion(merge), colours is DARK).data
        assert bars.marker.color == colours.merge(merge)

    def test_both_themes(self):
        check_both_themes(lambda dark: suggestion_bars(suggestion(), dark))
