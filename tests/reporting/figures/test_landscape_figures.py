"""The Landscape page's pictures: what their titles say is what their numbers are."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from figure_reading import check_both_themes, numbers, serialised, title, traces

from intrafusion.evaluation.loss_landscape import Surface
from intrafusion.reporting.figures.landscape import MEASURES, empty_plane, path_panels, percent, sharp_bars, slice_map
from intrafusion.reporting.figures.theme import LIGHT
from intrafusion.studies.weight_space import Mark, Sharpness, Slice
from intrafusion.training.mode_connectivity import Path, Walk, nothing

MARKS = (
    Mark("dense", 0.0, 0.0, 0.01, 0.996, (0.98, 1.0), 500, 0.0),
    Mark("dropped", 20.0, 0.0, 4.2, 0.1, (0.08, 0.13), 500, 20.0),
    Mark("fused", 18.0, 14.0, 0.4, 0.872, (0.84, 0.9), 500, 22.8),
)


def made_slice(measured: int = 1, size: int = 9) -> Slice:
    """A slice of which every `measured`-th row and column is measured; nothing for 0."""
    x, y = np.linspace(-5, 25, size), np.linspace(-5, 20, size)
    known = np.full((size, size), np.nan)
    if measured:
        known[::measured, ::measured] = (x[None, ::measured] + y[::measured, None] + 10) / 60
    return Slice(Surface(x, y, np.exp(8 * known) - 1.1, known), MARKS)


def bowl(depth: float, points: int = 5) -> Walk:
    t = np.linspace(0, 1, points)
    return Walk(t, 1 + depth * 4 * t * (1 - t), 0.9 - depth * 0.4 * t * (1 - t))


class TestSlice:
    @pytest.mark.parametrize("what", MEASURES)
    def test_in_both_themes(self, what):
        check_both_themes(lambda dark: slice_map(made_slice(), what, dark))

    def test_the_title_is_of_the_marks(self):
        assert title(slice_map(made_slice())) == "Fused keeps 87.2% where dropped keeps 10.0%; dense has 99.6%"
        worse = (MARKS[0], replace(MARKS[1], accuracy=0.9), MARKS[2])
        assert title(slice_map(replace(made_slice(), marks=worse))).startswith("Fused keeps only 87.2%")

    def test_marks_lie_where_they_are_whatever_the_grid(self):
        for found in (made_slice(0), made_slice(4), made_slice(1)):
            points = traces(slice_map(found), "scatter")
            assert [(p.name, p.x[0], p.y[0]) for p in points] == [(m.name, m.x, m.y) for m in MARKS]
        assert [p.marker.color for p in points] == [LIGHT.dense, LIGHT.drop, LIGHT.fusion]

    @pytest.mark.parametrize(("measured", "side"), [(4, 3), (2, 5), (1, 9)])
    def test_only_what_is_measured_is_drawn(self, measured, side):
        (contour,) = traces(slice_map(made_slice(measured)), "contour")
        assert numbers(contour.z).shape == (side, side)
        assert np.isfinite(numbers(contour.z)).all()
        assert not traces(slice_map(made_slice(0)), "contour")

    def test_axes_stand_still_while_it_is_measured_and_distances_are_true(self):
        first, last = slice_map(made_slice(0)).layout, slice_map(made_slice(1)).layout
        assert first.xaxis.range == last.xaxis.range == (-5, 25)
        assert last.yaxis.scaleanchor == "x"

    def test_a_loss_that_is_no_number_can_be_drawn(self):
        found = made_slice()
        found.surface.loss[0, :3] = np.inf, np.nan, 0
        fig = slice_map(found, "loss")
        serialised(fig)
        assert np.isfinite(numbers(traces(fig, "contour")[0].z)).all()


class TestPath:
    def test_in_both_themes(self):
        found = Path(bowl(1), bowl(0), None, (), 0, 0, 100)
        check_both_themes(lambda dark: path_panels(found, ("dense", "fused"), dark))

    def test_the_title_averages_both_ways_once_they_are_known(self):
        ends = "dense", "fused"
        assert title(path_panels(Path(nothing(5), nothing(5), None, (), 0, 0, 100), ends)) == "From dense to fused"
        assert "85.0% on average along the straight line" in title(
            path_panels(Path(bowl(1), nothing(5), None, (), 0, 0, 100), ends)
        )
        both = title(path_panels(Path(bowl(1), bowl(0), None, (), 0, 0, 100), ends))
        assert both == "From dense to fused: 90.0% on average along a trained path, 85.0% along the line"

    def test_what_is_not_measured_is_not_drawn(self):
        line = bowl(1)
        line.accuracy[1] = line.loss[1] = np.nan
        fig = path_panels(Path(line, nothing(5), None, (), 0, 0, 100), ("dense", "fused"))
        serialised(fig)
        assert [len(trace.x) for trace in fig.data] == [4, 4, 0, 0]

    def test_both_walks_are_named(self):
        fig = path_panels(Path(bowl(1), bowl(0), None, (), 0, 0, 100), ("dense", "fused"))
        assert {"straight line", "trained path"} <= {note.text for note in fig.layout.annotations}


class TestSharp:
    FOUND = Sharpness(
        torch.tensor([3.0, 2.0]), torch.tensor([0.0, 0.1]), 9, 9,
        {"dropped": 0.02, "fused": 0.005, "random": 0.001, "random, changed weights": 0.002}, 64, 1000,
    )  # fmt: skip

    def test_in_both_themes(self):
        check_both_themes(lambda dark: sharp_bars(self.FOUND, dark))

    def test_bars_are_the_numbers(self):
        fig = sharp_bars(self.FOUND)
        values, shares = traces(fig, "bar")
        assert list(values.y) == [3, 2]
        assert dict(zip(shares.y, shares.x, strict=True)) == self.FOUND.shares
        assert title(fig) == "Share in the 2 sharpest directions: dropping 10 times chance, fusion 2.5 times"

    def test_before_the_last_step_it_says_how_far_it_is(self):
        early = Sharpness(torch.tensor([3.0]), torch.tensor([1.0]), 1, 9, {}, 64, 1000)
        assert title(sharp_bars(early)) == "The 1 sharpest directions so far, step 1 of 9"
        serialised(sharp_bars(early))

    @pytest.mark.parametrize(("share", "says"), [(0.5, "50 %"), (0.00123, "0.123 %"), (1e-7, "1.0e-05 %"), (0.0, "0 %")])
    def test_small_shares_in_words(self, share, says):
        assert percent(share) == says


def test_an_empty_picture_has_the_height_of_the_full_one():
    assert empty_plane("Soon", 123).layout.height == 123
    check_both_themes(lambda dark: empty_plane("Soon", 123, dark))
