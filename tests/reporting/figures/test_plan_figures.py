import json
import re

import numpy as np
import pytest
import torch
from figure_reading import check_both_themes, numbers, serialised, title, traces

import intrafusion as itf
from intrafusion.pruning.merge import ChannelMap
from intrafusion.pruning.transport.planning import TransportPlan, shared_mass, solve
from intrafusion.reporting.figures._raster import CELLS, _pooled, picture
from intrafusion.reporting.figures.kernels import kernel_rows
from intrafusion.reporting.figures.plans import channel_map, learned_beside, sparsity_player, two_plans
from intrafusion.reporting.figures.theme import LIGHT
from intrafusion.reporting.figures.transport import ORDERS, VIEWS, arrange, plan_heatmap, weight_bars
from intrafusion.studies.session import open_session


@pytest.fixture(scope="module")
def opened():
    session = open_session("digits-resnet")
    return session, next(group for group in session.groups if group.name == "layer2.0.conv1")


@pytest.fixture(scope="module")
def planned(opened):
    """Scores and plan of a 32-channel group of digits-resnet."""
    session, group = opened
    spec = itf.PruneSpec()
    scores = session.scores(spec, group).values

    def make(sparsity=0.3, **knobs):
        return scores, solve(session.geometry(spec, group), scores, sparsity, **knobs)

    return make


@pytest.fixture(scope="module")
def zero_padded():
    """A group of several blocks, between which the cost is infinite."""
    torch.manual_seed(0)
    session = open_session("cifar10-resnet20", weights="random")
    group = next(group for group in session.groups if group.name == "conv1")
    scores = itf.score(session.model, group)
    return scores, itf.plan(session.model, group, scores, 0.4)


def large(n=256, k=64):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.zeros(k, n, dtype=torch.float64)
    matrix[torch.randint(k, (n,), generator=generator), torch.arange(n)] = 1
    return TransportPlan(
        matrix.T / n, matrix, torch.arange(k), torch.rand(n, k, generator=generator).double(),
        torch.full((n,), 1 / n).double(), matrix.sum(1) / n, False,
    )  # fmt: skip


KNOBS = [
    {}, {"sparsity": 0}, {"anchors": "kmeans"}, {"target": "importance", "normalise": "target"}, {"solver": "sinkhorn"},
    {"solver": "partial"}, {"solver": "unbalanced"},
]  # fmt: skip


