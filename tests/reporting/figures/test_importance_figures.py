import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from figure_reading import check_both_themes, title

from intrafusion.pruning.agreement import CriteriaComparison, compare_criteria
from intrafusion.pruning.groups.group import Group
from intrafusion.reporting.figures.agreement import agreement_headline, agreement_matrix
from intrafusion.reporting.figures.images import attribution_panels, gallery
from intrafusion.reporting.figures.importance import criteria_side_by_side, importance_bars, label_width
from intrafusion.reporting.figures.theme import LIGHT


def compared(n: int = 12, sparsity: float = 0.25, names: tuple[str, ...] = ("l1", "taylor", "random")) -> CriteriaComparison:
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(n, generator=generator) for name in names}
    return compare_criteria(scores, Group("g", n, (), torch.zeros(n, dtype=torch.int64)), sparsity)


def marks(fig: go.Figure) -> go.Scatter:
    """The trace that a pointer finds."""
    (found,) = [trace for trace in fig.data if trace.type == "scatter" and trace.customdata is not None]
    return found


class TestSideBySide:
    @pytest.mark.parametrize("show", ["ranks", "scores"])
    def test_kept_cells_are_the_accent_and_the_others_grey(self, show):
        made = compared()
        fig = criteria_side_by_side(made, show=show, by_rank=False)
        assert ((fig.data[0].z > 0) == made.kept).all()
        assert (fig.data[0].z >= -1.01).all()
        assert (fig.data[0].z <= 1).all()

    def test_columns_follow_the_first_criterion_as_its_bars_do(self):
        made = compared()
        fig = criteria_side_by_side(made)
        bars = importance_bars(made.scores[0], made.kept[0].nonzero()[0], "l1")
        assert [row[0] for row in marks(fig).customdata[:12]] == list(bars.data[0].customdata)
        assert tuple(fig.layout.xaxis.range) == tuple(bars.layout.xaxis.range)

    def test_each_cell_tells_its_own_numbers(self):
        made = compared()
        for x, y, (channel, name, word, rank, score) in zip(
            marks(fig := criteria_side_by_side(made)).x, marks(fig).y, marks(fig).customdata, strict=True
        ):
            row = made.names.index(name)
            assert (row, x) == (y, (made.ranks[0] - 1)[channel])
            assert (rank, score) == (made.ranks[row, channel], made.scores[row, channel])
            assert (word == "is kept") == made.kept[row, channel]

    def test_many_channels_have_one_mark_a_column(self):
        made = compared(2048)
        fig = criteria_side_by_side(made, selected=5)
        assert len(marks(fig).x) == 2048
        assert len(fig.data) == 2
        assert len(fig.to_json()) < 400_000

    def test_reasons_stand_in_rows_of_their_own(self):
        fig = criteria_side_by_side(compared(), {"chip": "not computed yet"})
        assert list(fig.layout.yaxis.ticktext) == ["<b>l1</b>", "taylor", "random", "chip"]
        (note,) = fig.layout.annotations
        assert (note.text, note.y) == ("not computed yet", 3)

    def test_the_chosen_channel_is_framed(self):
        (frame,) = criteria_side_by_side(compared(), by_rank=False, selected=7).layout.shapes
        assert (frame.x0, frame.x1, frame.line.color) == (6.5, 7.5, LIGHT.second)

    @pytest.mark.parametrize(
        ("made", "says"),
        [
            (compared(sparsity=0), "Nothing is pruned at this sparsity: all 12 channels are kept"),
            (compared(names=("l1",)), "l1 keeps 9 of 12 channels"),
        ],
    )
    def test_title_says_what_is_seen(self, made, says):
        assert title(criteria_side_by_side(made)) == says

    def test_title_counts_agreement(self):
        made = compared()
        everyone, nobody = int(made.kept.all(0).sum()), int((~made.kept).all(0).sum())
        assert title(criteria_side_by_side(made)) == (
            f"All 3 criteria keep {everyone} of 12 channels; they disagree on {12 - everyone - nobody}"
        )

    def test_scores_below_zero_and_flat_ones_are_drawn(self):
        scores = {"a": torch.tensor([-1.0, 0, 1]), "flat": torch.zeros(3)}
        made = compare_criteria(scores, Group("g", 3, (), torch.zeros(3, dtype=torch.int64)), 0.4)
        assert np.isfinite(criteria_side_by_side(made, show="scores").data[0].z).all()

    def test_both_themes(self):
        check_both_themes(lambda dark: criteria_side_by_side(compared(), {"chip": "not computed yet"}, "scores", True, 3, dark))


