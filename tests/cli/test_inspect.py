"""`methods`, `scores` and `plan`: what the pages Importance and Transport show, from the command line."""

import json
import shlex

import pytest
import torch

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.reporting.snippets import plan_line, scores_line


@pytest.fixture
def rows(capsys):
    def call(*words):
        assert main([*words, "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


def hidden(model="digits-mlp", name="1"):
    opened = itf.load_model(model)
    return opened, next(g for g in itf.find_groups(opened, opened.card.example()) if g.name == name)


def test_methods_lists_every_registry(rows):
    listed = rows("methods")
    for kind in ("criterion", "merge", "solver", "recovery"):
        assert [r["name"] for r in listed if r["kind"] == kind] == list(itf.registry(kind))
        assert rows("methods", kind) == [r for r in listed if r["kind"] == kind]
    assert all(row["summary"] and row["needs"] in ("nothing", "images", "labels") for row in listed)
    told = {row["name"]: row for row in rows("methods", "trainer")}
    assert "(reconstructed " in told["sdprun"]["summary"]
    assert "biases and BatchNorm are not shrunk" in told["grda"]["differs"]


@pytest.mark.parametrize(
    ("command", "names"), [("lab", ["sdprun", "smooth-svd"]), ("curve", ["interpolation", "relative", "overparam-sp"])]
)
def test_the_help_of_commands_says_what_is_reconstructed(capsys, command, names):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} (reconstructed)" in told for name in names)


def test_scores_are_the_librarys(rows):
    words = "scores --model digits-mlp --groups 1 --criterion l1 random --sparsity 0.5 --seed 4"
    listed = rows(*words.split())
    model, group = hidden()
    for criterion in ("l1", "random"):
        ours = [row for row in listed if row["criterion"] == criterion]
        scores = itf.score(model, group, criterion, seed=4)
        assert [row["channel"] for row in ours] == list(range(128))
        assert [row["score"] for row in ours] == scores.tolist()
        kept = itf.plan(model, group, scores, 0.5).kept.tolist()
        assert [row["channel"] for row in ours if row["kept"]] == kept
        best = max(ours, key=lambda row: row["score"])
        assert best["rank"] == 1


def test_a_plan_is_the_librarys(rows):
    words = "plan --model digits-mlp --groups 1 --sparsity 0.4 --solver partial --mass 0.7 --distance cosine"
    listed = rows(*words.split())
    model, group = hidden()
    plan = itf.plan(model, group, itf.score(model, group), 0.4, solver="partial", mass=0.7, distance="cosine")
    assert len(listed) == int((plan.coupling > 0).sum())
    column = {int(channel): row for row, channel in enumerate(plan.kept)}
    for row in listed:
        assert row["mass"] == float(plan.coupling[row["channel"], column[row["target"]]])
        assert row["weight"] == float(plan.matrix[column[row["target"]], row["channel"]])
    assert sum(row["mass"] for row in listed) == pytest.approx(0.7)


def test_calibration_images_are_found_without_being_named(rows):
    listed = rows("plan", "--model", "digits-mlp", "--groups", "1", "--cost", "activations", "--calibration", "50")
    model, group = hidden()
    data = itf.load_calibration("digits", limit=50)
    plan = itf.plan(model, group, itf.score(model, group), 0.1, cost="activations", data=data)
    ours = [row for row in listed if row["sparsity"] == 0.1]
    assert sum(row["mass"] * row["cost"] for row in ours) == pytest.approx(plan.total_cost)


@pytest.mark.parametrize("quoted", [
    scores_line(itf.PruneSpec(model="digits-mlp", groups=("1",), sparsity=0.25), ["l1", "l2"]),
    plan_line(itf.PruneSpec(model="digits-mlp", groups=("1",), sparsity=0.25, solver="sinkhorn", reg=0.5)),
])  # fmt: skip
def test_the_lines_that_the_pages_quote_run(rows, quoted):
    program, *words = shlex.split(quoted)
    assert (program, words[:2]) == ("python", ["-m", "intrafusion"])
    listed = rows(*words[2:])
    assert {row["sparsity"] for row in listed} == {0.25}
    assert {row["group"] for row in listed} == {"1"}


def test_tables_are_for_people(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["methods", "solver"]) == 0
    assert "sinkhorn" in capsys.readouterr().out
    assert main(["scores", "--model", "digits-mlp", "--groups", "1", "--sparsity", "0.5"]) == 0
    assert "rank" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "match"), [
    ("plan --model digits-mlp --groups nowhere", "no group 'nowhere'"),
    ("plan --model digits-mlp --solver magic", "unknown solver 'magic'"),
    ("plan --model digits-mlp --cost vibes", "unknown cost 'vibes'"),
    ("plan --model digits-mlp --distance cosine --p 2", "has no p"),
    ("plan --model digits-mlp --cost activations --bias", "include biases"),
    ("plan --model digits-mlp --mass 1.5", "mass must be"),
    ("plan --model digits-mlp --reg 0", "reg must be"),
    ("scores --model digits-mlp --sparsity 1.3", "sparsity must be"),
    ("scores --model digits-mlp --criterion bn_scale", "needs a BatchNorm"),
    ("scores --model digits-mlp --calibration 0", "calibration must be"),
    ("methods vibes", "invalid choice"),
    ("curve --model digits-mlp --cost activations --bias", "include biases"),
])  # fmt: skip
def test_bad_input_is_two_and_one_line(capsys, words, match):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1


def test_missing_calibration_images_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
    assert main(["plan", "--model", "cifar10-resnet20", "--groups", "conv1", "--cost", "activations"]) == 2
    error = capsys.readouterr().err
    assert "cifar10" in error
    assert error.count("\n") == 1
    assert torch.is_grad_enabled()