class TestHeatmap:
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("knobs", KNOBS, ids=str)
    def test_picture_shows_the_plan(self, planned, view, order, knobs):
        scores, plan = planned(**knobs)
        fig = plan_heatmap(plan, scores.tolist(), view, order=order)
        (heat,), (marks,) = traces(fig, "heatmap"), traces(fig, "scatter")
        columns, rows = arrange(plan, scores.numpy(), order)
        assert sorted(columns) == list(range(32))
        assert sorted(rows) == list(range(len(plan.kept)))
        cells = {"coupling": plan.coupling.T * 32, "cost": plan.cost.T, "matrix": plan.matrix}[view].numpy()
        np.testing.assert_allclose(numbers(heat.z), cells[rows[:, None], columns], rtol=1e-6, atol=1e-7)
        assert [list(pair) for pair in heat.customdata[0][:2]] == [[c, int(plan.kept[rows[0]])] for c in columns[:2]]

        assert len(marks.x) == int((plan.coupling > 0).sum())
        for x, y, carried in zip(marks.x, marks.y, marks.customdata, strict=True):
            source, row = int(columns[x]), int(rows[y])
            assert plan.coupling[source, row] > 0
            assert list(carried) == [
                source,
                plan.kept[row],
                plan.matrix[row, source],
            ]  # a click needs its channel first
        serialised(fig)

    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.parametrize("knobs", KNOBS[:4], ids=str)
    def test_margins_are_the_marginals_split_into_what_stays_and_what_moves(self, planned, view, knobs):
        scores, plan = planned(**knobs)
        above_own, above_moves, beside_own, beside_moves = traces(plan_heatmap(plan, scores.tolist(), view), "bar")
        shown = (plan.matrix if view == "matrix" else 32 * plan.coupling.T).numpy()
        diagonal = shown[np.arange(len(plan.kept)), plan.kept]
        np.testing.assert_allclose(numbers(above_own.y) + numbers(above_moves.y), shown.sum(0), atol=1e-9)
        np.testing.assert_allclose(numbers(beside_own.x) + numbers(beside_moves.x), shown.sum(1), atol=1e-9)
        np.testing.assert_allclose(numbers(beside_own.x), diagonal, atol=1e-9)
        np.testing.assert_allclose(numbers(above_own.y)[plan.kept.numpy()], diagonal, atol=1e-9)

    @pytest.mark.parametrize(("view", "knobs", "words"), [
        ("coupling", {}, {"31", "10", "22"}),  # of 32 channels
        ("matrix", {}, {"10", "22"}),
        ("cost", {}, {"32", "22"}),
        ("coupling", {"solver": "partial"}, {"10", "discarded"}),
        ("coupling", {"sparsity": 0}, {"Nothing"}),
        ("matrix", {"sparsity": 0}, {"Nothing"}),
    ])  # fmt: skip
    def test_title_says_what_the_plan_does(self, planned, view, knobs, words):
        scores, plan = planned(**knobs)
        assert words <= set(re.findall(r"\w+", title(plan_heatmap(plan, scores.tolist(), view))))

    def test_grouped_by_target_every_block_stands_together_itself_first(self, planned):
        scores, plan = planned(0.5)
        columns, _ = arrange(plan, scores.numpy(), "target")
        goes = plan.matrix.numpy().argmax(0)[columns]
        assert list(goes) == sorted(goes)
        firsts = [int(columns[list(goes).index(row)]) for row in sorted(set(goes))]
        assert firsts == plan.kept.tolist()

    def test_by_importance_the_best_stand_first(self, planned):
        scores, plan = planned(0.5)
        columns, rows = arrange(plan, scores.numpy(), "importance")
        assert columns.tolist() == scores.argsort(descending=True, stable=True).tolist()
        assert scores[plan.kept[rows.copy()]].tolist() == sorted(scores[plan.kept].tolist(), reverse=True)

    @pytest.mark.parametrize("view", ["cost", "coupling"])
    def test_infinite_costs_are_holes(self, zero_padded, view):
        scores, plan = zero_padded
        infinite = torch.isinf(plan.cost.T).numpy()
        assert infinite.any()
        fig = plan_heatmap(plan, scores.tolist(), view)
        (heat,) = traces(fig, "heatmap")
        assert np.array_equal(np.isnan(numbers(heat.z)), infinite & (view == "cost"))
        serialised(fig)

    @pytest.mark.parametrize("which", ["kept", "gone"])
    def test_marks_of_the_selected_channel_stand_out(self, planned, which):
        scores, plan = planned(0.5)
        gone = sorted(set(range(32)) - set(plan.kept.tolist()))
        channel = int(plan.kept[3]) if which == "kept" else gone[0]
        (marks,) = traces(plan_heatmap(plan, scores.tolist(), "coupling", selected=channel), "scatter")
        bold = numbers(marks.marker.line.width) > 1
        related = [channel in (int(source), int(target)) for source, target, _ in marks.customdata]
        assert bold.tolist() == related
        assert any(related)
        assert not all(related)

    @pytest.mark.parametrize("order", ORDERS)
    def test_ticks_are_channels(self, planned, order):
        scores, plan = planned(0.5)
        fig = plan_heatmap(plan, scores.tolist(), order=order)
        columns, rows = arrange(plan, scores.numpy(), order)
        down, across = (next(pick(row=2, col=1)) for pick in (fig.select_yaxes, fig.select_xaxes))
        assert [int(t) for t in down.ticktext] == [int(plan.kept[rows[i]]) for i in down.tickvals]
        assert [int(t) for t in across.ticktext] == [int(columns[i]) for i in across.tickvals]

    @pytest.mark.parametrize(("n", "k"), [(256, 64), (2048, 1024)])
    def test_large_plans_are_pictures_that_travel_fast(self, n, k):
        plan = large(n, k)
        fig = plan_heatmap(plan, [1.0] * n, "cost")
        assert not traces(fig, "heatmap")
        (image,) = fig.layout.images
        assert (image.sizex, image.sizey, image.x, image.y) == (n, k, -0.5, -0.5)
        assert image.source.startswith("data:image/png;base64,")
        assert len(json.dumps(serialised(plan_heatmap(plan, [1.0] * n)))) < 400_000

    def test_light_and_dark_differ(self, planned):
        scores, plan = planned(0.3)
        check_both_themes(lambda dark: plan_heatmap(plan, scores.tolist(), dark=dark))


