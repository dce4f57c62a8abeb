"""Any flags: a command that does what they say, or one line on stderr and 2."""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import own_files as files
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from intrafusion import reporting
from intrafusion.cli import main, studies
from intrafusion.errors import IntrafusionError
from intrafusion.studies import weight_space
from intrafusion.training import embedded_models
from intrafusion.training.methods import runs

EXAMPLES = int(os.environ.get("INTRAFUSION_EXAMPLES", "12"))  # of each command; more find more
TINY = ["--model", "digits-mlp", "--limit", "5", "--sparsity", "0.3", "--groups", "1"]
COMMANDS: dict[str, list[str]] = {  # each with what makes it quick
    "models": [], "data": [], "data digits": [], "groups": ["--model", "digits-mlp"], "methods": [],
    "scores": TINY, "plan": TINY,
    "curve": TINY, "sweep": TINY, "studies list": [], "studies show x": [], "studies export x": [], "studies delete x": [],
    "landscape": TINY, "prune": [*TINY, "--out", "out"], "train digits-mlp": [], "lab": ["--model", "digits-mlp"],
    "own weights w.pt": ["--model", "digits-mlp", "--name", "x"], "own program p.pt2": ["--name", "x"],
    "own data d.npz": ["--name", "x"], "own list": [], "own remove kept/x": [],
}  # fmt: skip
ODD = (
    "", " ", "-1", "0", "1", "2", "0.5", "nan", "inf", "1e999", "1e-999", "9" * 30, "9" * 5000, "-0", "true", "all",
    "each", "1:5", "0:1:0", "0:1:1e-12", "5:1", "x", "l1", "drop", "digits", "digits-mlp", "digits-nothing", "kept/x",
    "kept/..", "os:getcwd", "os.path:x", "a:b:c", ":", "timm/x", "imagenet/x", "random", "/", ".", "..", "/dev/full",
    "/dev/null", "/proc/self/mem", "/nowhere/x.csv", "out", "w.pt", "d.npz", "study.toml", "x.csv", "x.parquet", "a" *
    9000, "a\x00b", "\udcff.npz", "\udcff", "\n", "a\nb", "cuda", "cuda:9", "mps", "meta", "{", "[[[[", '{"method": 3}',
    "[]", "~nobody/x", "--", "-h", "📉", "٣", "\u202e", "test", "train",
)  # fmt: skip
LEFT_OUT = (
    "--download",
    "--executor",
    "--address",
    "--speed",
    "--file",
    "--decide",
)  # of the network, a cluster, or slow


def options(command: str) -> dict[str, bool]:
    """The flags of a command, and whether each takes a value."""
    parser: Any = main._parser()
    for word in command.split():
        nested = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if nested is None:
            break
        parser = nested.choices[word]
    flags = {flag: action.nargs != 0 for action in parser._actions for flag in action.option_strings}
    return {flag: takes for flag, takes in flags.items() if flag not in LEFT_OUT}


EXPORT, SLICES = reporting.export, weight_space.slices
FLAGS = {command: options(command) for command in COMMANDS}


def nothing(*args: Any, **kwargs: Any) -> Any:
    """What stands for hours of work."""
    raise IntrafusionError("no work in this test")


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("flags")
    files.save_state(folder / "w.pt", files.mlp_state())
    files.npz(folder / "d.npz")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(embedded_models, "make", nothing)
        patched.setattr(runs, "run_training", nothing)
        patched.setattr(reporting, "export", nothing)
        for work in ("slices", "networks_between", "sharpness"):
            patched.setattr(weight_space, work, nothing)
        yield


def run(argv: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr, of streams that encode as a terminal's do."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict")
    told = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with redirect_stdout(out), redirect_stderr(told):
        try:
            status = main.main(argv)
        except SystemExit as end:
            status = 0 if end.code == 0 else -1  # of --help
        sys.stdout.flush()
        sys.stderr.flush()
    return status, *(stream.buffer.getvalue().decode() for stream in (out, told))


def check(argv: list[str]) -> int:
    status, out, told = run(argv)
    assert status in (0, 2), argv
    assert "Traceback" not in told
    if status == 2:
        lines = told.splitlines()
        assert [line.startswith("error: ") for line in lines] == [True], (argv, told)
        assert len(told) < 520
    if "--json" in argv and not {"-h", "--help"} & {*argv} and "export" not in argv:
        for line in out.splitlines():
            assert isinstance(json.loads(line), dict)
    return status


@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_flags_do_what_they_say_or_are_one_line(command, data):
    flags, value = FLAGS[command], st.sampled_from(ODD) | st.text(st.characters(), max_size=8)
    wanted = st.sampled_from([*flags]).flatmap(lambda flag: st.tuples(st.just(flag), *[value] * flags[flag]))
    words = data.draw(
        st.lists(wanted | wanted | wanted | st.tuples(value) | st.tuples(st.sampled_from([*flags]), value, value), max_size=3)
    )
    check([*command.split(), *COMMANDS[command], *(word for group in words for word in group)])


@settings(max_examples=3 * EXAMPLES, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.sampled_from([*{word for command in COMMANDS for word in command.split()}, "-h"]) | st.sampled_from(ODD),
        max_size=4,
    )
)
def test_any_words_are_a_command_or_one_line(words):
    check([word for word in words if word not in ("train", "lab")])


