"""A server's store goes on in memory while its file cannot be used, and brings everything to the file afterwards."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from store_processes import CPU, PATIENCE, complaint, heard, lock_and_wait, points, process, raw, result, small_disk, specs

from intrafusion import PruneSpec
from intrafusion.studies.store import in_memory as module
from intrafusion.studies.store.in_memory import StoreOrMemory
from intrafusion.studies.store.sqlite import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "studies.sqlite"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is tried again whenever it is needed."""
    monkeypatch.setattr(module, "_AGAIN", 0.0)


def check_in_file(path: Path, number: int) -> None:
    with Store(path) as store:
        assert store.get(points(number)) == {spec: result(spec) for spec in specs(number)}
    assert raw(path, "PRAGMA integrity_check") == [("ok",)]


def test_it_is_a_store(path: Path):
    with StoreOrMemory(path) as store, Store(path) as other:
        assert store.claim(PruneSpec(), CPU)
        assert not other.claim(PruneSpec(), CPU)
        store.put(result(PruneSpec()), CPU)
        assert other.get(points(1)) == store.get(points(1)) == {PruneSpec(): result(PruneSpec())}
        assert store.problem is None


@pytest.mark.usefixtures("at_once")
def test_many_at_once_while_locked(path: Path):
    with StoreOrMemory(path, wait=0.05) as store, Store(path) as other:
        assert store.claim_all(points(2)) == set()
        with process(lock_and_wait, path) as (_, pipe):
            assert heard(pipe) == "locked"
            assert store.claim_all(points(3)) == set()
            store.put_all([(result(spec), CPU) for spec in specs(2)], points(2))
            assert "locked by another program" in store.problem
            assert list(store.get(points(3))) == specs(2)
        assert list(store.get(points(3))) == specs(2)
        assert list(other.get(points(3))) == specs(2)
        assert raw(path, "SELECT count(*) FROM claims") == [(0,)]


@pytest.mark.usefixtures("at_once")
def test_locked_by_another_program(path: Path):
    with StoreOrMemory(path, wait=0.05) as store, Store(path) as other:
        assert store.claim(PruneSpec(), CPU)
        with process(lock_and_wait, path) as (_, pipe):
            assert heard(pipe) == "locked"
            assert store.claim(PruneSpec(seed=1), CPU)
            for spec in specs(2):
                store.put(result(spec), CPU)
            store.release(PruneSpec(), CPU)
            store.beat()
            store.fail(PruneSpec(seed=2), CPU, "no")
            assert "locked by another program" in store.problem
            assert list(store.get(points(3))) == specs(2)
            assert not other.get(points(3))
        assert list(store.get(points(3))) == specs(2)
        assert store.problem is None
        assert list(other.get(points(3))) == specs(2)
        assert raw(path, "SELECT count(*) FROM claims") == [(0,)]


def test_a_file_that_could_not_be_used_is_left_alone_for_a_while(path: Path):
    with StoreOrMemory(path, wait=0.05) as store:
        with process(lock_and_wait, path) as (_, pipe):
            assert heard(pipe) == "locked"
            store.put(result(PruneSpec()), CPU)
        store.put(result(PruneSpec(seed=1)), CPU)
        assert raw(path, "SELECT count(*) FROM points") == [(0,)]
        assert store.problem
        store._next = 0.0
        store.beat()
        store.put(result(PruneSpec(seed=2)), CPU)
        assert store.problem is None
    check_in_file(path, 3)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("replaced", [False, True])
def test_removed_while_open(path: Path, replaced: bool):
    with StoreOrMemory(path) as store, Store(path) as plain:
        store.put(result(PruneSpec(seed=7)), CPU)
        for file in path.parent.iterdir():
            file.unlink()
        if replaced:
            with Store(path) as other:
                other.put(result(PruneSpec()), CPU)
        store.put(result(PruneSpec(seed=1)), CPU)
        assert "was removed" in complaint(lambda: plain.put(result(PruneSpec(seed=2)), CPU), path)
        store.claim(PruneSpec(), CPU)
        store.put(result(PruneSpec()), CPU)
        assert store.problem is None
    check_in_file(path, 2)


def fill_the_disk(folder: Path) -> None:
    path, ballast = folder / "studies.sqlite", folder / "ballast"
    module._AGAIN = 0.0
    with StoreOrMemory(path) as store:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        for spec in specs(50):
            assert store.claim(spec, CPU)
            store.put(result(spec), CPU)
            store.release(spec, CPU)
        assert "free some space" in store.problem
        assert list(store.get(points(50))) == specs(50)
        ballast.unlink()
        assert list(store.get(points(50))) == specs(50)
        assert store.problem is None
    check_in_file(path, 50)


def be_read_only(folder: Path) -> None:
    rw, ro = folder / "rw", folder / "ro"
    rw.mkdir()
    ro.mkdir()
    Store(rw / "studies.sqlite").close()
    with Store(rw / "studies.sqlite"):  # keeps the side files there, which a reader needs
        subprocess.run(["mount", "--bind", rw, ro], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", ro], check=True)
        with StoreOrMemory(ro / "studies.sqlite") as store:
            assert store.claim(PruneSpec(), CPU)
            store.put(result(PruneSpec()), CPU)
            assert store.get(points(2)) == {PruneSpec(): result(PruneSpec())}
            assert "is read-only" in store.problem


@pytest.mark.parametrize("scene", [fill_the_disk, be_read_only])
def test_on_small_disks(scene: Callable[[Path], Any], tmp_path: Path):
    script = f"import sys, test_in_memory as t; t.{scene.__name__}(t.Path(sys.argv[1]))"
    command = [*small_disk(tmp_path), shlex.join([sys.executable, "-c", script, str(tmp_path)])]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
