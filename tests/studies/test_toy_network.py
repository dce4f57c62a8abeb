import json
import math
from collections.abc import Callable

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor

import intrafusion as itf
from intrafusion.pruning.transport.planning import kept_count
from intrafusion.reporting.figures import toy_network as pictures
from intrafusion.studies import toy_network
from intrafusion.studies.toy_network import Lesson, open_lesson, train_toy

CASES = [
    (14, 6, 3, 1, ""),
    (14, 6, 4, 2, ""),
    (3, 8, 5, 1, "2.w1=0.5 7.v2=-3"),
    (0, 4, 1, 2, ""),
    (1, 5, 5, 1, "0.b=1"),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def made(request: pytest.FixtureRequest) -> Lesson:
    """Lessons of several sizes, some changed by hand."""
    seed, hidden, stay, p, changes = request.param
    return open_lesson(train_toy(seed, hidden, changes), stay, "l1", p)


@pytest.fixture(scope="module")
def default() -> Lesson:
    return open_lesson(train_toy(), 3)


def test_training_is_deterministic_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: steps.append(step(self)))
    first = toy_network.numbers(train_toy())
    assert len(steps) <= 300
    assert torch.equal(first, toy_network.numbers(train_toy()))
    assert not torch.equal(first, toy_network.numbers(train_toy(seed=15)))
    assert torch.equal(first, first.round(decimals=2))


def test_the_default_lesson_shows_what_fusion_saves(default: Lesson) -> None:
    dense, dropped, fused = (toy_network.measure_toy(model) for model in (default.dense, default.dropped, default.fused))
    assert default.sparsity == 0.5
    assert dense.accuracy >= 0.95
    assert fused.interval[0] > dropped.interval[1]
    assert dense.count == dropped.count == fused.count == 400


@pytest.mark.parametrize(("hidden", "stay"), [(5, 3), (6, 1)])
def test_the_lessons_that_the_page_sends_its_reader_to_do_lose(hidden: int, stay: int) -> None:
    made = [open_lesson(train_toy(seed, hidden), stay) for seed in range(5)]
    lost = [toy_network.measure_toy(m.fused).accuracy < toy_network.measure_toy(m.dropped).accuracy for m in made]
    assert sum(lost) >= 4


@pytest.mark.parametrize("hidden", range(4, 9))
def test_the_sparsity_keeps_as_many_as_asked(hidden: int) -> None:
    assert [kept_count(hidden, toy_network.sparsity(hidden, k)) for k in range(1, hidden + 1)] == [*range(1, hidden + 1)]


def test_points_are_two_rings() -> None:
    X, y = toy_network.toy_points()
    radius = X.norm(dim=1)
    assert y.bincount().tolist() == [100, 100]
    assert float(radius[y == 0].mean()) == pytest.approx(1.2, abs=0.05)
    assert float(radius[y == 1].mean()) == pytest.approx(0.6, abs=0.05)
    assert not torch.equal(toy_network.toy_points(200, 1)[0], X)


def test_numbers_are_what_the_network_computes_with(made: Lesson) -> None:
    rows, (x, y) = toy_network.numbers(made.dense).numpy(), (0.3, -1.1)
    h = np.maximum(0, rows[:, 0] * x + rows[:, 1] * y + rows[:, 2])
    assert toy_network.toy_activations(made.dense, (x, y)).numpy() == pytest.approx(h)
    votes = h @ rows[:, 3:] + toy_network.output_bias(made.dense).numpy()
    assert toy_network.toy_outputs(made.dense, (x, y)).numpy() == pytest.approx(votes)
    axis, gap = toy_network.decision(made.dense, reach=1.1, side=3)
    assert axis.tolist() == pytest.approx([-1.1, 0, 1.1])
    there = toy_network.toy_outputs(made.dense, (1.1, -1.1))
    assert float(gap[0, 2]) == pytest.approx(float(there[1] - there[0]))


@pytest.mark.parametrize("power", [1, 2])
def test_the_terms_of_a_score_add_up_to_it(made: Lesson, power: int) -> None:
    scores = itf.score(made.dense, made.group, f"l{power}")
    for neuron, expected in enumerate(scores.tolist()):
        terms = toy_network.score_terms(made.dense, neuron, power)
        assert terms.own == pytest.approx((sum(terms.writes) + sum(terms.reads)) / 2)
        assert terms.own / terms.average == pytest.approx(expected)
        assert terms.score == pytest.approx(expected)