ONE_LINE = [
    ["curve", *TINY, "--device", "cuda:99"], ["curve", *TINY, "--device", "meta"], ["curve", *TINY, "--device", ""],
    ["curve", *TINY, "--limit", "0"], ["curve", *TINY, "--seed", "-1"], ["curve", *TINY, "--seed", "9" * 5000],
    ["curve", *TINY, "--sparsity", "nan"], ["curve", *TINY, "--weights", "."], ["curve", *TINY, "--weights", "a\x00b"],
    ["curve", *TINY, "--data-path", "\udcff"], ["curve", *TINY, "--data", "own", "--data-path", "/dev/null"],
    ["curve", *TINY, "--data", "own", "--data-path", "w.pt"], ["curve", *TINY, "--data", "own", "--data-path", "a\x00b"],
    ["curve", *TINY, "--store", "."], ["curve", *TINY, "--store", "/dev/null/x"], ["curve", *TINY, "--store", "w.pt"],
    ["curve", *TINY, "--store", "a\x00b"], ["curve", *TINY, "--memory", "-1"], ["curve", *TINY, "--memory", "x"],
    ["sweep", *TINY, "--sparsity", "0:1:0"], ["sweep", *TINY, "--file", "."], ["sweep", *TINY, "--file", "a\x00b"],
    ["sweep", *TINY, "--file", "w.pt"], ["sweep", *TINY, "--p", "1e999"], ["sweep", *TINY, "--name", "\udcff"],
    ["sweep", *TINY, "--seed", "0:1e9"], ["studies", "show"], ["studies", "export", "[/x]"],
    ["data", "own", "--data-path", "x" * 9000],
    ["data", "digits", "--split", "val"], ["groups", "--model", "a\x00:b"], ["groups", "--model", "no_such_module:x"],
    ["groups", "--model", "os:nothing"], ["groups", "--model", "os:getcwd"], ["groups", "--model", "kept/../x"],
    ["own", "weights", ".", "--model", "digits-mlp", "--name", "x"], ["own", "data", "/dev/zero", "--name", "x"],
    ["own", "data", "a\x00b", "--name", "x"], ["own", "data", "d.npz", "d.npz", "d.npz", "--name", "x"],
    ["own", "remove", "../x"],
    ["own", "program", "d.npz", "--name", "x", "--mean", "nan"], ["lab", "--model", "digits-mlp", "--spec", "[" * 10**5],
    ["lab", "--model", "digits-mlp", "--spec", '{"part": 3}'], ["prune", *TINY, "--out", "w.pt", "--batch", "-1"],
    ["landscape", *TINY, "--size", "-1"], ["train", "x\ny"], [], ["--model"], ["curve", "--sparsity"], ["\udcff"],
]  # fmt: skip


@pytest.mark.parametrize("argv", ONE_LINE, ids=lambda argv: ascii(" ".join(argv))[:60])
def test_what_cannot_be_is_one_line_and_two(argv):
    assert check(argv) == 2


def test_what_people_name_is_no_markup_of_the_table(tmp_path):
    for name in ("[/x]", "[bold]", "\u202e"):
        assert check(["sweep", *TINY, "--store", str(tmp_path / "s"), "--name", name]) == 0
        assert name in run(["studies", "list", "--store", str(tmp_path / "s")])[1]
        assert check(["studies", "show", name, "--store", str(tmp_path / "s")]) == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    assert check(["sweep", *TINY, "--store", str(tmp_path / "s"), "--name", "x"]) == 0
    for out in ("/nowhere/x.csv", ".", "x.txt", "/dev/null/x.toml", "a\x00.csv", "\udcff/x.parquet"):
        assert check(["studies", "export", "x", "--store", str(tmp_path / "s"), "--out", out]) == 2


def test_a_network_goes_into_no_folder_that_cannot_be(monkeypatch):
    monkeypatch.setattr(reporting, "export", EXPORT)
    for out in ("/proc/x", "/dev/null/x", ".", "w.pt", "x" * 300, "z/" + "y" * 300, "\udcff", "\udcff/y"):
        assert check(["prune", *TINY, "--out", out]) == 2


def test_a_grid_has_bounds(monkeypatch):
    monkeypatch.setattr(weight_space, "slices", SLICES)
    for flags in (
        ["--size", "100000"],
        ["--size", "3", "--margin", "1e308"],
        ["--size", "9" * 99],
        ["--margin", "nan"],
    ):
        assert check(["landscape", *TINY, *flags]) == 2


def test_a_key_press_that_stops_is_no_error(monkeypatch):
    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "_measured", stop)
    status, out, told = run(["curve", *TINY, "--json"])
    assert (status, out) == (130, "")
    assert told == "cancelled; the results printed so far are complete\n"
