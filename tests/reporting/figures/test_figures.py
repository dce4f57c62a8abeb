from collections.abc import Callable

import numpy as np
import pytest
import torch
from figure_reading import check_both_themes, numbers, serialised, title
from torch import Tensor

import intrafusion as itf
from intrafusion.pruning.transport.planning import TransportPlan
from intrafusion.reporting.figures.curves import curves, curves_headline
from intrafusion.reporting.figures.importance import importance_bars
from intrafusion.reporting.figures.theme import DARK, LIGHT, rgba, tint
from intrafusion.studies.measurement import Result, run_spec
from intrafusion.studies.session import Session, open_session
from intrafusion.studies.sweeps import grid, sweep

BASE = itf.PruneSpec(model="digits-resnet", limit=60)


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(BASE)


@pytest.fixture(scope="module")
def planned(session: Session) -> Callable[..., tuple[Tensor, TransportPlan]]:
    """Scores and plan of a 32-channel group of digits-resnet."""
    group = next(group for group in session.groups if group.name == "layer2.0.conv1")
    scores = itf.score(session.model, group)

    def make(sparsity: float = 0.3, **knobs: object) -> tuple[Tensor, TransportPlan]:
        return scores, itf.plan(session.model, group, scores, sparsity, **knobs)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def zero_padded() -> tuple[Tensor, TransportPlan]:
    """A group of several blocks, between which the cost is infinite."""
    torch.manual_seed(0)
    session = open_session("cifar10-resnet20", weights="random")
    group = next(group for group in session.groups if group.name == "conv1")
    scores = itf.score(session.model, group)
    return scores, itf.plan(session.model, group, scores, 0.4)


@pytest.fixture(scope="module")
def results(session: Session) -> list[Result]:
    specs = grid(BASE, criterion=["l1", "random"], merge=["drop", "fusion"], sparsity=[0.2, 0.5, 0.8])
    return list(sweep(specs, session))


class TestImportance:
    @pytest.mark.parametrize("sparsity", [0, 0.3, 0.9])
    @pytest.mark.parametrize("by_rank", [True, False])
    def test_one_bar_a_channel_that_carries_its_channel(self, planned, sparsity, by_rank):
        scores, plan = planned(sparsity)
        fig = importance_bars(scores.tolist(), plan.kept.tolist(), "l1", by_rank)
        (bars,) = fig.data
        assert len(bars.x) == len(bars.y) == 32
        assert sorted(bars.customdata) == list(range(32))
        assert [scores[int(channel)] for channel in bars.customdata] == list(bars.y)
        assert list(bars.y) == sorted(bars.y, reverse=True) if by_rank else list(bars.customdata) == list(range(32))
        solid = [colour == LIGHT.fusion for colour in bars.marker.color]
        assert solid == [int(channel) in set(plan.kept.tolist()) for channel in bars.customdata]
        serialised(fig)

    def test_title_and_cut_say_what_the_data_say(self, planned):
        scores, plan = planned(0.3)
        fig = importance_bars(scores.tolist(), plan.kept.tolist(), "l1")
        assert title(fig) == "22 of 32 channels are kept, 10 removed"
        (cut,) = fig.layout.shapes
        assert cut.x0 == cut.x1 == 21.5
        scores, plan = planned(0)
        whole = importance_bars(scores.tolist(), plan.kept.tolist(), "l1")
        assert "32 of 32 channels are kept" in title(whole)
        assert "nothing is pruned" in title(whole)
        assert not whole.layout.shapes

    def test_no_single_cut_where_blocks_or_clusters_choose(self, planned, zero_padded):
        scores, plan = zero_padded
        order = scores.argsort(descending=True)
        assert set(order[: len(plan.kept)].tolist()) != set(plan.kept.tolist())
        assert not importance_bars(scores.tolist(), plan.kept.tolist(), "l1").layout.shapes
        assert not importance_bars([1, 2, 3], [1, 2], "l1", by_rank=False).layout.shapes

    def test_axis_names_the_channels_and_the_criterion(self):
        fig = importance_bars([0.1, 0.9, 0.5], [1, 2], "bn_scale")
        assert list(fig.layout.xaxis.ticktext) == ["1", "2", "0"]
        assert "bn_scale" in fig.layout.yaxis.title.text
        assert "important first" in fig.layout.xaxis.title.text

    @pytest.mark.parametrize("n", [1, 2, 17, 512])
    def test_any_number_of_channels_is_drawn_with_few_labels(self, n):
        fig = importance_bars(list(range(n)), [n - 1], "l1")
        assert len(fig.data[0].x) == n
        assert len(fig.layout.xaxis.tickvals) == min(n, 17)
        serialised(fig)

    @pytest.mark.parametrize("by_rank", [True, False])
    def test_selected_channel_alone_is_marked(self, planned, by_rank):
        scores, plan = planned(0.3)
        (bars,) = importance_bars(scores.tolist(), plan.kept.tolist(), "l1", by_rank, selected=7).data
        marked = [int(c) for c, edge in zip(bars.customdata, bars.marker.line.color, strict=True) if edge == LIGHT.second]
        assert marked == [7]

    def test_light_and_dark_differ(self, planned):
        scores, plan = planned(0.3)
        check_both_themes(lambda dark: importance_bars(scores.tolist(), plan.kept.tolist(), "l1", dark=dark))


