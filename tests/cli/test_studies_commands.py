import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.studies import sweeps as engine
from intrafusion.studies.measurement import run_spec
from intrafusion.studies.session import open_session
from intrafusion.studies.store import sqlite as stores
from intrafusion.studies.store.sqlite import Store
from intrafusion.studies.study_file import Study

FAST = ["sweep", "--model", "digits-mlp", "--limit", "20"]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs a command that succeeds; its stdout and stderr."""

    def call(*words: str) -> tuple[str, str]:
        capsys.readouterr()
        assert main(words) == 0, capsys.readouterr().err
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out, captured.err

    return call


@pytest.fixture
def rows(said) -> Callable[..., list[dict]]:
    """Runs a command with --json; the objects, one a line."""
    return lambda *words: [json.loads(line) for line in said(*words, "--json")[0].splitlines()]


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that cannot work: 2, nothing on stdout and one line on stderr, which is given back."""

    def call(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ")
        return line

    return call


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[itf.PruneSpec]:
    """The specs that were really measured."""
    specs: list[itf.PruneSpec] = []

    def counting(spec, *rest, measure=engine.measure):
        specs.append(spec)
        return measure(spec, *rest)

    monkeypatch.setattr(engine, "measure", counting)
    return specs


def points(rows: list[dict]) -> list[tuple]:
    """What tells the rows apart, in no order."""
    return sorted((str(row["groups"]), row["criterion"], row["merge"], row["sparsity"], row["seed"]) for row in rows)


def study_file(
    path: str = "study.toml", axes: str = 'groups = ["each"]\nsparsity = [0.2, 0.5]', top: str = 'name = "mine"'
) -> str:
    Path(path).write_text(f'{top}\n[base]\nmodel = "digits-mlp"\nlimit = 20\n[axes]\n{axes}\n')
    return path


class TestSweep:
    def test_lists_and_ranges_cross(self, rows):
        found = rows(*FAST, "--groups", "1", "1+3", "--sparsity", "0.1", "0.2:0.4:0.1", "--merge", "drop", "--seed", "0:1")
        assert points(found) == sorted(
            (str(groups), "l1", "drop", sparsity, seed)
            for groups in (["1"], ["1", "3"])
            for sparsity in (0.1, 0.2, 0.3, 0.4)
            for seed in (0, 1)
        )
        assert {(row["model"], row["data"], row["count"], row["total"]) for row in found} == {("digits-mlp", "digits", 20, 20)}

    def test_defaults_are_each_group_alone_dropped_and_fused(self, rows):
        expected = sorted((str([g]), "l1", m, s, 0) for g in "13" for m in ("drop", "fusion") for s in (0.1, 0.3, 0.5))
        assert points(rows(*FAST)) == expected

    def test_points_are_what_run_measures(self, rows):
        (row,) = rows(*FAST, "--groups", "3", "--sparsity", "0.6", "--merge", "fusion", "--bias", "true", "--p", "2")
        spec = itf.PruneSpec(model="digits-mlp", limit=20, groups=("3",), sparsity=0.6, bias=True, p=2)
        alone = run_spec(spec, open_session(spec)).to_row()
        assert row | {"seconds": 0} == json.loads(json.dumps(alone)) | {"seconds": 0}

    def test_file(self, rows):
        found = rows("sweep", "--file", study_file())
        assert points(found) == sorted((str([g]), "l1", "fusion", s, 0) for g in "13" for s in (0.2, 0.5))

    def test_flags_go_before_what_the_file_says(self, rows):
        file = study_file(axes='groups = ["each"]\nsparsity = [0.2, 0.5]\nmerge = ["drop", "fusion"]')
        found = rows("sweep", "--file", file, "--groups", "1", "--merge", "drop", "--seed", "1:2", "--limit", "10")
        assert points(found) == [("['1']", "l1", "drop", s, seed) for s in (0.2, 0.5) for seed in (1, 2)]
        assert {row["total"] for row in found} == {10}

    @pytest.mark.parametrize(("given", "groups"), [("1", {"['1']"}), ("each", {"['1']", "['3']"}), ("1+3", {"['1', '3']"})])
    def test_groups_go_before_a_file_that_names_none(self, rows, given, groups):
        found = rows("sweep", "--file", study_file(axes="sparsity = [0.2]"), "--groups", given)
        assert {str(row["groups"]) for row in found} == groups

    def test_table_is_for_people(self, said):
        out, err = said(*FAST, "--sparsity", "0.25", "--groups", "1", "1+3", "--name", "a name", "--seed", "0", "1")
        for cell in ("study 'a name'", "studies.sqlite", "1+3", "25%", "fusion", "seed", "96/128"):
            assert cell in out
        assert err.splitlines() == ["8 points: 0 from the store, 8 measured"]

    def test_name_is_given_read_or_made(self, said, rows):
        said("sweep", "--file", study_file(), "--name", "given")
        said("sweep", "--file", study_file())
        said(*FAST, "--sparsity", "0.1")
        said(*FAST, "--sparsity", "0.2")
        said(*FAST, "--sparsity", "0.1")
        names = [row["name"] for row in rows("studies", "list")]
        assert sorted(names, key=len)[:2] == ["mine", "given"]
        assert len(set(names)) == len(names) == 4
        assert sum(name.startswith("digits-mlp-") for name in names) == 2

    def test_decide_stops_where_the_difference_is_clear(self, rows, said, monkeypatch):
        monkeypatch.setattr("intrafusion.evaluation.incremental.Meter._probe", lambda meter, network: 50)
        words = [
            "sweep",
            "--model",
            "digits-resnet",
            "--limit",
            "all",
            "--groups",
            "all",
            "--sparsity",
            "0.3",
            "--decide",
        ]
        found = rows(*words)  # 10 % where dropped, 88 % where fused
        assert [(row["count"], row["total"]) for row in found] == [(100, 597)] * 2
        _, err = said(*words)
        assert err.splitlines() == ["2 points: 2 from the store, 0 measured, 2 decided early"]
        assert {row["count"] for row in rows(*words[:-1])} == {597}

    def test_decision_may_stand_in_the_file(self, rows, monkeypatch):
        monkeypatch.setattr("intrafusion.evaluation.incremental.Meter._probe", lambda meter, network: 50)
        Path("d.toml").write_text(Study("d", itf.PruneSpec(limit=None), {"merge": ("drop", "fusion")}, True).to_toml())
        assert [row["count"] for row in rows("sweep", "--file", "d.toml")] == [100, 100]

    def test_failures_are_told_and_the_others_go_on(self, capsys, said, monkeypatch):
        def breaking(spec, *rest, measure=engine.measure):
            if spec.groups == ("3",):
                raise RuntimeError("no memory\nat all")
            return measure(spec, *rest)

        monkeypatch.setattr(engine, "measure", breaking)
        monkeypatch.setattr("intrafusion.runtime.log.unexpected", lambda *_, **__: "id")
        words = [*FAST, "--merge", "drop", "--sparsity", "0.2"]
        assert main([*words, "--name", "half"]) == 1
        out, err = capsys.readouterr()
        assert "failed: 3, l1, 20%, drop: RuntimeError: no memory (id id; its traceback is in the log)\n" in err
        assert err.splitlines()[-1] == "2 points: 0 from the store, 1 measured, 1 failed"
        assert "96/128" not in out
        assert "1 of 2 points complete, 0 partial, 1 failed" in said("studies", "show", "half")[0]
        assert "failed: 3, l1, 20%, drop: RuntimeError: no memory" in said("studies", "show", "half")[1]
        assert main([*words, "--groups", "3"]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == "1 points: 0 from the store, 0 measured, 1 failed"

    def test_a_curve_with_a_failed_point_says_how_many_and_ends_with_1(self, capsys, monkeypatch):
        def breaking(spec, *rest, measure=engine.measure):
            if spec.merge == "fusion":
                raise RuntimeError("no plan")
            return measure(spec, *rest)

        monkeypatch.setattr(engine, "measure", breaking)
        monkeypatch.setattr("intrafusion.runtime.log.unexpected", lambda *_, **__: "id")
        words = ["curve", "--model", "digits-mlp", "--limit", "20", "--merge", "drop", "fusion", "--json"]
        assert main([*words, "--sparsity", "0.2", "0.4"]) == 1
        out, err = capsys.readouterr()
        assert [json.loads(line)["merge"] for line in out.splitlines()] == ["drop", "drop"]
        assert err.splitlines()[-1] == "4 points: 0 from the store, 2 measured, 2 failed"


class TestStored:
    def test_a_second_run_measures_nothing_and_says_so(self, said, rows, measured):
        first = rows(*FAST)
        assert len(measured) == 12
        out, err = said(*FAST, "--json")
        assert len(measured) == 12
        assert sorted(map(json.loads, out.splitlines()), key=str) == sorted(first, key=str)
        assert err.splitlines() == ["12 points: 12 from the store, 0 measured"]

    def test_a_larger_study_measures_what_is_new(self, said, measured):
        said(*FAST, "--sparsity", "0.1", "0.3")
        measured.clear()
        _, err = said(*FAST, "--sparsity", "0.1:0.4:0.1", "--seed", "0")
        assert err.splitlines() == ["16 points: 8 from the store, 8 measured"]
        assert {spec.sparsity for spec in measured} == {0.2, 0.4}

    def test_curve_reads_what_sweep_stored_and_the_other_way(self, rows, said, measured):
        swept = rows(*FAST, "--groups", "all", "--sparsity", "0.1", "0.3")
        measured.clear()
        curve = rows("curve", *FAST[1:], "--sparsity", "0.1", "0.3", "0.5")
        assert {spec.sparsity for spec in measured} == {0.5}
        assert sorted((row for row in curve if row["sparsity"] < 0.5), key=str) == sorted(swept, key=str)
        _, err = said(*FAST, "--groups", "all")
        assert err.splitlines() == ["6 points: 6 from the store, 0 measured"]

    def test_no_resume_measures_anew(self, said, measured):
        said(*FAST)
        said(*FAST, "--no-resume", "--groups", "1")
        assert len(measured) == 12 + 6
        assert said(*FAST)[1].startswith("12 points: 12 from the store")

    def test_what_cannot_run_forgets_and_keeps_nothing(self, said, complaint, rows):
        said(*FAST, "--name", "good")
        for bad in (["--groups", "1", "nine"], ["--merge", "drop", "melt"], ["--solver", "guess"]):
            complaint(*FAST, "--no-resume", "--name", "bad", *bad)
        assert [row["name"] for row in rows("studies", "list")] == ["good"]
        assert said(*FAST)[1].startswith("12 points: 12 from the store")

    def test_store_is_where_it_is_said(self, said, rows, tmp_path):
        said(*FAST, "--store", "here.sqlite", "--name", "here")
        said(*FAST, "--name", "there")
        assert [row["name"] for row in rows("studies", "list", "--store", "here.sqlite")] == ["here"]
        assert [row["name"] for row in rows("studies", "list")] == ["there"]
        with Store(tmp_path / "here.sqlite") as store:
            assert len(store.results("here")) == 12

    def test_points_that_cannot_differ_are_measured_once(self, said, rows, measured):
        study = [
            *FAST,
            "--merge",
            "drop",
            "fusion",
            "--groups",
            "1",
            "--sparsity",
            "0.3",
            "--p",
            "1",
            "2",
            "--name",
            "two",
        ]
        found, err = said(*study, "--json")
        assert err.splitlines() == ["4 points: 0 from the store, 4 measured"]
        assert sorted((spec.merge, spec.p) for spec in measured) == [("drop", 1), ("fusion", 1), ("fusion", 2)]
        assert len(found.splitlines()) == len(rows("studies", "show", "two")) == 4
        assert said(*study)[1].splitlines() == ["4 points: 4 from the store, 0 measured"]

    def test_memory_changes_no_answer(self, rows):
        found = [rows(*FAST, "--no-resume", "--memory", memory) for memory in ("0", "1", "1000")]
        without = [[{k: v for k, v in row.items() if k != "seconds"} for row in some] for some in found]
        assert without[0] == without[1] == without[2]


class TestStudies:
    @pytest.fixture(autouse=True)
    def _study(self, said) -> None:
        said("sweep", "--file", study_file())

    def test_list(self, said, rows):
        said(*FAST, "--name", "a second", "--sparsity", "0.1")
        first, second = rows("studies", "list")
        assert (first["name"], first["points"]) == ("a second", 4)
        assert second | {"name": "mine", "points": 4, "done": 4, "partial": 0, "failed": 0, "devices": "cpu"} == second
        out, err = said("studies", "list")
        assert "a second" in out
        assert err == ""

    def test_list_of_none(self, said):
        out, err = said("studies", "list", "--store", "empty.sqlite")
        assert out == ""
        assert "no studies in" in err
        assert said("studies", "list", "--store", "empty.sqlite", "--json") == ("", "")

    def test_show(self, said, rows):
        out, err = said("studies", "show", "mine")
        assert "mine: 4 of 4 points complete, 0 partial, 0 failed" in out
        assert 'name = "mine"' in err
        assert out.count("fusion") == 4
        assert rows("studies", "show", "mine") == rows("sweep", "--file", "study.toml")

    def test_export_to_csv(self, said, rows):
        said("studies", "export", "mine", "--out", "t.csv")
        table = pd.read_csv("t.csv", dtype={"groups": str})
        expected = rows("studies", "show", "mine")
        assert list(table["groups"]) == ["1", "1", "3", "3"]
        for name in ("accuracy", "low", "high", "count", "params", "macs", "sparsity", "merge", "seed", "seconds"):
            assert list(table[name]) == [row[name] for row in expected], name
        assert said("studies", "export", "mine")[0] == Path("t.csv").read_text()

    def test_export_to_parquet(self, said, rows):
        said("sweep", "--file", study_file(axes='groups = ["all", "1", "1+3"]', top='name = "mixed"'))
        said("studies", "export", "mixed", "--out", "t.parquet")
        table = pd.read_parquet("t.parquet")
        assert list(table["groups"]) == ["all", "1", "1+3"]
        assert list(table["accuracy"]) == [row["accuracy"] for row in rows("studies", "show", "mixed")]
        assert "correct" not in table

    def test_exported_file_runs_again_and_reuses_everything(self, said, rows, measured):
        said(*FAST, "--name", 'é 😀 "q"', "--groups", "1+3", "all", "--calibration", "all", "--sparsity", "0.1:0.3:0.1")
        measured.clear()
        said("studies", "export", 'é 😀 "q"', "--out", "t.toml")
        _, err = said("sweep", "--file", "t.toml")
        assert err.splitlines() == ["12 points: 12 from the store, 0 measured"]
        assert measured == []
        assert [row["name"] for row in rows("studies", "list")] == ['é 😀 "q"', "mine"]

    def test_export_of_a_study_without_results(self, said):
        with Store() as store:
            store.save_study("empty", "", [])
        said("studies", "export", "empty", "--out", "t.csv")
        assert Path("t.csv").exists()
        assert "points" in said("studies", "show", "empty")[0]

    def test_results_of_other_code_are_listed_and_marked_and_measured_again(self, said, rows, measured, monkeypatch):
        before = rows("studies", "show", "mine")
        monkeypatch.setattr(stores, "code_version", lambda: "another")
        older = [row | {"older_code": True} for row in before]
        assert rows("studies", "show", "mine") == older
        out, err = said("studies", "show", "mine")
        assert out.count("another version") == 5  # of each row, and of the title
        assert "`sweep` measures their points again" in err
        (row,) = rows("studies", "list")
        assert (row["points"], row["done"], row["other_code"]) == (4, 0, 4)
        measured.clear()
        assert said("sweep", "--file", "study.toml")[1].startswith("4 points: 0 from the store, 4 measured")
        assert len(measured) == 4
        again = rows("studies", "show", "mine")
        assert [row["older_code"] for row in again] == [False] * 4 + [True] * 4
        assert again[4:] == older
        said("studies", "export", "mine", "--out", "t.csv")
        assert list(pd.read_csv("t.csv")["older_code"]) == [False] * 4 + [True] * 4
        (row,) = rows("studies", "list")
        assert (row["points"], row["done"], row["other_code"]) == (4, 4, 4)

    def test_delete(self, said, rows, measured):
        said(*FAST, "--name", "other", "--groups", "1", "--sparsity", "0.2", "--merge", "fusion")  # a point of both
        measured.clear()
        assert said("studies", "delete", "mine")[1] == "deleted 'mine' and 3 points that no other study uses\n"
        assert [row["name"] for row in rows("studies", "list")] == ["other"]
        said("sweep", "--file", "study.toml")
        assert len(measured) == 3

    @pytest.mark.parametrize("action", ["show", "export", "delete"])
    def test_an_unknown_name_is_one_line(self, complaint, action):
        line = complaint("studies", action, "yours")
        assert "yours" in line
        assert "mine" in line
        assert "needs the name" in complaint("studies", action)

    @pytest.mark.parametrize("out", ["t.xlsx", "t", "nowhere/t.csv", "nowhere/t.parquet", "nowhere/t.toml", "folder.csv",
                                     "folder.parquet", "folder.toml"])  # fmt: skip
    def test_a_place_that_cannot_be_written_is_one_line(self, complaint, out):
        for name in ("folder.csv", "folder.parquet", "folder.toml"):
            Path(name).mkdir(exist_ok=True)
        assert out in complaint("studies", "export", "mine", "--out", out)

    def test_unknown_action_is_one_line(self, complaint):
        assert "burn" in complaint("studies", "burn", "mine")


BAD = {
    "file not there": (["sweep", "--file", "nowhere.toml"], "nowhere.toml"),
    "file that is a folder": (["sweep", "--file", "."], "cannot read"),
    "file that is no TOML": (["sweep", "--file", "bad.toml"], "TOML"),
    "axis that is none": (["sweep", "--file", "colour.toml"], "colour"),
    "model as an axis": (["sweep", "--file", "model.toml"], "model"),
    "groups in lists": (["sweep", "--file", "nested.toml"], "groups"),
    "two models": (["sweep", "--model", "digits-mlp", "digits-vgg"], "--model takes one value"),
    "two data": ([*FAST, "--data", "digits", "cifar10"], "--data takes one value"),
    "two weights": ([*FAST, "--weights", "a.pt", "b.pt"], "--weights takes one value"),
    "unknown model": (["sweep", "--model", "lenet"], "lenet"),
    "unknown group": ([*FAST, "--groups", "each", "nine"], "nine"),
    "unknown joined group": ([*FAST, "--groups", "1+nine"], "nine"),
    "output group": ([*FAST, "--groups", "5"], "outputs"),
    "no group": ([*FAST, "--groups", ""], "group"),
    "unknown criterion": ([*FAST, "--criterion", "l1", "luck"], "luck"),
    "unknown merge": ([*FAST, "--merge", "melt"], "melt"),
    "sparsity out of range": ([*FAST, "--sparsity", "0.5:1.0:0.1"], "sparsity"),
    "range without end": ([*FAST, "--sparsity", "0:inf:1"], "sparsity"),
    "range that is empty": ([*FAST, "--sparsity", "0.5:0.1:0.1"], "empty"),
    "not a number": ([*FAST, "--p", "two"], "two"),
    "half a seed": ([*FAST, "--seed", "0.5"], "0.5"),
    "neither true nor false": ([*FAST, "--bias", "maybe"], "maybe"),
    "too many points": ([*FAST, "--seed", "1:1000", "--reg", "1:1000"], "100,000"),
    "flag without a value": ([*FAST, "--sparsity"], "--sparsity"),
    "unknown flag": ([*FAST, "--colour", "red"], "--colour"),
    "no name": ([*FAST, "--name", " "], "name"),
    "name of two lines": ([*FAST, "--name", "a\nb"], "name"),
    "name of no letters": ([*FAST, "--name", "\udcff"], "name"),
    "unknown executor": ([*FAST, "--executor", "cloud"], "cloud"),
    "memory not a number": ([*FAST, "--memory", "much"], "much"),
    "device not there": ([*FAST, "--device", "cuda:99"], "cuda:99"),
    "store that is a folder": ([*FAST, "--store", "."], "folder"),
    "store that is none": ([*FAST, "--store", "bad.toml"], "bad.toml"),
    "data not there": ([*FAST, "--data", "cifar10", "--data-path", "nowhere.npz"], "nowhere.npz"),
    "data for another model": (
        ["sweep", "--model", "cifar10-resnet20", "--weights", "random", "--data", "digits"],
        "cifar10",
    ),
}


@pytest.mark.parametrize(("words", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_two_and_one_line(complaint, words, match):
    Path("bad.toml").write_text("this is = = no TOML, and no database, though it is longer than a hundred characters " * 3)
    study_file("colour.toml", "colour = [1]")
    study_file("model.toml", 'model = ["digits-mlp", "digits-vgg"]')
    study_file("nested.toml", 'groups = [["1", "3"]]')
    assert match in complaint(*words)


def test_cancelling_is_130_and_keeps_what_is_done(capsys, monkeypatch):
    calls = []

    def interrupted(spec, *rest, measure=engine.measure):
        calls.append(spec)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(spec, *rest)

    monkeypatch.setattr(engine, "measure", interrupted)
    assert main([*FAST, "--json"]) == 130
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 4
    assert "cancelled" in captured.err


def test_dataset_follows_the_model(rows, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array([1, 2, 3]))
    (row,) = rows("sweep", "--model", "cifar10-resnet20", "--weights", "random", "--data-path", str(tmp_path / "x.npz"),
                  "--groups", "layer1.0.conv1", "--merge", "drop", "--sparsity", "0.5")  # fmt: skip
    assert (row["data"], row["count"], row["data_path"]) == ("cifar10", 3, str(tmp_path / "x.npz"))