class TestRaster:
    def decoded(self, uri):
        import base64
        import io

        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))

    def test_colours_run_along_the_scale_and_holes_are_transparent(self):
        values = np.array([[0.0, 0.5], [1.0, np.nan]])
        pixels = self.decoded(picture(values, [[0, "#000000"], [1, "#ff8000"]], (0, 1)))
        assert pixels[:, :, 3].tolist() == [[255, 255], [255, 0]]
        assert pixels[0, 0, :3].tolist() == [0, 0, 0]
        assert pixels[0, 1, :3].tolist() == [128, 64, 0]
        assert pixels[1, 0, :3].tolist() == [255, 128, 0]

    def test_no_lone_entry_is_lost_where_cells_share_a_pixel(self):
        values = np.zeros((2048, 1500))
        values[1027, 777], values[3, 1499] = 1, -2
        pooled = _pooled(values)
        assert pooled.shape == (1000, 1000)
        assert sorted(pooled[pooled != 0]) == [-2, 1]

    def test_small_matrices_are_cells(self):
        assert CELLS == 10_000


class TestWeightBars:
    def test_one_bar_a_target_heaviest_first(self):
        fig = weight_bars([(5, 0.75), (2, 0.25)], 9, kept=False)
        (bars,) = fig.data
        assert list(bars.x) == [0.75, 0.25]
        assert list(bars.y) == ["channel 5", "channel 2"]
        assert fig.layout.yaxis.autorange == "reversed"
        assert title(fig) == "Channel 9 is merged into 2 targets"

    @pytest.mark.parametrize(("weights", "kept", "words"), [
        ([(4, 1.0)], False, "Channel 9 is merged into 1 target"),
        ([], False, "Channel 9 is merged into 0 targets"),
        ([(9, 1.0)], True, "Channel 9 absorbs no others"),
        ([(9, 1.0), (4, 0.2)], True, "Channel 9 absorbs 1 other"),
        ([(9, 1.0), (4, 0.2), (5, 0.1)], True, "Channel 9 absorbs 2 others"),
    ])  # fmt: skip
    def test_title_counts(self, weights, kept, words):
        fig = weight_bars(weights, 9, kept)
        assert title(fig) == words
        serialised(fig)

    def test_its_own_weight_is_solid_and_absorbed_weight_tinted(self):
        (bars,) = weight_bars([(4, 0.9), (1, 0.1)], 4, kept=True).data
        assert bars.marker.color[0] == LIGHT.fusion != bars.marker.color[1]

    def test_only_the_heaviest_are_drawn(self):
        fig = weight_bars([(c, 1 / (c + 1)) for c in range(50)], 60, kept=False)
        assert len(fig.data[0].x) == 20
        assert "20 of 50" in title(fig)

    def test_light_and_dark_differ(self):
        check_both_themes(lambda dark: weight_bars([(4, 1.0)], 4, False, dark))