def result(sparsity: float, merge: str, accuracy: float, criterion: str = "l1", channels: int = 5) -> Result:
    spec = itf.PruneSpec(sparsity=sparsity, merge=merge, criterion=criterion)
    return Result(spec, accuracy, (accuracy, accuracy), 100, 100, 0.99, 1, 2, 1, 2, channels, 10, 0.1, b"")


HEADLINES = {
    "fusion ahead": (
        [result(0.2, "drop", 0.3), result(0.2, "fusion", 0.9)],
        "At 20%, fusion keeps 90 % where dropping keeps 30 %",
    ),
    "widest gap": (
        [result(s, m, a) for s, m, a in [
            (0.1, "drop", 0.8), (0.1, "fusion", 0.9), (0.4, "fusion", 0.7), (0.4, "drop", 0.2), (0.8, "fusion", 0.1),
            (0.8, "drop", 0.1),
        ]],
        "At 40%, fusion keeps 70 % where dropping keeps 20 %",
    ),
    "dropping ahead": (
        [result(0.5, "drop", 0.8), result(0.5, "fusion", 0.25)],
        "At 50%, fusion keeps only 25 % where dropping keeps 80 %",
    ),
    "no pair at one sparsity": ([result(0.2, "drop", 0.3), result(0.3, "fusion", 0.9)], "Accuracy against sparsity"),
    "no pair of one criterion": (
        [result(0.2, "drop", 0.3, "l1"), result(0.2, "fusion", 0.9, "l2")],
        "Accuracy against sparsity",
    ),
    "fusion alone": ([result(0.2, "fusion", 0.9)], "Accuracy against sparsity"),
    "nothing yet": ([], "Accuracy against sparsity"),
}  # fmt: skip


