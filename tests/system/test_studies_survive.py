"""Real processes that are killed, stopped, run at once or run out of disk in the midst of a study."""

import io
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from store_processes import heard, lock_and_wait, process, small_disk
from study_processes import PATIENCE, POINTS, STUDY, check_sound, finished, plain, read, rows_in, started, stored, told, until

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.studies.store.sqlite import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.sqlite"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    rows, counts = finished(tmp_path_factory.mktemp("undisturbed") / "s.sqlite")
    assert counts == (POINTS, 0, POINTS, 0)
    assert len(rows) == POINTS
    return plain(rows)


def test_killed_again_and_again(path, undisturbed):
    """Before its first point, among the first looks, and among the results."""
    printed: dict[str, dict] = {}
    moments: list[Callable[[subprocess.Popen], object]] = [
        lambda process: until(path.exists),
        lambda process: until(lambda: rows_in(path) >= 5),
        lambda process: [lines.append(process.stdout.readline()) for _ in range(20)],
    ]
    for moment in moments:
        lines: list[str] = []
        with started(path) as process:
            moment(process)
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read()  # communicate() would miss what readline() has read ahead
        assert process.returncode == -signal.SIGKILL
        printed |= plain(read("".join(lines) + rest))
        assert printed.items() <= stored(path).items()
        check_sound(path)
    before = stored(path)
    assert 20 <= len(before) < POINTS
    rows, counts = finished(path)
    assert counts == (POINTS, len(before), POINTS - len(before), 0)
    assert plain(rows) == stored(path) == undisturbed
    check_sound(path)


def test_two_at_once_share_the_work(path, undisturbed):
    with started(path) as first, started(path) as second, ThreadPoolExecutor(2) as readers:  # who is not read waits
        outputs = list(readers.map(lambda process: process.communicate(timeout=PATIENCE), (first, second)))
    assert [first.returncode, second.returncode] == [0, 0], outputs
    measured = 0
    for out, err in outputs:
        assert plain(read(out)) == undisturbed
        points, were_stored, ours, others = told(err)
        assert points == were_stored + ours + others == POINTS
        measured += ours
    assert POINTS <= measured <= 1.05 * POINTS
    assert stored(path) == undisturbed
    check_sound(path)


def test_interrupted_from_the_keyboard(path, undisturbed):
    with started(path) as process:
        lines = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGINT)
        rest, err = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    assert err.splitlines() == ["cancelled; the results printed so far are complete"]
    printed, before = plain(read("".join(lines) + rest)), stored(path)
    assert printed.items() <= before.items()
    assert 20 <= len(printed) < POINTS
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM claims").fetchone() == (0,)
    assert before.items() < undisturbed.items()
    rows, counts = finished(path)
    assert counts == (POINTS, len(before), POINTS - len(before), 0)
    assert plain(rows) == undisturbed


def full_disk(folder: Path) -> None:
    """On a disk of 6 MB, of which others leave less than the study needs."""
    path, ballast, few = folder / "s.sqlite", folder / "ballast", ("--limit", "60")  # which one look takes in
    ballast.write_bytes(bytes(5_500_000))
    with started(path, *few) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "free some space" in line
    assert str(path) in line
    printed = plain(read(out))
    assert 0 < len(printed) < POINTS
    ballast.unlink()
    before = stored(path)
    assert printed.items() <= before.items()
    rows, counts = finished(path, *few)
    assert counts == (POINTS, len(before), POINTS - len(before), 0)
    assert plain(rows) == stored(path)
    check_sound(path)


def refused(path: Path) -> str:
    """The one line that the study ends in at once, with nothing printed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main([*STUDY, "--store", str(path)]) == 2
    (line,) = err.getvalue().splitlines()
    assert line.startswith("error: ")
    assert str(path) in line
    assert out.getvalue() == ""
    return line


def test_a_store_locked_by_another_process(path, monkeypatch):
    monkeypatch.setattr(Store.__init__, "__defaults__", (None, 0.1))  # seconds of patience
    with process(lock_and_wait, path) as (_, pipe):
        assert heard(pipe) == "locked"
        assert "locked by another program for more than 0.1 s; close that program" in refused(path)


def read_only_disk(folder: Path) -> None:
    Store(folder / "s.sqlite").close()
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for path in (folder / "s.sqlite", folder / "new.sqlite"):
        assert "is read-only or inaccessible; choose another file for the store" in refused(path)


@pytest.mark.parametrize("scene", [full_disk, read_only_disk])
def test_disks(tmp_path, scene):
    script = f"import sys, test_studies_survive as t; t.{scene.__name__}(t.Path(sys.argv[1]))"
    command = [*small_disk(tmp_path), shlex.join([sys.executable, "-c", script, str(tmp_path)])]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr


def test_a_store_removed_meanwhile(path, undisturbed):
    with started(path) as process:
        lines = [process.stdout.readline() for _ in range(5)]
        path.unlink()
        rest, err = process.stdout.read(), process.stderr.read()
    assert process.returncode == 2
    assert err == f"error: {path} was removed while it was open; start again\n"
    assert plain(read("".join(lines) + rest)).items() <= undisturbed.items()


def test_the_study_is_the_one_that_the_file_says(path, undisturbed):
    """So that the rows above are compared with the right ones."""
    keys = {f"{[g]} {m} {s / 100}" for g in "13" for m in ("drop", "fusion") for s in range(10, 71, 4)}
    assert set(undisturbed) == keys
    assert {row["count"] for row in undisturbed.values()} == {len(itf.load_data("digits"))}