class TestMap:
    def test_every_channel_is_there_and_every_moved_weight_an_arrow(self, planned):
        _, plan = planned(0.5)
        places = np.random.default_rng(0).normal(size=(32, 2))
        fig = channel_map(plan, places, "a plane")
        hollow, solid = (t for t in fig.data if t.customdata is not None)
        assert sorted([*hollow.customdata, *solid.customdata]) == list(range(32))
        assert sorted(solid.customdata) == plan.kept.tolist()
        np.testing.assert_allclose(numbers(solid.x), places[plan.kept, 0])
        arrows = [t for t in fig.data if t.mode == "lines+markers"]
        moved = plan.matrix.clone()
        moved[torch.arange(16), plan.kept] = 0
        assert sum(len(t.x) for t in arrows) == 3 * int((moved > 0).sum())
        assert "16 channels move to the 16" in title(fig)
        serialised(fig)

    def test_the_selected_channels_arrows_are_amber(self, planned):
        _, plan = planned(0.5)
        gone = next(c for c in range(32) if c not in plan.kept.tolist())
        fig = channel_map(plan, np.zeros((32, 2)), "a plane", selected=gone)
        (amber,) = (t for t in fig.data if t.mode == "lines+markers" and t.line.color == LIGHT.second)
        assert len(amber.x) == 3 * int((plan.matrix[:, gone] > 0).sum())

    def test_nothing_moves_where_nothing_is_pruned(self, planned):
        fig = channel_map(planned(0)[1], np.zeros((32, 2)), "a plane")
        assert not [t for t in fig.data if t.mode == "lines+markers"]
        assert "Nothing is pruned" in title(fig)

    def test_light_and_dark_differ(self, planned):
        check_both_themes(lambda dark: channel_map(planned(0.3)[1], np.zeros((32, 2)), "a plane", 3, dark))


class TestPlayer:
    def test_one_frame_a_sparsity_all_channels_on_both_axes(self, planned):
        scores = planned(0)[0]
        plans = [(s / 10, planned(s / 10)[1]) for s in range(10)]
        fig = sparsity_player(plans, scores.tolist(), start=0.3)
        assert [frame.name for frame in fig.frames] == [f"{s}0%" if s else "0%" for s in range(10)]
        best = int(scores.argmax())
        for (_, plan), frame in zip(plans, fig.frames, strict=True):
            (marks,) = frame.data
            assert {tuple(map(int, pair[:2])) for pair in marks.customdata} == {
                (int(source), int(plan.kept[row])) for row, source in (plan.matrix > 1e-3).nonzero().tolist()
            }
            assert [best, best] in [[int(c) for c in pair[:2]] for pair in marks.customdata]
            assert f"into {len(plan.kept)}" in frame.layout.title.text
        assert title(fig) == fig.frames[3].layout.title.text
        assert fig.layout.sliders[0].active == 3
        serialised(fig)

    def test_light_and_dark_differ(self, planned):
        plans = [(0.1, planned(0.1)[1])]
        check_both_themes(lambda dark: sparsity_player(plans, [1.0] * 32, dark=dark))


class TestTwoPlans:
    def test_maps_and_their_difference_in_the_dense_shape(self, planned):
        (_, first), (_, second) = planned(0.5), planned(0.5, anchors="kmeans")
        shared = shared_mass(first, second)
        fig = two_plans(first, second, ("one", "other"), shared)
        a, b, difference = (numbers(trace.z) for trace in traces(fig, "heatmap"))
        np.testing.assert_allclose(a[first.kept], first.matrix, atol=1e-6)
        assert not a[sorted(set(range(32)) - set(first.kept.tolist()))].any()
        np.testing.assert_allclose(difference, b - a, atol=1e-6)
        assert f"{shared:.0%}" in title(fig)
        assert fig.data[2].zmin == -fig.data[2].zmax
        serialised(fig)

    def test_shared_mass_by_hand(self, planned):
        _, plan = planned(0.5)
        _, other = planned(0.5, anchors="gmm")
        assert shared_mass(plan, plan) == pytest.approx(1)
        dense = [torch.zeros(32, 32).double().index_copy_(1, p.kept, p.coupling) for p in (plan, other)]
        assert shared_mass(plan, other) == pytest.approx(1 - float((dense[0] - dense[1]).abs().sum()) / 2)

    def test_large_plans_are_pictures(self):
        fig = two_plans(large(), large(), ("one", "other"), 1.0)
        assert len(fig.layout.images) == 3
        serialised(fig)

    def test_light_and_dark_differ(self, planned):
        plan = planned(0.5)[1]
        check_both_themes(lambda dark: two_plans(plan, plan, ("one", "other"), 1.0, dark))


