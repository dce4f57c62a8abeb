"""Recoveries side by side: what is yielded while they train, what came of it, and the pictures of both."""

from dataclasses import replace

import pytest
import torch
from figure_reading import check_both_themes
from made_results import made_result

import intrafusion as itf
from intrafusion._registry import RECOVERIES
from intrafusion.pruning.pruner import cut
from intrafusion.reporting.figures.recovery import recovery_headline, similarity_panels, training_curves
from intrafusion.studies.measurement import Result
from intrafusion.studies.recovery_comparison import (
    Alike,
    Run,
    compare_image_similarity,
    compare_recoveries,
    known_run,
    layers_to_compare,
    rows,
)
from intrafusion.studies.session import Session, open_session
from intrafusion.studies.store.sqlite import Store
from intrafusion.studies.sweeps import Failure
from intrafusion.training.loop import TrainingProgress
from intrafusion.training.recovery import TrainingCost, image_similarity, similarity_loss
from intrafusion.training.recovery.methods import COSTLIER

SPEC = itf.PruneSpec(sparsity=0.6, merge="drop", limit=200, training=300, epochs=2, rate=0.03)
FACTS = TrainingCost(10, 2000, 300, 0.1, 0.5)


def measured(right: float, **spec) -> Result:
    return made_result("conv1", 0.6, "drop", right, **spec)


def moments(*held: float) -> tuple[TrainingProgress, ...]:
    return tuple(TrainingProgress(n, len(held), n / 2, n * 0.5, 2.0 / n, 0.3, 1.0, h) for n, h in enumerate(held, start=1))


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(SPEC)


class TestCompare:
    def test_yields_runs_while_they_train_then_results(self, session, tmp_path):
        specs = [SPEC.but(recovery=name) for name in ("none", "bn-reset", "perp", "overparam-sp")]
        with Store(tmp_path / "store.sqlite") as store:
            found = list(compare_recoveries(specs, session, store))
            results = [one for one in found if isinstance(one, Result)]
            runs = [one for one in found if isinstance(one, Run)]
            assert {result.spec for result in results if result.complete} == set(specs)
            assert [run.share for run in runs if run.spec == specs[2]] == sorted(
                run.share for run in runs if run.spec == specs[2]
            )
            last = {run.spec.recovery: run for run in runs}
            assert last.keys() == {"perp", "overparam-sp"}
            assert {run.share for run in last.values()} == {1.0}
            again = list(compare_recoveries(specs, session, store))
        assert [type(one) for one in again] == [Result, Result, Run, Result, Run, Result]
        assert again[2] == last["perp"] == known_run(specs[2], session)
        assert known_run(specs[0], session) is None

    def test_merges_a_network_once_for_all_its_recoveries(self, monkeypatch):
        cuts = []
        monkeypatch.setattr("intrafusion.studies.session.cut", lambda *a, **k: cuts.append(1) or cut(*a, **k))
        specs = [SPEC.but(recovery=name, merge="calibrated", epochs=1) for name in ("bn-reset", "repair", "perp-head")]
        found = {one.spec: one for one in compare_recoveries(specs, open_session(SPEC)) if isinstance(one, Result)}
        assert len(cuts) == 1
        alone = {
            one.spec: one for spec in specs for one in compare_recoveries([spec], open_session(SPEC)) if isinstance(one, Result)
        }
        assert {spec: one.accuracy for spec, one in found.items()} == {s: one.accuracy for s, one in alone.items()}

    def test_what_fails_is_said_and_the_others_go_on(self, monkeypatch):
        mlp = open_session(SPEC.but(model="digits-mlp"))
        specs = [SPEC.but(model="digits-mlp", recovery=name) for name in ("bn-reset", "perp-norm", "perp-head")]
        found = list(compare_recoveries(specs, mlp))
        failures = {one.spec.recovery: one.reason for one in found if isinstance(one, Failure)}
        assert failures.keys() == {"bn-reset", "perp-norm"}
        assert all(reason.startswith("this network has no BatchNorm") for reason in failures.values())
        assert {one.spec.recovery for one in found if isinstance(one, Result)} == {"perp-head"}

    def test_a_defect_is_one_line_too(self, session, monkeypatch):
        def fall(case):
            raise ZeroDivisionError("by zero")

        monkeypatch.setitem(RECOVERIES, "finetune", replace(RECOVERIES["finetune"], function=fall))
        assert list(compare_recoveries([SPEC.but(recovery="finetune")], session)) == [
            Failure(SPEC.but(recovery="finetune"), "ZeroDivisionError: by zero")
        ]

    def test_the_costlier_ones_cost_more(self, session):
        macs = {}
        for name, entry in RECOVERIES.items():
            if entry.needs == "labels":
                macs[name] = next(one for one in compare_recoveries([SPEC.but(recovery=name)], session)).facts.macs
        assert {name for name, count in macs.items() if count > macs["finetune"]} == set(COSTLIER)


