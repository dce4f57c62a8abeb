import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from places import ROOT

import intrafusion as itf
from intrafusion.cli.main import _parser, main
from intrafusion.cli.options import summary_of
from intrafusion.data import datasets
from intrafusion.runtime.paths import ASSETS

POINT = {"model", "data", "groups", "criterion", "merge", "sparsity", "accuracy", "count", "params", "macs"}
FAST = ["curve", "--model", "digits-mlp", "--limit", "20"]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction))


@pytest.fixture
def rows(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict]]:
    """Runs a command with --json; what stdout holds, one object a line and nothing else."""

    def call(*words: str) -> list[dict]:
        assert main([*words, "--json"]) == 0
        lines = capsys.readouterr().out.splitlines()
        parsed = [json.loads(line) for line in lines]
        assert all(isinstance(row, dict) for row in parsed)
        return parsed

    return call


class TestModels:
    def test_json_has_every_model_of_the_zoo(self, rows):
        listed = rows("models")
        assert [row["name"] for row in listed] == itf.model_names(imagenet=False)
        by_name = {row["name"]: row for row in listed}
        assert by_name["digits-vgg"]["weights"] == "embedded"
        assert by_name["digits-vgg"]["dataset"] == "digits"
        assert by_name["digits-vgg"]["accuracy"] == itf.load_model("digits-vgg").card.accuracy
        assert by_name["cifar100-vgg16_bn"] == by_name["cifar100-vgg16_bn"] | {"weights": "download", "accuracy": None}

    def test_torchvisions_come_when_asked_for(self, rows):
        assert not [row for row in rows("models") if row["name"].startswith("imagenet/")]
        assert "imagenet/resnet18" in [row["name"] for row in rows("models", "--imagenet")]

    def test_table_is_for_people(self, capsys):
        assert main(["models"]) == 0
        out = capsys.readouterr().out
        assert "digits-resnet" in out
        assert "99.7%" in out
        assert "None" not in out


class TestData:
    def test_json_has_every_dataset(self, rows):
        assert [row["name"] for row in rows("data")] == list(datasets.DATASETS)

    @pytest.mark.parametrize(("split", "count"), [("train", 1200), ("test", 597)])
    def test_one_dataset_is_described(self, rows, split, count):
        (row,) = rows("data", "digits", "--split", split)
        assert row["images"] == [count, 1, 8, 8]
        assert (row["name"], row["split"], row["classes"], row["names"]) == ("digits", split, 10, list("0123456789"))

    def test_data_path_is_read(self, rows, tmp_path):
        np.savez(tmp_path / "x.npz", images=np.zeros((3, 32, 32, 3), np.uint8), labels=np.array([1, 2, 3]))
        (row,) = rows("data", "cifar10", "--data-path", str(tmp_path / "x.npz"))
        assert row["images"] == [3, 3, 32, 32]
        assert row["names"][3] == "cat"

    def test_table_is_for_people(self, capsys):
        assert main(["data"]) == 0
        assert "imagenette" in capsys.readouterr().out
        assert main(["data", "digits"]) == 0
        assert "597" in capsys.readouterr().out


class TestGroups:
    @pytest.mark.parametrize("model", ["digits-mlp", "digits-resnet"])
    def test_json_has_every_group_as_the_library_finds_it(self, rows, model):
        network = itf.load_model(model)
        found = itf.find_groups(network, network.card.example())
        listed = rows("groups", "--model", model)
        assert [(row["name"], row["channels"], row["reason"]) for row in listed] == [
            (group.name, group.size, group.reason) for group in found
        ]
        assert [row["prunable"] for row in listed] == [group.reason is None for group in found]

    def test_weights_may_be_random(self, rows):
        assert len(rows("groups", "--model", "cifar10-resnet32", "--weights", "random")) == 17

    def test_table_counts_what_can_be_pruned(self, capsys):
        assert main(["groups"]) == 0
        out = capsys.readouterr().out
        assert "digits-resnet: 9 of 10 groups are prunable" in out
        assert "layer3.0.conv2" in out