class TestCurves:
    @pytest.mark.parametrize(("points", "words"), HEADLINES.values(), ids=HEADLINES)
    def test_headline_tells_the_widest_gap(self, points, words):
        assert curves_headline(points) == words
        assert title(curves(points, [0.2, 0.8], None)) == words

    def test_headline_says_when_nothing_was_pruned(self):
        points = [result(0.01, merge, 0.99, channels=10) for merge in ("drop", "fusion")]
        assert "Nothing was pruned" in curves_headline(points)
        points += [result(0.5, "drop", 0.4), result(0.5, "fusion", 0.6)]
        assert curves_headline(points).startswith("At 50%")

    def test_one_line_a_criterion_and_merge_with_its_points_in_order(self, results):
        fig = curves(results[::-1], [0.2, 0.5, 0.8], None)
        lines = [trace for trace in fig.data if trace.name]
        assert {line.name for line in lines} == {f"{m}, {c}" for m in ("drop", "fusion") for c in ("l1", "random")}
        assert len(lines) == 4
        for line in lines:
            merge, criterion = line.name.split(", ")
            own = [r for r in results if (r.spec.merge, r.spec.criterion) == (merge, criterion)]
            np.testing.assert_allclose(numbers(line.x), [20, 50, 80])
            np.testing.assert_allclose(numbers(line.y), [100 * r.accuracy for r in own])
            np.testing.assert_allclose(
                numbers(line.customdata),
                [
                    [*r.interval, r.params / r.params_before, r.macs / r.macs_before, r.channels, 3 * (16 + 32 + 64)]
                    for r in own
                ],
            )

    def test_band_is_the_interval(self, results):
        own = [r for r in results if (r.spec.merge, r.spec.criterion) == ("fusion", "l1")]
        band, line = curves(own, [0.2, 0.5, 0.8], None).data
        assert band.fill == "toself"
        np.testing.assert_allclose(numbers(band.x), [20, 50, 80, 80, 50, 20])
        np.testing.assert_allclose(
            numbers(band.y), [100 * r.interval[1] for r in own] + [100 * r.interval[0] for r in own[::-1]]
        )
        assert all((numbers(band.y)[:3] >= numbers(line.y)) & (numbers(band.y)[5:2:-1] <= numbers(line.y)))

    def test_colour_tells_the_merge_and_dash_the_criterion(self, results):
        lines = {line.name: line.line for line in curves(results, [0.8], None).data if line.name}
        assert {lines[name].color for name in lines if name.startswith("drop")} == {LIGHT.drop}
        assert {lines[name].color for name in lines if name.startswith("fusion")} == {LIGHT.fusion}
        assert lines["drop, l1"].dash == lines["fusion, l1"].dash != lines["drop, random"].dash

    def test_lines_are_labelled_where_they_lie_apart(self, results):
        fig = curves(results, [0.2, 0.5, 0.8], (0.99, (0.97, 1.0)))
        labels = {annotation.text.strip(): annotation for annotation in fig.layout.annotations}
        assert set(labels) == {"dense 99.0%", "drop (l1)", "fusion (l1)", "drop (random)", "fusion (random)"}
        pair = {m: [r for r in results if (r.spec.merge, r.spec.criterion) == (m, "l1")] for m in ("drop", "fusion")}
        gaps = {d.spec.sparsity: f.accuracy - d.accuracy for d, f in zip(pair["drop"], pair["fusion"], strict=True)}
        alone = curves(pair["drop"] + pair["fusion"], [0.2, 0.5, 0.8], None).layout.annotations
        widest = max(gaps, key=lambda sparsity: abs(gaps[sparsity]))
        assert {annotation.x for annotation in alone} == {100 * widest}
        assert alone[0].yanchor != alone[1].yanchor
        one = curves([r for r in results if r.spec.criterion == "l1"], [0.8], None)
        assert {annotation.text.strip() for annotation in one.layout.annotations} == {"drop", "fusion"}

    def test_dense_accuracy_is_a_line_in_its_band(self):
        fig = curves([], [0.5], (0.95, (0.93, 0.97)))
        heights = sorted((shape.y0, shape.y1) for shape in fig.layout.shapes)
        np.testing.assert_allclose(heights, [(93, 97), (95, 95)])

    def test_axis_stands_still_while_points_arrive(self, results):
        whole = curves(results, [0.2, 0.5, 0.8], None)
        for count in (0, 1, 5):
            assert curves(results[:count], [0.2, 0.5, 0.8], None).layout.xaxis.range == whole.layout.xaxis.range
            assert curves(results[:count], [0.2, 0.5, 0.8], None).layout.yaxis.range == whole.layout.yaxis.range
        assert whole.layout.xaxis.range[1] > 80

    def test_real_headline_quotes_real_numbers(self, session):
        base = BASE.but(sparsity=0.2, limit=None)
        points = {merge: run_spec(base.but(merge=merge), session) for merge in ("drop", "fusion")}
        words = curves_headline(list(points.values()))
        for point in points.values():
            assert f"{100 * point.accuracy:.0f} %" in words
        assert "20%" in words

    def test_light_and_dark_differ_and_serialise(self, results):
        check_both_themes(lambda dark: curves(results, [0.2, 0.5, 0.8], (0.99, (0.97, 1.0)), dark))
        check_both_themes(lambda dark: curves([], [0.2], None, dark))


class TestTheme:
    def test_tint_runs_from_the_ground_to_the_colour(self):
        assert tint("#0f766e", "#ffffff", 0) == "#ffffff"
        assert tint("#0f766e", "#ffffff", 1) == "#0f766e"
        assert tint("#000000", "#ffffff", 0.5) == "#808080"

    def test_rgba(self):
        assert rgba("#0f766e", 0.25) == "rgba(15,118,110,0.25)"

    @pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
    def test_scales_start_at_the_ground_and_merges_have_their_colours(self, colours):
        for scale in (colours.mass(), colours.cost()):
            assert scale[0] == [0.0, colours.paper]
            assert [stop for stop, _ in scale] == sorted(stop for stop, _ in scale)
            assert scale[-1][0] == 1.0
        assert colours.merge("drop") == colours.drop
        assert colours.merge("fusion") == colours.fusion
        assert colours.merge("another") not in (colours.drop, colours.fusion)

    @pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
    def test_ink_and_lines_can_be_read_on_their_ground(self, colours):
        def luminance(colour: str) -> float:
            channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        def contrast(a: str, b: str) -> float:
            high, low = sorted((luminance(a), luminance(b)), reverse=True)
            return (high + 0.05) / (low + 0.05)

        assert contrast(colours.dense, colours.paper) >= 7  # WCAG 2: 7 for text, 3 for what is drawn
        assert all(contrast(c, colours.paper) >= 3 for c in (colours.drop, colours.fusion, colours.second))