class TestKernels:
    kernels = np.random.default_rng(0).normal(size=(3, 20, 3, 3)) * np.linspace(0.1, 2, 20)[:, None, None]

    def test_one_row_a_channel_one_tile_an_input(self):
        fig = kernel_rows(self.kernels[:, :5], ["a", "b", "c"], "Kernels in stem")
        (heat,) = fig.data
        z = numbers(heat.z)
        assert z.shape == (3 * 4 - 1, 5 * 4 - 1)
        for row in range(3):
            for column in range(5):
                tile = z[4 * row : 4 * row + 3, 4 * column : 4 * column + 3]
                np.testing.assert_allclose(tile, self.kernels[row, column])
                assert list(heat.customdata[4 * row][4 * column]) == ["abc"[row], f"in {column}"]
        assert np.isnan(z[3]).all()
        assert np.isnan(z[:, 3]).all()
        assert list(fig.layout.yaxis.ticktext) == ["a", "b", "c"]
        assert list(fig.layout.xaxis.ticktext) == [f"in {i}" for i in range(5)]
        assert title(fig) == "Kernels in stem"
        serialised(fig)

    def test_at_most_the_heaviest_inputs_are_drawn(self):
        fig = kernel_rows(self.kernels, ["a", "b", "c"], "", most=4)
        heaviest = sorted(np.argsort(-np.abs(self.kernels).sum((0, 2, 3)))[:4])
        assert list(fig.layout.xaxis.ticktext) == [f"in {channel}" for channel in heaviest]
        np.testing.assert_allclose(numbers(fig.data[0].z)[:3, :3], self.kernels[0, heaviest[0]])

    def test_pictures_of_one_input_stand_side_by_side(self):
        fig = kernel_rows(self.kernels[:, :1], ["a", "b", "c"], "")
        assert numbers(fig.data[0].z).shape == (3, 11)
        assert list(fig.layout.xaxis.ticktext) == ["a", "b", "c"]

    def test_one_scale_for_all_symmetric_around_zero(self):
        (heat,) = kernel_rows(self.kernels, ["a", "b", "c"], "", most=4).data
        assert (-heat.zmin, heat.zmax) == pytest.approx((np.nanmax(np.abs(numbers(heat.z))),) * 2)

    def test_dead_channels_have_a_scale_too(self):
        (heat,) = kernel_rows(np.zeros((1, 2, 3, 3)), ["dead"], "").data
        assert heat.zmin < heat.zmax

    def test_light_and_dark_differ(self):
        check_both_themes(lambda dark: kernel_rows(self.kernels, ["a", "b", "c"], "t", dark=dark))


class TestLearnedBeside:
    def learned(self, plan, sign: float = 1.0):
        n, k = plan.coupling.shape
        matrix = sign * torch.arange(n * k, dtype=torch.float64).reshape(n, k) / (n * k)
        return ChannelMap("g", "reader", matrix, torch.zeros(n), torch.linspace(0, 1, n))

    @pytest.mark.parametrize("order", ["index", "importance", "target"])
    def test_both_share_rows_and_columns(self, planned, order):
        scores, made = planned(0.4)
        n = len(scores)
        learned = self.learned(made, -1)
        fig = learned_beside(made, learned, scores, 3, order)
        columns, rows = arrange(made, np.asarray(scores, float), order)
        T, M = traces(fig, "heatmap")
        np.testing.assert_allclose(T.z, made.matrix.numpy()[rows[:, None], columns], atol=1e-6)
        np.testing.assert_allclose(M.z, learned.matrix.numpy().T[rows[:, None], columns], atol=1e-6)
        assert float(np.min(M.z)) < 0
        gone = [j for j in range(n) if j not in made.kept.tolist()]
        share = float(learned.explained[gone].mean())
        assert title(fig) == f"M explains {share:.0%} of the {len(gone)} removed channels"
        check_both_themes(lambda dark: learned_beside(made, learned, scores, 3, order, dark))