class TestCurve:
    def test_json_has_one_point_a_line(self, rows):
        points = rows(*FAST, "--data", "digits", "--criterion", "l1", "l2", "--merge", "drop", "fusion",
                      "--sparsity", "0.1", "0.5", "--groups", "all")  # fmt: skip
        assert [(p["criterion"], p["merge"], p["sparsity"]) for p in points] == [
            (criterion, merge, sparsity)
            for criterion in ("l1", "l2")
            for merge in ("drop", "fusion")
            for sparsity in (0.1, 0.5)
        ]
        for point in points:
            assert set(point) >= POINT
            assert (point["model"], point["data"], point["groups"], point["count"]) == (
                "digits-mlp",
                "digits",
                "all",
                20,
            )
            assert 0 <= point["low"] <= point["accuracy"] <= point["high"] <= 1

    def test_point_is_what_the_library_measures(self, rows):
        (point,) = rows("curve", "--model", "digits-vgg", "--merge", "fusion", "--sparsity", "0.2", "--limit", "all",
                        "--groups", "features.7", "features.14", "--p", "2", "--source", "softmax", "--bias")  # fmt: skip
        model, images = itf.load_model("digits-vgg"), itf.load_data("digits")
        small = itf.prune(model, model.card.example(), 0.2, groups=["features.7", "features.14"], p=2, source="softmax",
                          bias=True)  # fmt: skip
        assert point["accuracy"] == itf.evaluate(small, images, limit=None).accuracy
        assert point["params"] == sum(p.numel() for p in small.parameters())
        assert point["groups"] == ["features.7", "features.14"]
        assert point["count"] == 597

    def test_defaults_draw_drop_and_fusion_of_the_default_model(self, rows):
        points = rows("curve", "--limit", "5")
        assert {(p["model"], p["data"], p["criterion"]) for p in points} == {("digits-resnet", "digits", "l1")}
        assert {(p["merge"], p["sparsity"]) for p in points} == {(m, s) for m in ("drop", "fusion") for s in (0.1, 0.3, 0.5)}

    def test_dataset_follows_the_model(self, rows, tmp_path):
        images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / "x.npz", images=images, labels=np.array([1, 2, 3]))
        (point,) = rows("curve", "--model", "cifar10-resnet20", "--weights", "random", "--groups", "layer1.0.conv1",
                        "--data-path", str(tmp_path / "x.npz"), "--merge", "drop", "--sparsity", "0.5")  # fmt: skip
        assert (point["data"], point["count"], point["data_path"]) == ("cifar10", 3, str(tmp_path / "x.npz"))

    def test_limit_bounds_what_is_decoded_of_a_folder(self, rows, tmp_path, monkeypatch):
        for label in ("cat", "dog"):
            (tmp_path / label).mkdir()
            for number in range(5):
                Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / label / f"{number}.png")
        monkeypatch.setattr(datasets, "_MEMORY_LIMIT", 6 * 32 * 32 * 3)
        (point,) = rows("curve", "--model", "cifar10-resnet20", "--weights", "random", "--groups", "layer1.0.conv1",
                        "--data-path", str(tmp_path), "--merge", "drop", "--sparsity", "0.5", "--limit", "4")  # fmt: skip
        assert point["count"] == 4

    def test_cost_between_the_norms_is_a_number_like_another(self, rows):
        (point,) = rows(*FAST, "--merge", "fusion", "--sparsity", "0.5", "--p", "1.5")
        assert point["p"] == 1.5

    def test_points_stay_on_stdout_when_stderr_is_a_terminal(self, rows, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes that for a terminal, and draws its progress bar
        assert len(rows(*FAST, "--sparsity", "0.5")) == 2

    def test_table_is_for_people(self, capsys):
        assert main([*FAST, "--sparsity", "0.25", "0.5"]) == 0
        captured = capsys.readouterr()
        assert "digits-mlp on 20 digits images: dense 100.0%" in captured.out
        for cell in ("drop", "fusion", "25%", "50%", "168/224", "112/224"):
            assert cell in captured.out
        assert "Traceback" not in captured.err

    @pytest.mark.slow
    @pytest.mark.reference
    def test_published_resnet20_keeps_more_when_fused(self, rows, reference):
        weights, images = reference("weights/cifar10_resnet20.th"), reference("data/cifar10_test.npz")
        dropped, fused = rows("curve", "--model", "cifar10-resnet20", "--weights", str(weights),
                              "--data-path", str(images), "--sparsity", "0.1", "--limit", "500")  # fmt: skip
        assert fused["dense_accuracy"] > 0.88
        assert fused["accuracy"] > dropped["accuracy"] + 0.1


class TestTrain:
    def test_writes_what_load_model_reads(self, rows, tmp_path, capsys):
        (card,) = rows("train", "digits-mlp", "--epochs", "1", "--seed", "3", "--out", str(tmp_path / "out"))
        model = itf.load_model("digits-mlp", weights=tmp_path / "out" / "digits-mlp.safetensors")
        assert model.card.accuracy == card["accuracy"]
        assert card["details"]["command"] == "python -m intrafusion train digits-mlp --epochs 1 --seed 3"
        assert (card["details"]["seed"], card["details"]["recipe"]["epochs"]) == (3, 1)
        assert itf.evaluate(model, itf.load_data("digits"), limit=None).accuracy == card["accuracy"]

    def test_tells_each_epoch_on_stderr(self, capsys, tmp_path):
        before = {path.name: path.stat().st_mtime_ns for path in ASSETS.iterdir()}
        assert main(["train", "digits-mlp", "--epochs", "2", "--out", str(tmp_path)]) == 0
        captured = capsys.readouterr()
        assert captured.err.count("loss") == 2
        assert "digits-mlp" in captured.out
        assert before == {path.name: path.stat().st_mtime_ns for path in ASSETS.iterdir()}


BAD = {
    "no command": ([], "COMMAND"),
    "unknown command": (["fly"], "fly"),
    "unknown flag": (["models", "--colour"], "--colour"),
    "unknown model": (["curve", "--model", "digits-lenet"], "digits-lenet"),
    "unknown model to list": (["groups", "--model", "lenet"], "lenet"),
    "unknown torchvision model": (["groups", "--model", "imagenet/resnet19"], "resnet19"),
    "weights not there": (["groups", "--weights", "nowhere.pt"], "nowhere.pt"),
    "weights of no kind": (["groups", "--weights", "README.md"], "README.md"),
    "weights of too long a name": (["groups", "--weights", "x" * 300], "xxx"),
    "weights nowhere to be had": (["groups", "--model", "cifar10-resnet18"], "no published weights"),
    "sparsity too large": (["curve", "--sparsity", "1.3"], "1.3"),
    "sparsity of one": (["curve", "--sparsity", "0.5", "1"], "less than 1"),
    "sparsity negative": (["curve", "--sparsity", "-0.1"], "sparsity"),
    "sparsity not a number": (["curve", "--sparsity", "half"], "half"),
    "sparsity nan": (["curve", "--sparsity", "nan"], "nan"),
    "sparsity missing": (["curve", "--sparsity"], "--sparsity"),
    "unknown criterion": ([*FAST, "--criterion", "luck"], "luck"),
    "unknown merge": ([*FAST, "--merge", "drop", "melt"], "melt"),
    "unknown solver": ([*FAST, "--solver", "guess"], "guess"),
    "unknown recovery": ([*FAST, "--recovery", "hope"], "hope"),
    "unknown marginal": ([*FAST, "--source", "rain"], "rain"),
    "unknown anchors": ([*FAST, "--anchors", "rain"], "rain"),
    "cost of no norm": ([*FAST, "--p", "0.5"], "0.5"),
    "unknown group": ([*FAST, "--groups", "conv9"], "conv9"),
    "group that is an output": ([*FAST, "--groups", "1", "5"], "outputs"),
    "limit of zero": (["curve", "--limit", "0"], "limit"),
    "limit not a number": (["curve", "--limit", "many"], "many"),
    "seed negative": (["curve", "--seed", "-1"], "seed"),
    "seed too large": ([*FAST, "--seed", str(2**64)], "seed"),
    "device not there": ([*FAST, "--device", "cuda:99"], "cuda:99"),
    "device of no kind": ([*FAST, "--device", "banana"], "banana"),
    "unknown data": ([*FAST, "--data", "mnist"], "mnist"),
    "data to download": ([*FAST, "--data", "cifar10"], "--download"),
    "data not there": ([*FAST, "--data", "cifar10", "--data-path", "nowhere.npz"], "nowhere.npz"),
    "data without a path": ([*FAST, "--data", "imagenet"], "--data-path"),
    "data for another model": ([*FAST, "--data", "cifar10", "--data-path", "ten.npz"], "digits-mlp needs"),
    "unknown data to describe": (["data", "mnist"], "mnist"),
    "unknown split": (["data", "digits", "--split", "val"], "val"),
    "training without a model": (["train"], "MODEL"),
    "training an unknown model": (["train", "lenet"], "lenet"),
    "training without a recipe": (["train", "cifar10-resnet56", "--data-path", "."], "cifar10-resnet56"),
    "training without data": (["train", "cifar10-resnet20"], "cifar10"),
    "training into a file": (["train", "digits-mlp", "--epochs", "1", "--out", "README.md"], "README.md"),
    "training no epoch": (["train", "digits-mlp", "--epochs", "0", "--out", "out"], "epochs"),
    "training half an epoch": (["train", "digits-mlp", "--epochs", "0.5", "--out", "out"], "0.5"),
}


@pytest.mark.parametrize(("words", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_two_and_one_line(capsys, tmp_path, monkeypatch, words, match):
    (tmp_path / "README.md").write_text("no weights")
    for split in ("train", "test"):
        np.savez(tmp_path / f"cifar10_{split}.npz", images=np.zeros((2, 32, 32, 3), np.uint8), labels=np.array([0, 1]))
    (tmp_path / "cifar10_test.npz").with_name("ten.npz").write_bytes((tmp_path / "cifar10_test.npz").read_bytes())
    monkeypatch.chdir(tmp_path)
    status = main([*words, "--json"] if words else words)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    if "--epochs" in words:  # training tells its epochs before it fails
        lines = [line for line in lines if not line.startswith("Epoch")]
    assert status == 2
    assert captured.out == ""
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert match in lines[0]
    assert "Traceback" not in captured.err


ODD = """
import sys
import torch
from torch import nn

CARD = {"mean": [0.5], "std": [0.5], "input_size": [1, 8, 8], "classes": 10, "dataset": "digits"}


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.last(self.first(x.flatten(1)).relu_().mul_(2).sigmoid_().add_(1))


def leaves():
    sys.exit(7)


def nothing():
    return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(10))
"""


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["groups", "--model", "odd:leaves"], "the model's code exited the program (status 7)"),
        (["curve", "--model", "odd:nothing"], "no group to prune"),
        (
            ["scores", "--model", "odd:InPlace", "--criterion", "taylor"],
            "choose a method without gradients, such as criterion l1",
        ),
    ],
)
def test_odd_networks_are_one_line(capsys, tmp_path, monkeypatch, words, match):
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*words, "--json"]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("error: ")
    assert match in line