def test_the_terms_of_a_distance_add_up_to_the_plans_cost(made: Lesson) -> None:
    for neuron in range(made.group.size):
        for column, other in enumerate(made.kept):
            terms = toy_network.distance_terms(made.dense, neuron, other, made.p)
            added = sum(gap**made.p for gap in terms.gaps) ** (1 / made.p)
            assert added == pytest.approx(terms.distance)
            assert terms.distance == pytest.approx(float(made.plan.cost[neuron, column]))
            for unit, length, row in zip(terms.units, terms.lengths, (neuron, other), strict=True):
                w1, w2, _, v1, v2 = toy_network.numbers(made.dense)[row].tolist()
                assert [part * length for part in unit] == pytest.approx([w1, w2, v1, v2])


def test_silent_neurons_have_scores_and_distances() -> None:
    made = open_lesson(train_toy(changes="0.w1=0 0.w2=0 0.v1=0 0.v2=0"), 3)
    other = made.kept[0]
    assert toy_network.distance_terms(made.dense, 0, other).distance == pytest.approx(float(made.plan.cost[0, 0]))
    silence = toy_network.write_changes({(i, name): 0.0 for i in range(4) for name in toy_network.WEIGHTS})
    made = open_lesson(train_toy(0, 4, silence), 2)
    assert [toy_network.score_terms(made.dense, i).score for i in range(4)] == made.scores.tolist() == [0, 0, 0, 0]


def test_the_moves_add_up_to_the_total_cost(made: Lesson) -> None:
    moves = made.moves()
    assert sum(move["mass"] * move["cost"] for move in moves) == pytest.approx(made.plan.total_cost)
    assert {move["channel"] for move in moves} == set(made.gone)
    for neuron in made.gone:
        leaves = sum(move["mass"] for move in moves if move["channel"] == neuron)
        assert leaves == pytest.approx(1 / made.group.size)


def test_a_neuron_is_crowded_out_when_its_nearest_is_full(made: Lesson) -> None:
    for neuron in range(made.group.size):
        nearest = int(made.plan.cost[neuron].argmin())
        arrives = math.isclose(float(made.plan.matrix[nearest, neuron]), 1)
        assert (neuron in made.crowded_out()) == (not arrives)


def test_home_is_where_most_goes(made: Lesson) -> None:
    assert [made.home(neuron) for neuron in made.kept] == made.kept
    for neuron in made.gone:
        weights = made.plan.matrix[:, neuron]
        assert weights[made.kept.index(made.home(neuron))] == weights.max()


def test_the_pieces_of_a_fused_neuron_add_up_to_the_pruned_network(made: Lesson) -> None:
    fused = toy_network.numbers(made.fused)
    assert len(fused) == len(made.kept)
    for row, target in zip(fused, made.kept, strict=True):
        pieces = toy_network.fused_terms(made, target)
        assert pieces[0][0] == target
        assert torch.allclose(sum((share * weights for _, share, weights in pieces), torch.zeros(5)), row)
    assert torch.equal(toy_network.output_bias(made.fused), toy_network.output_bias(made.dense))


def test_dropping_keeps_the_rows_as_they_are(made: Lesson) -> None:
    assert torch.equal(toy_network.numbers(made.dropped), toy_network.numbers(made.dense)[made.kept])


def test_the_library_agrees_that_loudness_does_not_count(made: Lesson) -> None:
    for neuron in range(made.group.size):
        assert torch.allclose(toy_network.doubled_costs(made, neuron), made.plan.cost)


def test_the_telling_point_tells_dropped_from_fused(default: Lesson) -> None:
    place = toy_network.telling_point(default)
    dropped, fused = (toy_network.toy_outputs(model, place).argmax() for model in (default.dropped, default.fused))
    assert dropped != fused
    same = open_lesson(default.dense, 6)
    assert abs(toy_network.telling_point(same)[0]) <= 1.2


def test_changes_are_read_and_written() -> None:
    changes = {(3, "w1"): 0.5, (3, "b"): -1.0, (0, "v2"): 2.25}
    text = toy_network.write_changes(changes)
    assert toy_network.parse_changes(text, 6) == changes
    assert toy_network.write_changes(toy_network.parse_changes(" 3.b=-1   3.w1=.5 ", 6)) == "3.b=-1 3.w1=0.5"
    assert toy_network.parse_changes("", 6) == {}
    rows, before = toy_network.numbers(train_toy(changes=text)), toy_network.numbers(train_toy())
    moved = (rows != before).nonzero().tolist()
    assert moved == [[0, 4], [3, 0], [3, 2]]
    assert rows[3, 0] == 0.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3.w1", "write neuron.weight=number"),
        ("w1=3", "write neuron.weight=number"),
        ("3.w1=much", "write neuron.weight=number"),
        ("-1.w1=0", "write neuron.weight=number"),
        ("6.w1=0", "neurons are 0 to 5"),
        ("2.w3=0", "weights are"),
        ("2.w1=9", "between -3 and 3"),
        ("2.w1=nan", "between -3 and 3"),
        ("2.w1=inf", "between -3 and 3"),
        ("1.w1=0 ²²²²²²²²²²²²²²²²²²²².b=1", "write neuron.weight=number"),
    ],
)
def test_bad_changes_give_one_line(text: str, says: str) -> None:
    with pytest.raises(itf.IntrafusionError, match=says) as caught:
        toy_network.parse_changes(text, 6)
    assert "\n" not in str(caught.value)


