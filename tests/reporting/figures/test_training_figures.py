"""The training lab's pictures: every method's run drawn, in both themes, with titles that say what is seen."""

import itertools

import pytest
from figure_reading import check_both_themes, title, traces

from intrafusion.reporting.figures.training import learning, norms_over_time, runs_side_by_side, timeline, zeros_over_time
from intrafusion.training.loop import TrainingProgress
from intrafusion.training.methods.runs import LabRun, Outcome
from intrafusion.training.methods.spec import TrainSpec
from intrafusion.training.methods.task import Look, PhaseProgress


def step(phase: str, epoch: float, zero: float = 0.0, sampled: float | None = None, steps: int = 10) -> PhaseProgress:
    look = Look({"a": zero, "b": 0.0}, "norm of a channel", (0.0, 1.0, 2.0), (3, 1), 0.5 + epoch / 10, sampled)
    return PhaseProgress(
        phase, TrainingProgress(int(epoch * 5), steps, epoch, epoch, 1.0 / (1 + epoch), 0.6, 0.5, 0.7 + epoch / 100), look
    )


ALONE = [step("training", epoch, epoch / 4, 0.5) for epoch in (0.5, 1.0, 2.0)]
PARTS = [
    step("part 1: training", 1.0), step("part 2: training", 1.0), step("part 2: training", 2.0), step("part 1: training", 2.0),
    step("part 1: pruned 1, fine-tuned", 1.0), step("fused", 0.0, steps=0), step("fused, fine-tuned", 1.0),
]  # fmt: skip


def made(method: str, accuracy: float, params: int) -> LabRun:
    outcome = Outcome(accuracy, (accuracy - 0.02, accuracy + 0.01), 100, 0.2, params, 50, 0.0, 1000, 100, {"training": 3.0})
    return LabRun(TrainSpec(method=method), (), outcome, None)


def test_parts_run_side_by_side_and_phases_follow_each_other():
    assert timeline(ALONE) == [0.5, 1.0, 2.0]
    assert timeline(PARTS) == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0]


@pytest.mark.parametrize("steps", [[], ALONE[:1], ALONE, PARTS])
def test_every_picture_in_both_themes(steps):
    check_both_themes(lambda dark: learning(steps, "aslp", dark))
    check_both_themes(lambda dark: zeros_over_time(steps, "sdprun", dark))
    check_both_themes(lambda dark: norms_over_time(steps, dark))


def test_learning_says_how_far_it_is_and_draws_each_line():
    fig = learning(ALONE, "aslp")
    assert title(fig) == "aslp: 72.0 % of the held-out images right after 2 epochs"
    assert {trace.name for trace in fig.data} == {"training", "decided mask, held out", "drawn masks, held out"}
    assert {len(trace.x) for trace in fig.data} == {3}
    assert len(learning(PARTS, "fap").data) == 4 * len({one.phase for one in PARTS})


def test_zeros_name_the_layer_with_most():
    fig = zeros_over_time(ALONE, "sdprun")
    assert title(fig) == "Most weights are zero in a: 50%"
    assert traces(fig, "heatmap")[0].z[0] == pytest.approx([12.5, 25.0, 50.0])


def test_spread_keeps_all_of_each_moment_and_draws_the_threshold():
    fig = norms_over_time(ALONE)
    (heat,) = traces(fig, "heatmap")
    columns = list(zip(*heat.z, strict=True))
    assert [sum(column) for column in columns] == pytest.approx([100.0] * 3)
    assert list(traces(fig, "scatter")[0].y) == [0.55, 0.6, 0.7]


def test_runs_side_by_side():
    runs = [made("sgd", 0.98, 1000), made("sdprun", 0.97, 300)]
    fig = runs_side_by_side(runs, ["sgd", "sdprun"])
    assert title(fig) == "sgd is best with 98.0 %; sdprun is smallest: 30% of the parameters, 97.0 %"
    (points,) = fig.data
    assert list(points.x) == [100.0, 30.0]
    assert [high + y for high, y in zip(points.error_y.array, points.y, strict=True)] == pytest.approx([99.0, 98.0])
    for chosen in ([], runs[:1], runs):
        check_both_themes(lambda dark, chosen=chosen: runs_side_by_side(chosen, [run.spec.method for run in chosen], dark))
    assert all(a != b for a, b in itertools.pairwise(points.marker.color))