def test_a_network_without_groups_has_an_empty_list_of_them(capsys, tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["groups", "--model", "odd:nothing"]) == 0
    assert capsys.readouterr().out == "odd:nothing: 0 of 0 groups are prunable; 0 parameters, 0.0 million MACs\n"
    assert main(["groups", "--model", "odd:nothing", "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_program_exits_with_two_and_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "intrafusion", "curve", "--sparsity", "1.3"],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["error: sparsity must be a number of at least 0 and less than 1, not 1.3"]


def test_cancelling_is_130_and_keeps_the_lines_so_far(capsys, monkeypatch):
    from intrafusion.studies import sweeps

    calls = []

    def interrupted(spec, *rest, measure=sweeps.measure):
        calls.append(spec)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(spec, *rest)

    monkeypatch.setattr(sweeps, "measure", interrupted)
    assert main([*FAST, "--json"]) == 130
    captured = capsys.readouterr()
    assert [json.loads(line)["sparsity"] for line in captured.out.splitlines()] == [0.1, 0.3]
    assert "cancelled" in captured.err


def test_help_names_every_criterion_and_merge(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["curve", "--help"])
    out = capsys.readouterr().out
    for name in [*itf.registry("criterion"), *itf.registry("merge"), *itf.registry("solver")]:
        assert name in out


def test_help_fits_80_columns_and_lists_every_command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    helps: list[str] = []
    top = _parser()
    for parser in (top, commands_of(top)["own"]):
        helps += [one.format_help() for one in (parser, *commands_of(parser).values())]
        assert all(
            f"  {name:10}{summary_of(one)}\n" in f"{parser.format_help()}\n" for name, one in commands_of(parser).items()
        )
    assert max(len(line) for text in helps for line in text.splitlines()) <= 80


@pytest.mark.gpu
def test_curve_runs_on_the_gpu(rows):
    on_gpu = rows(*FAST, "--sparsity", "0.3", "--device", "cuda")
    on_cpu = rows(*FAST, "--sparsity", "0.3")
    assert [point["accuracy"] for point in on_gpu] == pytest.approx([point["accuracy"] for point in on_cpu], abs=0.05)