class TestRows:
    def test_one_seed_has_the_images_interval(self):
        result = measured(0.5, recovery="perp")
        (row,) = rows([result], [Run(result.spec, FACTS, moments(0.2, 0.4))])
        assert (row.accuracy, row.interval, row.seeds) == (result.accuracy, result.interval, 1)
        assert row.to_row()["steps"] == 2
        assert row.to_row()["trainable"] == 10

    def test_several_seeds_have_students(self):
        results = [measured(share, recovery="perp", seed=seed) for seed, share in enumerate((0.4, 0.5, 0.6))]
        (row,) = rows(results, [])
        assert row.accuracy == pytest.approx(0.5)
        half = 4.302653 * 0.1 / 3**0.5  # t(0.975, 2) s / sqrt(3)
        assert row.interval == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)
        assert (row.seeds, row.run) == (3, None)

    def test_budgets_are_rows_of_their_own(self):
        results = [measured(0.5, recovery="overparam", budget=budget) for budget in ("epochs", "compute")]
        assert [row.budget for row in rows(results, [])] == ["epochs", "compute"]


class TestAlike:
    def test_the_recovered_network_is_the_kept_one(self, session):
        spec = SPEC.but(recovery="similarity", epochs=6)
        list(compare_recoveries([spec], session))
        layer = layers_to_compare(session)[-1]
        found = compare_image_similarity(spec, session, layer, images=20)
        assert found.dense.shape == found.before.shape == found.after.shape == (20, 20)
        torch.testing.assert_close(found.dense.norm(dim=1), torch.ones(20))
        assert found.labels.tolist() == sorted(found.labels.tolist())
        assert found.loss(found.after) < found.loss(found.before)
        assert found.loss(found.dense) == 0

    def test_loss_is_the_trainings(self):
        ours, theirs = torch.randn(4, 6), torch.randn(4, 9)
        found = Alike("x", torch.arange(4), image_similarity(theirs), image_similarity(ours), image_similarity(ours))
        assert found.loss(found.before) == pytest.approx(float(similarity_loss(ours, theirs)))


class TestPictures:
    runs = (
        Run(SPEC.but(recovery="finetune"), FACTS, moments(0.3, 0.6, 0.9)),
        Run(SPEC.but(recovery="overparam-sp"), FACTS, moments(0.4, 0.7, 0.9)),
        Run(SPEC.but(recovery="overparam-sp", budget="compute"), FACTS, moments(0.4)),
    )

    @pytest.mark.parametrize(
        ("by", "ends"), [("steps", (1, 2, 3)), ("seconds", (0.5, 1.0, 1.5)), ("compute", (3.84e-5, 7.68e-5, 1.152e-4))]
    )
    def test_lines_against_steps_seconds_and_compute(self, by, ends):
        fig = training_curves(self.runs, [], by)
        assert len(fig.data) == 6
        assert tuple(fig.data[0].x) == pytest.approx(ends)
        assert tuple(fig.data[0].y) == (2.0, 1.0, 2 / 3)
        assert tuple(fig.data[1].y) == pytest.approx((30, 60, 90))
        assert fig.data[4].line.dash == "longdash"
        assert fig.data[0].line.color != fig.data[2].line.color
        labels = [a for a in fig.layout.annotations if a.text in ("finetune", "overparam-sp")]
        assert abs(labels[0].y - labels[1].y) > 2  # where both lines end at the same height

    def test_no_runs_yet(self):
        assert len(training_curves([], [], "steps", dark=True).data) == 0

    def test_title_says_what_the_best_does(self):
        results = [measured(a, recovery=n) for n, a in (("none", 0.2), ("perp", 0.8), ("finetune", 0.9))]
        assert recovery_headline(rows(results, [])) == "finetune brings 20.0 % to 90.0 %, the best of 2"
        assert recovery_headline(rows(results[:2], [])) == "perp brings 20.0 % to 80.0 %"
        assert recovery_headline([]) == "How the training of each method goes"

    def test_similarity_panels(self, session):
        spec = SPEC.but(recovery="bn-reset")
        found = compare_image_similarity(spec, session, "layer3.1.conv2", images=12)
        fig = similarity_panels(found, "bn-reset")
        assert [trace.z.shape for trace in fig.data] == [(12, 12)] * 3
        assert any("after bn-reset" in note.text for note in fig.layout.annotations)
        check_both_themes(lambda dark: similarity_panels(found, "bn-reset", dark))
