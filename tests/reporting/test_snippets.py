import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import intrafusion as itf
from intrafusion.cli import main
from intrafusion.cli.options import spec_of
from intrafusion.cli.studies import _study_of
from intrafusion.reporting.snippets import curve_line, curve_snippet, flag, plan_snippet, study_snippet, sweep_line
from intrafusion.spec import PLAN_FIELDS
from intrafusion.studies import measurement
from intrafusion.studies.session import open_session
from intrafusion.studies.store.sqlite import Store
from intrafusion.studies.study_file import Study
from intrafusion.studies.sweeps import grid, origin, sweep

SWEPT = {"criterion": ["l1"], "merge": ["drop", "fusion"], "sparsity": [0.1, 0.5]}
BASES = {
    "defaults": {},
    "groups": {"groups": ("conv1", "layer2.0.conv1")},
    "one group": {"groups": ("layer3.0.conv2",)},
    "paths with spaces": {"weights": "my weights/it's $HOME.pt", "data_path": "C:\\data (1)/x.npz"},
    "all images": {"limit": None},
    "some images": {"limit": 7, "seed": 12345678901},
    "bias": {"bias": True},
    "widths": {"round_to": 8},
    "norms in folding": {"fold_norms": "columns"},
    "other data": {"model": "cifar10-resnet20", "dataset": "cifar10", "weights": "random"},
    "squared cost": {"p": 2},
    "cost in between": {"p": 1.5},
    "transport knobs": {"source": "softmax", "target": "importance", "anchors": "kmeans", "normalise": "target"},
    "everything": {
        "model": "digits-vgg", "groups": ("features.3",), "p": 3, "source": "importance", "anchors": "gmm",
        "normalise": "none", "bias": True, "seed": 9, "limit": 100, "weights": "w.pt", "data_path": "d",
        "cost": "activations", "distance": "cosine", "solver": "sinkhorn", "reg": 0.5, "reg_m": 2.5, "mass": 0.75,
        "calibration": None, "precision": "fast",
        "recovery": "overparam-sp", "training": None, "epochs": 1.5, "budget": "compute", "rate": 0.01, "patience": 3,
        "ratio": 4.0, "gamma": 1.0, "rank": 2,
    },
    "sparsities": {"groups": ("conv1", "layer2.0.conv1"), "sparsities": (0.25, 1 / 3)},
}  # fmt: skip


def parsed(line: str) -> list[itf.PruneSpec]:
    """What the command line would measure."""
    program, *words = shlex.split(line)
    assert (program, words[:3]) == ("python", ["-m", "intrafusion", "curve"])
    args = main._parser().parse_args(words[2:])
    return grid(spec_of(args), criterion=args.criterion, merge=args.merge, sparsity=args.sparsity)


class TestCurveLine:
    @pytest.mark.parametrize("changes", BASES.values(), ids=BASES)
    def test_command_line_reads_the_same_specs_back(self, changes):
        base = itf.PruneSpec(**changes)
        assert parsed(curve_line(base, **SWEPT)) == grid(base, **SWEPT)

    @pytest.mark.parametrize("sparsity", [0.05, 0.3, 1 / 3, 0.1 + 0.2, 0.123456789, 0])
    def test_no_digit_of_a_sparsity_is_lost(self, sparsity):
        swept = SWEPT | {"sparsity": [sparsity], "criterion": ["l2", "bn_scale"]}
        assert parsed(curve_line(itf.PruneSpec(), **swept)) == grid(itf.PruneSpec(), **swept)

    def test_every_field_of_the_spec_can_be_quoted(self):
        quoted = {name for changes in BASES.values() for name in changes} | set(SWEPT)
        assert set(itf.PruneSpec().to_dict()) <= quoted

    def test_defaults_are_left_out(self):
        words = shlex.split(curve_line(itf.PruneSpec(), **SWEPT))
        assert {word for word in words if word.startswith("--")} == {
            "--model", "--data", "--criterion", "--merge", "--sparsity",
        }  # fmt: skip

    def test_flags_are_the_command_lines(self):
        assert (flag("dataset"), flag("data_path"), flag("p")) == ("--data", "--data-path", "--p")


AXES = {"groups": ("each",), "sparsity": (0.1, 1 / 3), "merge": ("drop", "fusion")}
SHARED = [changes for changes in BASES.values() if "sparsities" not in changes]  # which say what to prune, as axes do


class TestSweepLine:
    @pytest.mark.parametrize("changes", SHARED, ids=str)
    @pytest.mark.parametrize("decide", [False, True])
    def test_command_line_reads_the_same_study_back(self, changes, decide):
        study = Study("it's mine", itf.PruneSpec(**changes), AXES, decide)
        program, *words = shlex.split(sweep_line(study))
        assert (program, words[:3]) == ("python", ["-m", "intrafusion", "sweep"])
        read = _study_of(main._parser().parse_args(words[2:]))
        groups = open_session("digits-mlp").groups
        assert read.specs(groups) == study.specs(groups)
        assert (read.name, read.decide) == (study.name, study.decide)

    def test_where_it_runs_can_be_said(self):
        line = sweep_line(Study("s", itf.PruneSpec(), AXES), executor="ray", address="my host:6379")
        args = main._parser().parse_args(shlex.split(line)[3:])
        assert (args.executor, args.address) == ("ray", "my host:6379")


