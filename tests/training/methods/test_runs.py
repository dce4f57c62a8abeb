"""The training lab: what it is asked for, that a stopped run goes on to the same end, and what is kept of it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from damage import CARDS, DAMAGES, set_card
from quick_runs import QUICK, plain

import intrafusion as itf
from intrafusion._registry import TRAINERS
from intrafusion.cli import main
from intrafusion.cli import main as cli
from intrafusion.runtime.cancellation import Cancelled
from intrafusion.studies.uploads import remove
from intrafusion.training.methods.parallel import parts_of, rows_of_part
from intrafusion.training.methods.runs import LabRun, damaged, known, open_run, run_training, runs
from intrafusion.training.methods.sdprun import GroupLasso, channels_of, zeroed
from intrafusion.training.methods.spec import TrainSpec

ALONE = [name for name in TRAINERS if name not in ("fap", "paf")]


def quick(method: str, **changes) -> TrainSpec:
    """A run of a second."""
    knobs = {"rounds": 1, "tune": 1.0} if "rounds" in TRAINERS[method].knobs else {}
    return QUICK.but(method=method, **(knobs | changes))


class TestSpec:
    def test_round_trip(self):
        spec = TrainSpec(method="fap", folds=4, sparsity=0.25, part=())
        assert TrainSpec.from_dict(json.loads(spec.key())) == spec
        assert hash(TrainSpec.from_dict(spec.to_dict())) == hash(spec)

    def test_what_the_method_does_not_read_is_no_part_of_it(self):
        assert TrainSpec(method="sgd", c=3.0, merge="drop") == TrainSpec(method="sgd")
        assert TrainSpec(method="sdprun", c=3.0) != TrainSpec(method="sdprun")

    @pytest.mark.parametrize(
        "bad",
        [
            {"method": "nope"}, {"epochs": 0}, {"epochs": "3"}, {"lr": 0}, {"batch": 0.5}, {"mu": 1.0}, {"c": -1},
            {"sparsity": 1.0, "method": "iterative"}, {"drawn": "odd", "method": "aslp"}, {"penalty": "odd"}, {"part": (2,)},
            {"training": 3}, {"seed": True}, {"merge": "nope", "method": "iterative"}, {"surprise": 1}, {"energy": 0.0},
        ],
    )  # fmt: skip
    def test_bad_values_are_one_line(self, bad):
        with pytest.raises(itf.IntrafusionError) as caught:
            TrainSpec.from_dict(bad)
        assert "\n" not in str(caught.value)


class TestRuns:
    @pytest.mark.parametrize("method", ALONE)
    def test_a_stopped_run_goes_on_to_the_same_end(self, method, monkeypatch, tmp_path):
        spec = quick(method, model="digits-vgg" if method in ("sdprun", "aslp") else "digits-mlp")
        whole = list(run_training(spec))
        assert isinstance(whole[-1], LabRun)
        monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path / "elsewhere"))
        for stop in (3, 10_000):
            told = run_training(spec)
            try:
                for number, _ in enumerate(told):
                    if number == stop:
                        told.throw(Cancelled())
            except Cancelled:
                assert known(spec) is None
        again = list(run_training(spec))
        assert plain(again[:-1]) == plain(whole[:-1])
        ours, theirs = again[-1].outcome, whole[-1].outcome
        assert replace(ours, seconds={}) == replace(theirs, seconds={})
        for a, b in zip(again[-1].model.state_dict().values(), whole[-1].model.state_dict().values(), strict=True):
            assert torch.equal(a, b)

    def test_a_whole_run_is_not_trained_again(self, monkeypatch):
        first = list(run_training(QUICK))
        monkeypatch.setattr("intrafusion.training.methods.task.train", lambda *a, **k: pytest.fail("it trains again"))
        assert plain(list(run_training(QUICK))[:-1]) == plain(first[:-1])
        assert open_run(QUICK).outcome == first[-1].outcome == runs()[0].outcome

    def test_a_run_of_other_code_is_listed_and_trained_again(self, monkeypatch):
        *_, first = run_training(QUICK)
        assert not first.older
        monkeypatch.setattr("intrafusion.training.methods.runs.lab_version", lambda: "another")
        assert known(QUICK) is None
        assert [one.older for one in runs()] == [True]
        *_, again = run_training(QUICK)
        assert again.path != first.path
        assert [one.older for one in runs()] == [False, True]

    def test_the_outcome_is_what_evaluate_says(self):
        *_, whole = run_training(quick("sdprun", model="digits-vgg", epochs=4))
        measured = itf.evaluate(whole.model, itf.load_data("digits"), None)
        assert (measured.accuracy, measured.interval) == (whole.outcome.accuracy, whole.outcome.interval)
        assert whole.outcome.difference < 1e-5

    def test_what_cannot_be_read_is_trained_again(self):
        *_, whole = run_training(QUICK)
        whole.path.write_text("{")
        assert known(QUICK) is None
        assert runs() == []
        *_, again = run_training(QUICK)
        assert again.outcome.accuracy == whole.outcome.accuracy

    def test_a_test_split_alone_is_one_line(self, tmp_path):
        import numpy as np

        file = tmp_path / "cifar10_test.npz"
        np.savez(file, images=np.zeros((30, 32, 32, 3), np.uint8), labels=np.arange(30) % 10)
        with pytest.raises(itf.IntrafusionError, match="training images"):
            next(run_training(TrainSpec(model="cifar10-conv2", method="sgd", data_path=str(file))))


class TestSplitData:
    def test_parts_are_halves_of_the_folds(self):
        assert [part["part"] for part in parts_of(TrainSpec(method="fap"))] == [(0,), (1,)]
        assert len(parts_of(TrainSpec(method="fap", folds=4))) == 6
        with pytest.raises(itf.IntrafusionError, match="even"):
            parts_of(TrainSpec(method="fap", folds=3))

    def test_two_halves_are_all_images_once(self):
        a, b = (rows_of_part(101, TrainSpec(method="sgd", part=(fold,))) for fold in (0, 1))
        assert sorted(torch.cat([a, b]).tolist()) == list(range(101))

    def test_networks_on_halves_are_fused_and_pruned(self):
        told = list(run_training(quick("fap")))
        phases = {step.phase for step in told[:-1]}
        assert {"part 1: training", "part 2: training", "fused", "fused, fine-tuned", "pruned 1, fine-tuned"} <= phases
        outcome = told[-1].outcome
        assert outcome.params < 0.6 * outcome.dense_params
        assert outcome.seconds["parts"] > 0
        half = open_run(TrainSpec.from_dict(QUICK.to_dict() | {"part": [0]}))
        assert half.outcome.count == 597

    @pytest.mark.parametrize("method", ["fap", "paf"])
    @pytest.mark.parametrize("by", ["weights", "activations"])
    def test_networks_are_fused_on_images_whatever_aligns_them(self, monkeypatch, caplog, method, by):
        """Without images their statistics would be averages, of which a warning tells."""

        def together(task, specs):
            yield from ()
            return [task.network() for _ in specs]

        monkeypatch.setattr("intrafusion.training.methods.split_data.together", together)
        phases = [step.phase for step in list(run_training(quick(method, by=by, tune=0.0)))[:-1]]
        assert "fused" in phases
        assert "averages" not in caplog.text

    def test_what_is_fused_gets_its_statistics_back_before_it_is_fine_tuned(self):
        spec = quick("iterative", model="digits-vgg", training=None, epochs=3, sparsity=0.7, tune=0.0)
        *told, whole = run_training(spec)
        dense = open_run(spec.but(method="sgd")).model
        fused = itf.prune(dense, dense.card.example(), 0.7)
        naive = itf.evaluate(fused, itf.load_data("digits"), None).accuracy
        assert [step.phase for step in told][-1] == "pruned 1"
        assert whole.outcome.accuracy > naive + 0.1

    def test_stopped_parts_go_on_to_the_same_end(self, monkeypatch, tmp_path):
        spec = quick("paf", epochs=8)
        *_, whole = run_training(spec)
        monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path / "elsewhere"))
        for phase in ("part", "fused, fine-tuned"):  # while both parts train, and when they are fused
            told = run_training(spec)
            next(step for step in told if step.phase.startswith(phase))
            with pytest.raises(Cancelled):
                told.throw(Cancelled())
            assert known(spec) is None
            left = tmp_path / "elsewhere" / "lab"
            ended = left.glob("*.json") if phase == "part" else ()  # one may have ended before the other began
            assert [*left.glob("*.phases/*.run"), *ended]
        *_, again = run_training(spec)
        assert replace(again.outcome, seconds={}) == replace(whole.outcome, seconds={})
        for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
            assert torch.equal(a, b)


class TestGroupLasso:
    def test_a_step_is_sgd_then_the_proximal_one(self):
        model = itf.load_model("digits-mlp").requires_grad_(True)
        twin = itf.load_model("digits-mlp").requires_grad_(True)
        channels = channels_of(model, itf.find_groups(model, model.card.example()))
        optimiser = GroupLasso(channels, lr=0.1, c=2.0)
        plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        for network in (model, twin):
            network(images).square().mean().backward()
        optimiser.step()
        plain.step()
        weight, expected = model[1].weight, twin[1].weight
        norms = torch.cat([expected, twin[1].bias[:, None]], 1).norm(dim=1)
        torch.testing.assert_close(weight, expected * (1 - 0.2 / norms).clamp(min=0)[:, None])
        torch.testing.assert_close(model[5].weight, twin[5].weight)  # the classifier is no group

    def test_much_of_it_zeroes_channels(self):
        model = itf.load_model("digits-mlp").requires_grad_(True)
        channels = channels_of(model, itf.find_groups(model, model.card.example()))
        optimiser = GroupLasso(channels, lr=0.1, c=100.0)
        model(torch.zeros(1, 1, 8, 8)).sum().backward()
        optimiser.step()
        assert all(bool(gone.all()) for gone in zeroed(channels).values())


def test_damaged_runs_are_listed_as_such_hinder_no_other_and_can_be_removed(capsys):
    *_, whole = run_training(QUICK.but(epochs=1.0))
    damages = [*DAMAGES.values(), *(lambda path, card=card: set_card(path, card) for card in (None, *CARDS.values()))]
    for number, damage in enumerate(damages):
        damage(shutil.copy(whole.path, whole.path.with_name(f"run{number}.safetensors")))
    names = {f"lab/run{number}" for number in range(len(damages))}
    assert damaged().keys() == names
    assert [one.path for one in runs()] == [whole.path]
    assert cli.main(["own", "list", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["kept"] for row in told if row["about"].startswith("damaged: ")} == names
    assert cli.main(["lab", "--list", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert cli.main(["own", "remove", "lab/run0"]) == 0
    for name in names - {"lab/run0"}:
        remove("lab", name)
    assert not damaged()
    assert [path.name for path in whole.path.parent.iterdir()] == [whole.path.name]
    assert cli.main(["own", "remove", "lab/run0"]) == 2
    assert "lab/run0 does not exist" in capsys.readouterr().err


class TestCommandLine:
    def test_trains_lists_and_keeps(self, capsys):
        flags = ["--model", "digits-mlp", "--method", "edge-popup", "--training", "200", "--epochs", "1"]
        assert main.main(["lab", *flags, "--keep", "popped", "--json"]) == 0
        *steps, whole = map(json.loads, capsys.readouterr().out.splitlines())
        assert steps
        assert all(step["phase"] == "training" for step in steps)
        assert main.main(["lab", "--list", "--json"]) == 0
        assert [json.loads(line)["accuracy"] for line in capsys.readouterr().out.splitlines()] == [whole["accuracy"]]
        assert itf.evaluate(itf.load_model("kept/popped"), itf.load_data("digits"), None).accuracy == whole["accuracy"]

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--method", "sgd", "--c", "2"], "sgd does not use --c"),
            (["--method", "nope"], "choose one of sgd"),
            (["--spec", "{"], "is not JSON"),
            (["--spec", "{}", "--c", "1"], "leave out --c"),
            (["--spec", "[]"], "mapping"),
            (["--model", "nope", "--method", "sgd"], "unknown model"),
            (["--method", "fap", "--folds", "3"], "even"),
            (["--epochs", "many"], "invalid float"),
        ],
    )
    def test_bad_flags_are_one_line(self, flags, said, capsys):
        assert main.main(["lab", *flags]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error
        assert "\n" not in error
