"""`landscape`: the plane from the command line, and the line and the Python that the page quotes."""

import contextlib
import io
import json
import shlex

import pytest

import intrafusion as itf
from intrafusion.cli import main
from intrafusion.quote import landscape_line, landscape_snippet

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


@pytest.mark.parametrize(("words", "match"), [
    ("--size 1", "a grid needs 2 points"),
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
    assert main(["landscape", "--model", "digits-mlp", *words.split(), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert match in captured.err