class TestStudySnippet:
    @pytest.mark.parametrize("changes", [
        {}, {"criterion": "l2", "limit": None}, {"solver": "sinkhorn", "reg": 0.1, "bias": True, "limit": 30},
    ], ids=str)  # fmt: skip
    def test_measures_and_keeps_what_sweep_does(self, capsys, changes):
        base = itf.PruneSpec(**({"model": "digits-mlp", "limit": 40} | changes))
        study = Study("it's mine", base, AXES)
        names: dict = {}
        exec(study_snippet(study), names)
        session = open_session(base)
        expected = {result.spec: result for result in sweep(study.specs(session.groups), session)}
        with Store() as store:
            stored = store.get((spec, origin(spec, session)) for spec in expected)
        assert {spec: result.correct for spec, result in stored.items()} == {
            spec: result.correct for spec, result in expected.items()
        }
        assert capsys.readouterr().out.count("Result(spec=") >= len(expected)


class TestPlanSnippet:
    @pytest.mark.parametrize("changes", [
        {}, {"criterion": "l2", "sparsity": 0.75}, {"p": 2, "bias": True}, {"sparsity": 43 / 128},
        {"source": "importance", "target": "softmax", "normalise": "target"}, {"anchors": "kmeans", "seed": 3},
        {"criterion": "random", "seed": 5}, {"solver": "sinkhorn", "reg": 0.1}, {"solver": "partial", "mass": 0.5},
        {"cost": "activations", "calibration": 20, "distance": "cosine"}, {"solver": "unbalanced", "reg_m": 0.5},
    ], ids=str)  # fmt: skip
    def test_gives_the_plan_of_the_spec(self, changes):
        spec = itf.PruneSpec(model="digits-mlp", **changes)
        names: dict = {}
        exec(plan_snippet(spec, "1"), names)
        session = open_session("digits-mlp")
        group = next(group for group in session.groups if group.name == "1")
        data = session.calibration(spec)
        scores = itf.score(session.model, group, spec.criterion, data, spec.seed, spec.calibration)
        expected = itf.plan(session.model, group, scores, spec.sparsity, **spec.only(PLAN_FIELDS), data=data)
        assert torch.equal(names["scores"], scores)
        assert torch.equal(names["plan"].kept, expected.kept)
        assert torch.equal(names["plan"].matrix, expected.matrix)
        assert torch.equal(names["plan"].cost, expected.cost)

    def test_weights_file_is_named(self, tmp_path):
        path = tmp_path / "it's my file.pt"
        torch.save(itf.load_model("digits-mlp", weights="random").state_dict(), path)
        names: dict = {}
        exec(plan_snippet(itf.PruneSpec(model="digits-mlp", weights=str(path)), "1"), names)
        assert names["model"].card.source == str(path)


class TestCurveSnippet:
    @pytest.mark.parametrize("changes", [
        {}, {"groups": ("3",), "seed": 4}, {"p": 2, "bias": True, "source": "softmax"}, {"limit": None},
        {"cost": "activations", "calibration": 30},
        {"merge": "fold", "fold_norms": "columns", "model": "digits-vgg", "groups": ("features.3",)},
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("criteria", [["l1"], ["l2", "random"]])
    def test_prints_what_run_measures(self, capsys, changes, criteria):
        base = itf.PruneSpec(**({"model": "digits-mlp", "limit": 40} | changes))
        merges, sparsities = ["drop", base.merge], [0.25, 0.5]
        exec(curve_snippet(base, merges, sparsities, criteria), {})
        lines = capsys.readouterr().out.splitlines()
        session = open_session(base)
        specs = grid(base, sparsity=sparsities, criterion=criteria, merge=merges)
        results = [measurement.run_spec(spec, session) for spec in specs]
        assert lines == [f"{r.spec.sparsity} {r.spec.criterion} {r.spec.merge} {r.accuracy} {r.interval}" for r in results]

    def test_no_digit_of_a_sparsity_is_lost(self, capsys):
        base = itf.PruneSpec(model="digits-mlp", limit=1)
        exec(curve_snippet(base, ["drop"], [0, 1 / 3, 43 / 128]), {})
        assert [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()] == [0, 1 / 3, 43 / 128]

    def test_images_have_the_size_that_the_model_takes(self, monkeypatch, tmp_path):
        asked = {}

        def load_data(name: str, *arguments: object, **options: object) -> SimpleNamespace:
            asked.update(options)
            return SimpleNamespace()

        card = itf.ModelCard("imagenet/efficientnet_b1", (), (), (3, 240, 240), 1000, "imagenet")
        monkeypatch.setattr(itf, "load_model", lambda name: SimpleNamespace(card=card))
        monkeypatch.setattr(itf, "load_data", load_data)
        monkeypatch.setattr(itf, "prune", lambda model, *arguments, **options: model)
        monkeypatch.setattr(itf, "evaluate", lambda *a, **o: SimpleNamespace(accuracy=0.5, interval=(0.4, 0.6)))
        base = itf.PruneSpec(model=card.name, dataset="imagenet", data_path=str(tmp_path / "it's val"))
        exec(curve_snippet(base, ["drop"], [0.5]), {})
        assert Path(asked["path"]) == tmp_path / "it's val"
        assert asked["input_size"] == (3, 240, 240)