def test_criteria_are_those_that_can_score_the_network() -> None:
    names = toy_network.criteria(train_toy())
    assert {"l1", "l2", "random"} <= set(names)
    assert "bn_scale" not in names
    assert all(itf.registry("criterion")[name].needs == "nothing" for name in names)


def test_the_snippet_runs_and_gives_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    changes = "2.w1=0.5"
    made = open_lesson(train_toy(7, 6, changes), 4, "l2", 2)
    names: dict = {}
    exec(toy_network.snippet(7, 6, changes, made), names)
    assert torch.equal(names["plan"].matrix, made.plan.matrix)
    assert torch.equal(toy_network.numbers(names["small"]), toy_network.numbers(made.fused))
    assert str(toy_network.measure_toy(made.fused).accuracy) in capsys.readouterr().out


def _pictures(made: Lesson, dark: bool) -> dict[str, Callable[[], go.Figure]]:
    rows, n, k = toy_network.numbers(made.dense).numpy(), made.group.size, len(made.kept)
    cloud, (axis, gap), result = cloud_of(400), toy_network.decision(made.fused), toy_network.measure_toy(made.fused)
    words, frame = [["1/6"] * n] * k, (0, made.kept[0])
    return {
        "network": lambda: pictures.network(rows, range(n), "dense", 2, "title", dark),
        "plane": lambda: pictures.neuron_plane(cloud, rows, range(n), ["dense"] * n, 2, "title", (1, 0), dark),
        "matrix": lambda: pictures.number_matrix(
            made.plan.matrix.numpy(), words, made.kept, frame, "title", ("a" * n, "b" * k), dark
        ),
        "region": lambda: pictures.region((axis.numpy(), gap.numpy()), result, "Fused", "fusion", cloud, (1, 0), dark),
        "fortunes": lambda: pictures.fortunes([(0, 0.7, 0.8), (1, 0.9, 0.6)], 1, dark),
    }


def cloud_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    X, y = toy_network.toy_points(count, 1)
    return X.numpy(), y.numpy()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["network", "plane", "matrix", "region", "fortunes"])
def test_every_picture_is_drawn(default: Lesson, name: str, dark: bool) -> None:
    drawn = json.loads(_pictures(default, dark)[name]().to_json())
    assert drawn["layout"]["title"]["text"]
    assert len(drawn["data"]) >= 2


@pytest.mark.parametrize("name", ["network", "plane"])
def test_discs_carry_their_neuron_and_the_chosen_one_is_marked(default: Lesson, name: str) -> None:
    discs = next(trace for trace in _pictures(default, False)[name]().data if trace.mode == "markers+text")
    assert [data[0] for data in discs.customdata] == list(range(6))
    assert list(discs.marker.line.width).index(4) == 2


def test_cells_carry_source_and_target(default: Lesson) -> None:
    cells = next(trace for trace in _pictures(default, False)["matrix"]().data if trace.customdata is not None)
    assert [list(data) for data in cells.customdata] == [[i, j] for j in default.kept for i in range(6)]


def test_neurons_without_a_direction_and_twins_are_drawn(default: Lesson) -> None:
    rows: Tensor = toy_network.numbers(default.dense).clone()
    rows[0, :2], rows[1] = 0, rows[2]
    fig = pictures.neuron_plane(cloud_of(20), rows.numpy(), range(6), ["dense"] * 6, 2, "title")
    discs = next(trace for trace in fig.data if trace.mode == "markers+text")
    assert [data[0] for data in discs.customdata] == [1, 2, 3, 4, 5]
    assert math.hypot(discs.x[0] - discs.x[1], discs.y[0] - discs.y[1]) > 0.25
    none = pictures.neuron_plane(cloud_of(20), np.zeros((2, 5)), range(2), ["dense"] * 2, 0, "title")
    assert len(next(trace for trace in none.data if trace.mode == "markers+text").x) == 0
