"""Errors that nobody expected: one line with an id for the person, the traceback for the developer."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from torch import nn

import intrafusion as itf
from intrafusion._registry import CRITERIA
from intrafusion.cli import main as cli
from intrafusion.cli.main import main
from intrafusion.errors import is_of_network, reason
from intrafusion.evaluation.accuracy import evaluate

ID = r"\(id ([0-9a-f]{8}); its traceback (.+)\)"


class Panic(BaseException):
    """What libraries in Rust raise is no Exception."""


def raising(error: BaseException):
    def run(*_, **__):
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [TypeError("odd\nin two lines"), AssertionError(), KeyError("x"), RecursionError("deep"), Panic("at x.rs:1")],
)
class TestOfACommand:
    def test_it_is_one_line_with_an_id_and_the_log_has_the_traceback(self, error, monkeypatch, capsys, caplog):
        monkeypatch.setitem(CRITERIA, "l1", replace(CRITERIA["l1"], function=raising(error)))
        assert main(["scores", "--model", "digits-mlp", "--json"]) == 1
        out, err = capsys.readouterr()
        words = str(error).split("\n")[0] or type(error).__name__
        found = re.fullmatch(f"error: internal error, {type(error).__name__}: {re.escape(words)} {ID}\n", err)
        assert found, err
        assert out == ""
        (record,) = [r for r in caplog.records if r.message == "error"]
        assert (record.fields["id"], record.exc_info[1]) == (found[1], error)

    def test_wherever_it_happens(self, error, monkeypatch, capsys):
        for place in ("_parser", "start"):
            with monkeypatch.context() as patched:
                patched.setattr(cli, place, raising(error))
                assert main(["models"]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: internal error, ")


class Fussy(nn.Module):
    """Takes one image at a time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        self.card = itf.ModelCard("fussy", (0.5,), (0.5,), (1, 8, 8), 10, "digits")

    def forward(self, x):
        if len(x) > 3:
            raise TypeError("no more than three images")
        return self.layers(x)


class TestOfANetwork:
    def test_it_is_told_from_one_of_ours(self, monkeypatch):
        with pytest.raises(TypeError) as theirs:
            evaluate(Fussy(), itf.load_data("digits"), limit=20)
        assert is_of_network(theirs.value)
        assert reason(theirs.value) == "the network failed: TypeError: no more than three images"
        monkeypatch.setattr(sys.modules["intrafusion.evaluation.accuracy"], "normalise", raising(TypeError("ours")))
        with pytest.raises(TypeError) as ours:
            evaluate(Fussy(), itf.load_data("digits"), limit=3)
        assert reason(ours.value) == "TypeError: ours"

    @pytest.mark.parametrize("made", [ValueError("raised here"), RuntimeError("torch's words")])
    def test_one_without_any_line_of_ours_is_not(self, made):
        with pytest.raises(type(made)) as caught:
            raise made
        assert not is_of_network(caught.value)

    def test_a_layer_of_a_network_counts(self):
        wrong = nn.Sequential(nn.Flatten(), nn.Linear(3, 10))
        wrong.card = Fussy().card
        with pytest.raises(RuntimeError) as caught:
            evaluate(wrong, itf.load_data("digits"), limit=20)
        assert is_of_network(caught.value)


FUSSY = """
from torch import nn

CARD = {"mean": [0.5], "std": [0.5], "input_size": [1, 8, 8], "classes": 10, "dataset": "digits"}


class Fussy(nn.Sequential):
    def forward(self, x):
        if len(x) > 3:
            raise TypeError("no more than three images")
        return super().forward(x)


def make():
    return Fussy(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
"""


@pytest.mark.parametrize("kind", ["", "text"])
def test_a_command_line_shows_no_traceback_unless_it_is_asked_to(tmp_path, kind):
    (tmp_path / "fussy.py").write_text(FUSSY)
    home = tmp_path / "home"
    command = [sys.executable, "-m", "intrafusion", "curve", "--model", "fussy:make", "--sparsity", "0.5", "--json"]
    paths = os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    own = {"INTRAFUSION_HOME": str(home), "INTRAFUSION_LOG": kind, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    for line, merge in zip(lines, ("drop", "fusion"), strict=True):
        said = f"failed: all, l1, 50%, {merge}: the network failed: TypeError: no more than three images {ID}"
        found = re.fullmatch(said, line)
        assert found, line
        if not kind:
            assert found[2] == f"is in {home / 'tracebacks.log'}"
            assert f'id="{found[1]}"' in (home / "tracebacks.log").read_text()
    assert done.returncode != 0
    assert ("Traceback" in done.stderr) == (kind == "text")
    assert (home / "tracebacks.log").exists() == (kind == "")
    if not kind:
        assert 'raise TypeError("no more than three images")' in (home / "tracebacks.log").read_text()
