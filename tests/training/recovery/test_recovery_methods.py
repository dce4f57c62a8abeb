"""Every recovery, on real pruned networks in seconds: it ends compact and better, and tells how it went."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion._registry import RECOVERIES
from intrafusion.pruning.merge import Fit, repair
from intrafusion.pruning.pruner import cut
from intrafusion.studies.session import Session, merged, open_session, recovery
from intrafusion.training.loop import TrainingProgress, _Run
from intrafusion.training.recovery import RecoveryOptions, TrainingCost, recover, recovering
from intrafusion.training.recovery.cache import read_recovery
from intrafusion.training.recovery.finetune import hold_out

TRAINS = [name for name, entry in RECOVERIES.items() if entry.needs == "labels"]
SPEC = itf.PruneSpec(sparsity=0.6, merge="drop", limit=None, training=400, epochs=3, rate=0.03)


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(SPEC)


@pytest.fixture(scope="module")
def mlp() -> Session:
    return open_session(SPEC.but(model="digits-mlp"))


def accuracy(network: torch.nn.Module, session: Session) -> float:
    network.card = session.card
    return itf.evaluate(network, session.images(), None).accuracy


@pytest.mark.parametrize("name", [name for name in RECOVERIES if name != "none"])
def test_recovers_a_network_with_norms(name, session):
    made = merged(SPEC, session)
    before, shapes = accuracy(made.small, session), {n: v.shape for n, v in made.small.state_dict().items()}
    told = list(recovery(SPEC.but(recovery=name), session, made))
    assert {n: v.shape for n, v in made.small.state_dict().items()} == shapes
    assert accuracy(made.small, session) > before + 0.1
    assert not made.small.training
    if name in TRAINS:
        facts, *moments = told
        assert isinstance(facts, TrainingCost)
        assert facts.trainable > 0
        assert facts.macs > 3 * 1e5
        assert facts.memory > 4 * facts.trainable
        assert moments[-1].step == moments[-1].steps == 9
        assert all(isinstance(moment, TrainingProgress) for moment in moments)
        assert moments[-1].held > 0.3
    else:
        assert told == []


@pytest.mark.parametrize("name", [n for n in RECOVERIES if n not in ("none", "bn-reset", "perp-norm", "repair")])
def test_recovers_a_network_without_norms(name, mlp):
    spec = SPEC.but(model="digits-mlp", sparsity=0.8, recovery=name, rate=0.03)
    made = merged(spec, mlp)
    before = accuracy(made.small, mlp)
    list(recovery(spec, mlp, made))
    assert accuracy(made.small, mlp) > before


@pytest.mark.parametrize("name", ["bn-reset", "perp-norm"])
def test_without_norms_one_line(name, mlp):
    spec = SPEC.but(model="digits-mlp", recovery=name)
    with pytest.raises(itf.IntrafusionError, match=r"^this network has no BatchNorm .*; choose recovery (repair|perp-bias)$"):
        list(recovery(spec, mlp, merged(spec, mlp)))


class TestStatistics:
    @pytest.mark.parametrize("name", ["repair", "bn-reset"])
    def test_where_nothing_was_pruned_nothing_is_done(self, name, session):
        made = cut(session.folded, session.groups, 0.0)
        recover(made, name, session.calibration(SPEC))
        assert all(torch.equal(v, session.folded.state_dict()[k]) for k, v in made.small.state_dict().items())

    def test_repair_leaves_channels_that_have_their_statistics(self, session):
        made = cut(session.folded, session.groups, 0.0)
        repair(Fit(made.dense(), made.small, (), session.calibration(SPEC)))
        images = session.calibration(SPEC).images[:50].float() / 255
        torch.testing.assert_close(made.small(images), session.folded(images), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("merge", ["drop", "fusion", "fold"])
    def test_repair_meets_its_targets(self, merge, session):
        made = merged(SPEC.but(merge=merge, recovery="repair"), session)
        recover(made, "repair", session.calibration(SPEC))
        fit = made.fit(session.calibration(SPEC))
        for name in fit.walk.cuts.layers()[:-1]:
            _, output, _ = fit.walk.cuts.around(name)
            pairs = [(d[output].clone(), s[output].clone()) for d, s in fit.walk.at(name, (output,), (output,))]
            dense, small = (torch.cat(side).transpose(0, 1).flatten(1).double() for side in zip(*pairs, strict=True))
            rows = fit.rows(name)
            rows = rows / rows.sum(1, keepdim=True)
            torch.testing.assert_close(small.mean(1), rows @ dense.mean(1), rtol=1e-3, atol=1e-3)
            wanted = rows @ dense.std(1, unbiased=False)
            alive = small.std(1) > 1e-6
            torch.testing.assert_close(small.std(1, unbiased=False)[alive], wanted[alive], rtol=1e-3, atol=1e-3)

    def test_bn_reset_meets_the_norms(self, session):
        made = merged(SPEC.but(recovery="bn-reset"), session)
        recover(made, "bn-reset", session.calibration(SPEC))
        norm, kept = session.model.layer2[0].bn1, next(m.kept for m in made.merged if m.group.name == "layer2.0.conv1")
        fit = made.fit(session.calibration(SPEC))
        _, output, _ = fit.walk.cuts.around("layer2.0.conv1")
        values = torch.cat([s[output].clone() for _, s in fit.walk.at("layer2.0.conv1", (), (output,))])
        torch.testing.assert_close(values.mean((0, 2, 3)), norm.bias.data[kept], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(values.std((0, 2, 3)), norm.weight.data[kept].abs(), rtol=1e-2, atol=1e-3)


class TestTraining:
    def test_same_seed_same_network_other_seed_another(self, session, monkeypatch, tmp_path):
        states = []
        for number, seed in enumerate((0, 0, 1)):
            monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path / str(number)))
            made = merged(SPEC, session)
            list(recovery(SPEC.but(recovery="overparam-sp", seed=seed, epochs=1), session, made))
            states.append(torch.cat([value.flatten() for value in made.small.state_dict().values()]))
        assert torch.equal(states[0], states[1])
        assert not torch.equal(states[0], states[2])

    def test_what_was_trained_is_not_trained_again(self, session, monkeypatch):
        spec = SPEC.but(recovery="finetune")
        first, second = merged(spec, session), merged(spec, session)
        told = list(recovery(spec, session, first))
        assert session.kept_path(spec).exists()
        monkeypatch.setattr("intrafusion.training.recovery.finetune.train", None)
        assert list(recovery(spec, session, second)) == told
        assert all(torch.equal(v, second.small.state_dict()[k]) for k, v in first.small.state_dict().items())

    def test_the_file_is_named_after_all_that_matters(self, session):
        spec = SPEC.but(recovery="finetune")
        path = session.kept_path(spec)
        others = [
            spec.but(**{k: v}) for k, v in {"epochs": 4, "training": 300, "seed": 1, "merge": "fusion", "rate": None}.items()
        ]
        assert len({path, *map(session.kept_path, others)}) == 6
        assert session.kept_path(spec.but(limit=5)) == path

    def test_what_other_code_trained_is_trained_again(self, session, monkeypatch, tmp_path):
        monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
        spec, made = SPEC.but(recovery="perp-bias", rate=0.01, epochs=1), []
        for version in ("one", "another", "one"):
            monkeypatch.setattr("intrafusion.studies.session.code_version", lambda version=version: version)
            made.append(session.kept_path(spec).exists())
            list(recovery(spec, session, merged(spec, session)))
        assert made == [False, False, True]

    @pytest.mark.parametrize(("other", "goes_on"), [("code_version", True), ("recovery_version", False)])
    def test_what_was_stopped_goes_on_while_the_trainers_code_is_the_same(self, session, monkeypatch, tmp_path, other, goes_on):
        monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
        spec, steps, advance = SPEC.but(recovery="perp-bias", rate=0.01), [], _Run._advance
        monkeypatch.setattr(_Run, "_advance", lambda run, device: steps.append(run.step) or advance(run, device))
        told = recovery(spec, session, merged(spec, session))
        last = [next(told) for _ in range(5)][-1].step
        told.close()
        monkeypatch.setattr(f"intrafusion.studies.session.{other}", lambda: "another")
        steps.clear()
        list(recovery(spec, session, merged(spec, session)))
        assert steps[0] == (last if goes_on else 0)

    def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(self, session, tmp_path):
        how, data = RecoveryOptions(epochs=2, rate=None), session.training(SPEC)
        whole = merged(SPEC, session)
        straight = list(recovering(whole, "overparam", data, how))
        file = tmp_path / "kept.pt"
        stopped = recovering(merged(SPEC, session), "overparam", data, how, file)
        assert [next(stopped) for _ in range(4)][1:] == straight[1:4]
        stopped.close()
        assert not file.exists()
        again = merged(SPEC, session)
        facts, *moments = recovering(again, "overparam", data, how, file)
        assert facts.rate == straight[0].rate
        assert moments == straight[1:]
        assert all(torch.equal(v, again.small.state_dict()[k]) for k, v in whole.small.state_dict().items())
        assert [path.name for path in tmp_path.iterdir()] == ["kept.pt"]
        assert read_recovery(file).moments == tuple(moments)

    def test_equal_compute_is_fewer_epochs_for_what_costs_more(self, session):
        steps = {}
        for name in ("finetune", "overparam-sp"):
            facts, *moments = recovery(SPEC.but(recovery=name, budget="compute", epochs=6), session, merged(SPEC, session))
            steps[name] = facts.macs * moments[-1].steps
        assert steps["overparam-sp"] == pytest.approx(steps["finetune"], rel=0.15)

    def test_the_learning_rate_is_one_that_learns(self, session):
        told = recovery(SPEC.but(recovery="finetune", rate=None), session, merged(SPEC, session))
        assert 1e-3 < next(told).rate < 1

    def test_a_rate_that_the_long_run_does_not_bear_is_lowered(self, session, monkeypatch, tmp_path):
        monkeypatch.setattr("intrafusion.training.recovery.finetune._Lesson.rate", lambda self: 1e6)
        file = tmp_path / "kept.pt"
        made = merged(SPEC, session)
        told = list(recovering(made, "finetune", session.training(SPEC), RecoveryOptions(epochs=3), file))
        rates = [one.rate for one in told if isinstance(one, TrainingCost)]
        assert rates == pytest.approx([1e6 / 10 ** (n / 2) for n in range(len(rates))])
        assert len(rates) > 1
        kept = read_recovery(file)
        assert kept.facts.rate == rates[-1]
        assert [moment.step for moment in kept.moments] == list(range(1, 10))
        assert [path.name for path in tmp_path.iterdir()] == ["kept.pt"]  # no state of a run that diverged

    def test_a_rate_that_somebody_chose_is_not_lowered(self, session, tmp_path):
        with pytest.raises(itf.IntrafusionError, match="choose a learning rate below 1"):
            list(
                recovering(
                    merged(SPEC, session), "finetune", session.training(SPEC), RecoveryOptions(rate=1e5), tmp_path / "kept.pt"
                )
            )
        assert list(tmp_path.iterdir()) == []

    def test_ends_early_where_nothing_gets_better(self, session):
        spec = SPEC.but(recovery="finetune", epochs=40, patience=2, rate=1e-6)
        *_, last = recovery(spec.but(rate=0.5, epochs=60), session, merged(spec, session))
        assert last.step < last.steps

    def test_report_hears_everything(self, session):
        heard: list = []
        recover(merged(SPEC, session), "perp", session.training(SPEC), RecoveryOptions(epochs=1, rate=0.1), report=heard.append)
        assert [type(one) for one in heard] == [TrainingCost] + [TrainingProgress] * (len(heard) - 1)

    def test_nothing_of_a_run_stays_in_memory(self, session):
        def tensors() -> int:
            gc.collect()
            return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

        counts = []
        gc.freeze()  # all that was before need not be looked through
        try:
            for _ in range(3):
                recover(merged(SPEC, session), "overparam-sp", session.training(SPEC), RecoveryOptions(epochs=0.5, rate=0.03))
                counts.append(tensors())
        finally:
            gc.unfreeze()
        assert counts[2] <= counts[1]

    def test_held_out_images_are_a_tenth_and_no_others(self, session):
        learned, held = hold_out(session.training(SPEC))
        assert (len(learned), len(held)) == (360, 40)


BAD = {
    "epochs": ({"epochs": 0}, "epochs must be a number above 0 and less than 1,000,000, not 0"),
    "rate": ({"rate": -1}, "rate must be a number above 0 and less than 1,000,000, not -1"),
    "ratio": ({"ratio": 0.5}, "ratio must be a number of at least 1 and less than 1,000,000, not 0.5"),
    "rank": ({"rank": 1.5}, "rank must be a whole number of at least 1 and less than 1,000,000, not 1.5"),
    "patience": ({"patience": -1}, "patience must be a whole number of at least 0 and less than 1,000,000, not -1"),
    "budget": ({"budget": "money"}, "budget"),
    "gamma": ({"gamma": float("nan")}, "gamma must be a number of at least 0 and less than 1,000,000, not nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_line(case):
    settings, words = BAD[case]
    with pytest.raises(itf.IntrafusionError, match=words):
        RecoveryOptions(**settings)


def test_images_without_labels_are_one_line(session):
    data = replace(session.training(SPEC), labels=torch.full((400,), -1))
    with pytest.raises(itf.IntrafusionError, match="20 labelled images"):
        recover(merged(SPEC, session), "finetune", data)


def test_too_few_images_are_one_line(session):
    with pytest.raises(itf.IntrafusionError, match="at least 20 labelled images"):
        recover(merged(SPEC, session), "finetune", itf.load_data("digits", "train").subset(12))


def test_without_images_one_line(session):
    with pytest.raises(itf.IntrafusionError, match=r"^this recovery needs images; pass data=$"):
        recover(merged(SPEC, session), "repair", None)


def test_a_file_that_is_no_result_is_one_line(session, tmp_path):
    (tmp_path / "kept.pt").write_bytes(b"nothing")
    with pytest.raises(itf.IntrafusionError, match=r"cannot read .*kept.pt.*; remove it and run again"):
        recover(merged(SPEC, session), "finetune", session.training(SPEC), keep=tmp_path / "kept.pt")


def test_the_test_split_is_nothing_to_learn_from(session, monkeypatch):
    monkeypatch.setattr(Session, "calibration", lambda self, spec: itf.load_data("digits", "test"))
    with pytest.raises(itf.IntrafusionError, match="recovery finetune needs training images"):
        session.training(SPEC.but(recovery="finetune"))


class HeadFirst(nn.Module):
    """The layer that runs last is the first that is defined."""

    def __init__(self):
        super().__init__()
        self.head, self.body = (
            nn.Linear(6, 4),
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()),
        )

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_the_head_is_the_layer_that_runs_last():
    torch.manual_seed(0)
    model = HeadFirst().eval()
    model.card = itf.ModelCard("x", (0.5,) * 3, (0.25,) * 3, (3, 8, 8), 4, "digits")
    pixels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    data = itf.ImageData("digits", "train", pixels, torch.arange(40) % 4, tuple("abcd"))
    pruned = cut(model, itf.find_groups(model, model.card.example()), 0.5, merge="drop")
    before = copy.deepcopy(pruned.small.state_dict())
    recover(pruned, "perp-head", data, RecoveryOptions(epochs=1, rate=0.1))
    changed = {name for name, value in pruned.small.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