class TestAgreement:
    def test_numbers_in_the_cells(self):
        made = compared()
        upper, lower = agreement_matrix(made).data
        assert upper.text[0][1] == f"{made.spearman[0, 1]:.2f}".replace("-", "−")
        assert lower.text[2][0] == f"{made.overlap[2, 0]:.0%}"
        for half, triangle in ((upper, np.triu), (lower, np.tril)):
            shown = np.asarray(half.text) != ""
            assert (shown == (triangle(np.ones((3, 3)), 1 if half is upper else -1) > 0)).all()

    def test_no_colour_is_chance(self):
        n = 12
        scores = {"a": torch.arange(n).double(), "b": torch.arange(n).double().roll(3)}
        made = compare_criteria(scores, Group("g", n, (), torch.zeros(n, dtype=torch.int64)), 0.5)
        assert made.overlap[0, 1] == made.chance.overlap == 0.5
        assert agreement_matrix(made).data[1].z[1][0] == 0

    def test_nothing_pruned_is_said_and_no_overlap_is_shown(self):
        made = compared(sparsity=0)
        assert len(agreement_matrix(made).data) == 1
        assert "Nothing is pruned" in agreement_headline(made)

    def test_headline_names_the_two_that_agree_least_but_not_the_control(self):
        made = compared(names=("l1", "taylor", "random", "chip"))
        shared = {
            (a, b): made.shared(i, j)
            for i, a in enumerate(made.names)
            for j, b in enumerate(made.names)
            if i < j and "random" not in (a, b)
        }
        least = min(shared.values())
        assert any(agreement_headline(made).startswith(f"{a} and {b} agree least: {least} of 9") for a, b in shared)
        assert "7 by chance" in agreement_headline(made)
        assert agreement_headline(compared(names=("l1", "random"))).startswith("l1 and random agree: ")

    def test_a_criterion_without_a_ranking_gets_a_dash(self):
        scores = {"a": torch.arange(4.0), "flat": torch.ones(4)}
        made = compare_criteria(scores, Group("g", 4, (), torch.zeros(4, dtype=torch.int64)), 0.5)
        assert agreement_matrix(made).data[0].text[0][1] == "–"

    @pytest.mark.parametrize("count", [2, 15])
    def test_both_themes(self, count):
        check_both_themes(lambda dark: agreement_matrix(compared(names=tuple(f"c{i}" for i in range(count))), 540, dark))


class TestImages:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_gallery_holds_each_image_once_and_frames_the_chosen_one(self, channels):
        images = list(np.random.default_rng(0).integers(0, 256, (5, 8, 8, channels), dtype=np.uint8))
        fig = gallery(images, list("abcde"), "five", chosen=2)
        assert len(fig.layout.images) == 5
        assert list(marks(fig).customdata) == [1, 2, 3, 4, 5]
        assert [shape.line.color == LIGHT.second for shape in fig.layout.shapes] == [False, False, True, False, False]
        assert [note.text for note in fig.layout.annotations] == list("abcde")
        check_both_themes(lambda dark: gallery(images, list("abcde"), "five", 2, dark))

    def test_small_images_are_enlarged_without_smoothing(self):
        from base64 import b64decode
        from io import BytesIO

        from PIL import Image

        image = np.array([[0, 255], [255, 0]], np.uint8)[..., None]
        fig = gallery([image], ["a"], "one")
        shown = np.asarray(Image.open(BytesIO(b64decode(fig.layout.images[0].source.split(",")[1]))))
        assert shown.shape == (160, 160)
        assert (shown == np.kron(image[..., 0], np.ones((80, 80), np.uint8))).all()

    @pytest.mark.parametrize("seen", [(4, 4), (1, 1), (1, 3)])
    def test_panels_are_aligned_whatever_their_resolution(self, seen):
        image, pixels = np.zeros((8, 6, 3), np.uint8), np.linspace(-1, 2, 48).reshape(8, 6)
        fig = attribution_panels(image, np.ones(seen), pixels, "one", "gradient")
        maps = [trace for trace in fig.data if trace.type == "heatmap"]
        assert len(maps) == 1 + (min(seen) > 1)
        for trace in maps:
            rows, columns = trace.z.shape
            assert (trace.x0 - trace.dx / 2, trace.x0 + (columns - 0.5) * trace.dx) == pytest.approx((0, 6))
            assert (trace.y0 - trace.dy / 2, trace.y0 + (rows - 0.5) * trace.dy) == pytest.approx((0, 8))
        assert maps[-1].zmin == -maps[-1].zmax
        assert "gradient" in [note.text for note in fig.layout.annotations]
        check_both_themes(lambda dark: attribution_panels(image, np.ones(seen), pixels, "one", "gradient", dark))

    def test_nothing_attributed_and_nothing_active_are_drawn(self):
        fig = attribution_panels(np.zeros((8, 8, 1), np.uint8), np.zeros((4, 4)), np.zeros((8, 8)), "dead", "gradient")
        assert all(trace.zmax > trace.zmin for trace in fig.data)


def test_long_names_get_room():
    assert label_width(["l1"]) < label_width(["activation-gradient"]) < 200
