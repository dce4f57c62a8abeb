"""`landscape`: the plane from the command line, and the line and the Python that the page quotes."""

import contextlib
import io
import json
import shlex

import pytest

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.reporting.snippets import landscape_line, landscape_snippet

SPEC = itf.PruneSpec(model="digits-mlp", groups=("1",), sparsity=0.5, limit=60)


@pytest.fixture
def rows(capsys):
    def call(*words):
        assert main([*words, "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


def test_the_line_that_the_page_quotes_gives_marks_and_every_point_once(rows):
    program, *words = shlex.split(landscape_line(SPEC, 5))
    assert (program, words[:3]) == ("python", ["-m", "intrafusion", "landscape"])
    found = rows(*words[2:])
    assert [row["name"] for row in found if row["kind"] == "mark"] == ["dense", "dropped", "fused"]
    points = [(row["x"], row["y"]) for row in found if row["kind"] == "point"]
    assert len(points) == len(set(points)) == 25
    model = itf.load_model("digits-mlp")
    for row, merge in zip(found[1:3], ("drop", "fusion"), strict=True):
        small = itf.prune(model, model.card.example(), 0.5, merge=merge, groups=["1"])
        assert row["accuracy"] == itf.evaluate(small, itf.load_data("digits"), limit=60).accuracy
        about = row["model"], row["data"], row["groups"], row["criterion"], row["sparsity"], row["count"]
        assert about == ("digits-mlp", "digits", ["1"], "l1", 0.5, 60)


def test_the_snippet_runs():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(landscape_snippet(SPEC, 3), {})
    lines = printed.getvalue().splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["dense", "dropped", "fused"]
    assert "100% of the grid" in lines


def test_the_table_is_for_people(capsys):
    assert main([*shlex.split(landscape_line(SPEC, 3))[3:]]) == 0
    out = capsys.readouterr().out
    assert "dropped" in out
    assert "60 digits images" in out


def test_the_other_views_give_the_rows_that_the_page_saves(rows):
    given = ("--model", "digits-mlp", "--sparsity", "0.5", "--limit", "20", "--training", "100")
    path = rows("landscape", "path", *given, "--ends", "dense", "dropped", "--epochs", "0.5", "--rate", "0.01")
    answers, sharp = rows("landscape", "answers", *given), rows("landscape", "directions", *given)
    right = [sum(row[name] == row["class"] for row in answers) / 20 for name in ("dense", "dropped")]
    assert [path[place][f"{way}_accuracy"] for place in (0, -1) for way in ("line", "curve")] == [
        right[0], right[0], right[1], right[1],
    ]  # fmt: skip
    assert len(path) == 61
    shares = {row["name"]: row["value"] for row in sharp if row["kind"] == "share"}
    assert {"dropped", "fused"} <= shares.keys()
    assert all(0 <= share <= 1 for share in shares.values())


@pytest.mark.parametrize(("words", "match"), [
    ("nowhere", "unknown view 'nowhere'; choose one of plane, path"),
    ("path --ends dense kept/nobody", "nobody"),
    ("path --ends dense", "--ends"),
    ("--size 1", "size must be 2 to 1,001"),
    ("--size many", "many"),
    ("--margin -1", "margin from 0"),
    ("--margin nan", "margin from 0"),
    ("--merge drop", "leave --merge out"),
    ("--sparsity 0.1 0.2", "one value"),
    ("--criterion l1 l2", "one value"),
    ("--sparsity 0", "nothing was pruned"),
    ("--sparsity 1.5", "1.5"),
    ("--groups nowhere", "no group 'nowhere'"),
    ("--criterion luck", "luck"),
    ("--limit 0", "limit"),
    ("--device banana", "banana"),
    ("--data mnist", "mnist"),
])  # fmt: skip
def test_bad_input_is_two_and_one_line(capsys, words, match):
    assert main(["landscape", *words.split(), "--model", "digits-mlp", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert match in captured.err
