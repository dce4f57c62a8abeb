import os
import random
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from store_processes import (
    CPU,
    PATIENCE,
    SERVER,
    claim_and_wait,
    complaint,
    files,
    heard,
    lock_and_wait,
    points,
    process,
    raw,
    rest,
    result,
    small_disk,
    specs,
)

from intrafusion import PruneSpec
from intrafusion.runtime.paths import store_path
from intrafusion.studies.store import sqlite as stores
from intrafusion.studies.store.schema import FORMAT
from intrafusion.studies.store.sqlite import Origin, Store, point_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "studies.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as store:
        yield store


SERVER.set_forkserver_preload(["intrafusion.studies.store.sqlite"])


class TestPoints:
    def test_every_field_comes_back(self, store: Store, path: Path):
        spec = PruneSpec(groups=("layer1", "layer2"), weights="w.pt", data_path="d", sparsity=0.1, calibration=None)
        kept = result(spec, 60)
        store.put(kept, CPU)
        assert store.get([(spec, CPU)]) == {spec: kept}
        with Store(path) as again:
            assert again.get([(spec, CPU)]) == {spec: kept}

    def test_columns_are_flat_for_any_browser(self, store: Store, path: Path):
        spec = PruneSpec()
        store.put(result(spec), CPU)
        columns = "key, model, data, version, device, accuracy, low, high, count, total, macs, channels_before, seconds"
        assert raw(path, f"SELECT {columns} FROM points") == [
            (point_key(spec, CPU), "ab12", "cd34", stores.code_version(), "cpu", 0.5, 0.4, 0.625, 100, 100, 33, 6, 1.5)
        ]
        assert raw(path, "SELECT spec FROM points") == [(spec.key(),)]
        assert raw(path, "PRAGMA journal_mode") == [("wal",)]

    def test_moved_files_and_another_device_are_known(self, store: Store):
        spec, moved = PruneSpec(weights="a.pt", data_path="here"), PruneSpec(weights="b/a.pt", data_path=None)
        store.put(result(spec), CPU)
        assert store.get([(moved, replace(CPU, device="H200"))]) == {moved: result(moved)}

    @pytest.mark.parametrize(
        ("spec", "origin"),
        [
            (PruneSpec(), replace(CPU, model="ffff")),
            (PruneSpec(), replace(CPU, data="ffff")),
            (PruneSpec(seed=1), CPU),
            (PruneSpec(precision="fast"), CPU),
            (PruneSpec(groups=("layer1",)), CPU),
        ],
    )
    def test_another_point_is_not_known(self, store: Store, spec: PruneSpec, origin: Origin):
        store.put(result(PruneSpec()), CPU)
        assert store.get([(PruneSpec(), CPU)])
        assert not store.get([(spec, origin)])

    def test_points_that_cannot_differ_share_a_row(self, store: Store, path: Path):
        alike = [PruneSpec(merge="drop"), PruneSpec(merge="drop", p=2), PruneSpec(merge="drop", limit=10**9)]
        store.put(result(alike[0]), CPU)
        assert store.get((spec, CPU) for spec in alike) == {spec: result(spec) for spec in alike}
        assert not store.claim(alike[1], CPU)
        assert raw(path, "SELECT count(*) FROM points") == [(1,)]

    def test_what_is_trained_is_of_the_kind_of_device(self, store: Store):
        trained, closed_form = PruneSpec(recovery="finetune"), PruneSpec(recovery="repair")
        for spec in (trained, closed_form):
            store.put(result(spec), replace(CPU, device="NVIDIA H200"))
        assert list(store.get((spec, CPU) for spec in (trained, closed_form))) == [closed_form]
        assert store.get([(trained, replace(CPU, device="another GPU"))])

    def test_more_images_win(self, store: Store):
        for seen, kept in [(40, 40), (30, 40), (40, 40), (100, 100), (60, 100)]:
            store.put(result(PruneSpec(), seen, seconds=float(seen)), CPU)
            (known,) = store.get(points(1)).values()
            assert (known.count, known.seconds) == (kept, kept)
        store.put(result(PruneSpec(), seconds=9.0), CPU)  # as many: the first one stays
        assert store.get(points(1))[PruneSpec()].seconds == 100

    def test_thousands_at_once(self, store: Store):
        kept = specs(1200)
        for spec in kept:
            store.put(result(spec, correct=b"%d" % spec.seed), CPU)
        found = store.get(points(2400))
        assert list(found) == kept
        assert all(one.correct == b"%d" % spec.seed for spec, one in found.items())
        assert store.get([]) == {}

    def test_many_results_and_releases_are_one_transaction(self, store: Store, path: Path):
        first, second, third = specs(3)
        store.claim_all(points(3))
        store.fail(first, CPU, "no")
        store.save_study("s", "", points(3))
        seen: list[str] = []
        store._db.set_trace_callback(seen.append)
        better = [(result(first, 40), CPU), (result(second), CPU), (result(first), CPU), (result(first, 60), CPU)]
        store.put_all(better, [(first, CPU), (second, CPU), (PruneSpec(seed=9), CPU)])
        assert sum(text.startswith("BEGIN") for text in seen) == 1
        assert store.get(points(3)) == {first: result(first), second: result(second)}
        assert store.failures("s") == {}
        assert store.measured.keys() == {point_key(first, CPU), point_key(second, CPU)}
        assert raw(path, "SELECT key FROM claims") == [(point_key(third, CPU),)]
        seen.clear()
        store.put_all([], [(first, CPU)])
        assert seen == []

    def test_default_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
        monkeypatch.delenv("INTRAFUSION_STORE", raising=False)
        assert store_path() == tmp_path / "studies.sqlite"
        monkeypatch.setenv("INTRAFUSION_STORE", str(tmp_path / "deep" / "er" / "my.sqlite"))
        with Store() as store:
            assert store.path == tmp_path / "deep" / "er" / "my.sqlite"
            assert store.path.exists()


class TestOtherCode:
    """Results of another version of the code: "0.1.0" is what all had before it was a digest."""

    @pytest.fixture
    def older(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
        with monkeypatch.context() as before:
            before.setattr(stores, "code_version", lambda: "0.1.0")
            store.save_study("a", "[axes]", points(3))
            for spec in specs(2):
                store.put(result(spec, seconds=1.0), CPU)
            store.put(result(PruneSpec(seed=2), 40, seconds=1.0), CPU)
        return store

    def test_it_is_listed_and_marked_but_answers_nothing(self, older: Store):
        assert not older.get(points(3))
        assert [(one.spec.seed, one.count, one.older_code) for one in older.results("a")] == [
            (0, 100, True), (1, 100, True), (2, 40, True),
        ]  # fmt: skip
        row = older.study("a")
        assert (row.points, row.done, row.partial, row.older, row.seconds) == (3, 0, 0, 3, 3.0)
        assert older.claim(PruneSpec(), CPU)  # so it is measured again

    def test_it_stays_beside_what_is_measured_again(self, older: Store):
        older.save_study("a", "[axes]", points(3)[1:])
        for spec in specs(2):
            older.put(result(spec, seconds=5.0), CPU)
        older.save_study("a", "[axes]", points(3)[1:])
        assert [(one.spec.seed, one.older_code) for one in older.results("a")] == [(1, False), (1, True), (2, True)]
        row = older.study("a")
        assert (row.points, row.done, row.partial, row.older, row.seconds) == (2, 1, 0, 2, 7.0)
        assert older.get(points(3)) == {spec: result(spec, seconds=5.0) for spec in specs(2)}

    def test_it_goes_with_its_study(self, older: Store, path: Path):
        older.save_study("a", "[axes]", points(3))
        assert older.delete("a") == 3
        assert raw(path, "SELECT count(*) FROM points") == [(0,)]

    def test_a_moved_file_is_still_the_same_point(self, older: Store):
        older.save_study("a", "[axes]", [(spec.but(weights="moved.pt"), CPU) for spec in specs(3)])
        assert {one.spec.weights for one in older.results("a")} == {"moved.pt"}
        assert older.study("a").points == 3


class TestFailures:
    def test_listed_until_measured(self, store: Store):
        first, second, third = specs(3)
        store.save_study("a", "", points(2))
        for spec in (second, first, third):
            store.fail(spec, CPU, f"out of\nmemory {spec.seed}")
        assert list(store.failures("a").items()) == [(first, "out of memory 0"), (second, "out of memory 1")]
        assert store.study("a").failed == 2
        store.put(result(first, 40), CPU)
        assert store.failures("a") == {second: "out of memory 1"}
        store.fail(second, CPU, "another reason")
        assert store.failures("a") == {second: "another reason"}

    def test_a_complete_point_does_not_fail(self, store: Store):
        first, second = specs(2)
        store.save_study("a", "", points(2))
        store.put(result(first), CPU)
        store.put(result(second, 40), CPU)
        for spec in (first, second):
            store.fail(spec, CPU, "too late")
        assert list(store.failures("a")) == [second]


class TestStudies:
    def test_rows(self, store: Store):
        first, second, third, fourth = specs(4)
        store.save_study("old", "[axes]", points(4))
        store.save_study("new", "", [])
        store.put(result(third, seconds=2.0), replace(CPU, device="H200"))
        store.put(result(first, seconds=1.0), CPU)
        store.put(result(second, 40, seconds=4.0), CPU)
        store.put(result(PruneSpec(seed=99)), CPU)  # in no study
        store.fail(fourth, CPU, "no")
        new, old = store.studies()
        assert (new.name, new.points, new.done, new.seconds, new.devices) == ("new", 0, 0, 0, ())
        assert (old.name, old.text, old.points, old.done, old.partial, old.failed) == ("old", "[axes]", 4, 2, 1, 1)
        assert (old.seconds, old.devices) == (7, ("H200", "cpu"))
        assert old.created.endswith("+00:00")
        assert store.study("old") == old

    def test_results_in_study_order_under_its_own_paths(self, store: Store):
        a, b, c = (PruneSpec(seed=seed, weights="here.pt") for seed in (3, 1, 2))
        store.save_study("a", "", [(a, CPU), (b, CPU), (c, CPU)])
        for spec in (c, a):
            store.put(result(spec.but(weights="there.pt")), CPU)
        assert store.results("a") == [result(a), result(c)]

    def test_a_point_counts_once(self, store: Store):
        spec = PruneSpec()
        store.save_study("a", "", [(spec, CPU), (spec.but(weights="same.pt"), CPU)])
        store.put(result(spec), CPU)
        assert (store.study("a").points, store.study("a").done) == (1, 1)

    def test_points_that_share_a_row_are_all_listed(self, store: Store):
        alike = [PruneSpec(merge="drop", p=p) for p in (1, 2, 3)]
        store.save_study("a", "", [(spec, CPU) for spec in [*alike, PruneSpec()]])
        store.put(result(alike[1], seconds=2.0), CPU)
        assert store.results("a") == [result(spec, seconds=2.0) for spec in alike]
        row = store.study("a")
        assert (row.points, row.done, row.older, row.seconds) == (4, 3, 0, 2.0)
        store.fail(PruneSpec(p=1.0), CPU, "no memory")
        assert store.failures("a") == {PruneSpec(): "no memory"}
        assert store.delete("a") == 1

    def test_saved_again(self, store: Store):
        store.save_study("a", "one", points(2))
        store.save_study("b", "", [])
        for spec in specs(2):
            store.put(result(spec), CPU)
        store.save_study("a", "two", points(3)[1:])
        assert [row.name for row in store.studies()] == ["b", "a"]
        row = store.study("a")
        assert (row.text, row.points, row.done) == ("two", 2, 1)
        assert len(store.get(points(3))) == 2

    def test_delete_keeps_what_others_hold(self, store: Store):
        store.save_study("a", "", points(3))
        store.save_study("b", "", points(4)[2:])
        for spec in specs(5):
            store.put(result(spec), CPU)
        assert store.delete("a") == 2
        assert [spec.seed for spec in store.get(points(5))] == [2, 3, 4]
        assert [row.name for row in store.studies()] == ["b"]
        assert store.delete("b") == 2
        assert [spec.seed for spec in store.get(points(5))] == [4]

    def test_delete_forgets_failures(self, store: Store):
        store.save_study("a", "", points(1))
        store.fail(PruneSpec(), CPU, "no")
        assert store.delete("a") == 0
        store.save_study("a", "", points(1))
        assert not store.failures("a")

    @pytest.mark.parametrize("ask", [Store.study, Store.results, Store.failures, Store.delete])
    def test_unknown_names_list_the_known(self, store: Store, ask: Callable[[Store, str], Any]):
        assert "none yet" in complaint(lambda: ask(store, "c"), store.path)
        for name in ("a", "b"):
            store.save_study(name, "", [])
        assert "no study 'c'" in complaint(lambda: ask(store, "c"), store.path)
        assert "b, a" in complaint(lambda: ask(store, "c"), store.path)


def write_for_ever(pipe: Connection, path: Path) -> None:
    with Store(path) as store:
        for seed in count():
            spec = PruneSpec(seed=seed)
            store.claim(spec, CPU)
            store.put(result(spec), CPU)
            pipe.send(point_key(spec, CPU))
            store.release(spec, CPU)


def write_many(pipe: Connection, path: Path, start: Any, first: int) -> None:
    start.wait(PATIENCE)
    with Store(path) as store:
        for seed in range(first, first + 200):
            store.put(result(PruneSpec(seed=seed)), CPU)
    pipe.send("done")


def share(pipe: Connection, path: Path, start: Any, step: int, finish: bool) -> None:
    """Claim what nobody else has, from one end of a list; `finish`: measure each and give the claim up."""
    mine = []
    start.wait(PATIENCE)
    with Store(path) as store:
        for spec in specs(200)[::step]:
            if store.claim(spec, CPU):
                mine.append(spec.seed)
                if finish:
                    store.put(result(spec), CPU)
                    store.release(spec, CPU)
        pipe.send(mine)
        pipe.recv()  # holds its claims meanwhile


def claim_for_long(pipe: Connection, path: Path) -> None:
    stores.BEAT = 0.05
    with Store(path) as store:
        pipe.send(store.claim(PruneSpec(), CPU))
        pipe.recv()


class TestTallies:
    """What is counted while rows change is what counting the rows gives."""

    COUNTED = """SELECT count(DISTINCT m.spec), count(DISTINCT CASE WHEN p.version = :ours AND count = total THEN m.spec END),
        count(DISTINCT CASE WHEN p.version = :ours AND count < total THEN m.spec END),
        count(DISTINCT CASE WHEN f.key IS NOT NULL AND position < 4294967296 THEN m.spec END),
        (SELECT total(seconds) FROM points WHERE key IN (SELECT key FROM members WHERE study = :study)),
        count(CASE WHEN p.version != :ours THEN 1 END), group_concat(DISTINCT device)
        FROM members m LEFT JOIN points p USING (key) LEFT JOIN failures f USING (key) WHERE study = :study"""

    def check(self, store: Store) -> None:
        rows = {row.name: row for row in store.studies()}
        assert rows == {name: store.study(name) for name in rows}
        with closing(sqlite3.connect(store.path)) as db:
            for study, name in db.execute("SELECT id, name FROM studies").fetchall():
                counted = db.execute(self.COUNTED, {"ours": stores.code_version(), "study": study}).fetchone()
                row = rows.pop(name)
                found = row.points, row.done, row.partial, row.failed, pytest.approx(row.seconds), row.older
                assert found == counted[:-1]
                assert row.devices == tuple(sorted((counted[-1] or "").split(","))) if counted[-1] else not row.devices
        assert not rows

    @pytest.mark.parametrize("seed", range(4))
    def test_whatever_happens_to_the_rows(self, store: Store, monkeypatch: pytest.MonkeyPatch, seed: int):
        chance = random.Random(seed)
        for _ in range(80):
            version, some = chance.choice("abc"), chance.sample(specs(6), 3)
            some += [some[0].but(weights="elsewhere.pt")]  # the same point twice
            origin = replace(CPU, device=chance.choice(["cpu", "H200"]), model=chance.choice(["ab12", "ef56"]))
            monkeypatch.setattr(stores, "code_version", lambda version=version: version)
            for what in chance.sample(["save", "put", "part", "fail", "forget", "delete"], 2):
                if what == "save":
                    store.save_study(chance.choice("xyz"), "", [(spec, origin) for spec in some])
                elif what in ("put", "part"):
                    seconds, seen = chance.choice([0.5, 2.0]), 100 if what == "put" else chance.choice([20, 40])
                    store.put(result(some[0], seen, seconds=seconds), origin)
                elif what == "fail":
                    store.fail(some[1], origin, chance.choice(["no memory", "another reason"]))
                elif what == "forget":
                    store.forget([(some[2], origin)])
                elif names := [row.name for row in store.studies()]:
                    store.delete(chance.choice(names))
            self.check(store)
        for row in store.studies():
            store.delete(row.name)
        assert raw(store.path, "SELECT * FROM tallies") == []

    def test_listing_waits_for_no_writer(self, store: Store):
        store.save_study("a", "", points(2))
        done = threading.Event()
        with store._lock, closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            listing = threading.Thread(target=lambda: (store.studies(), done.set()))
            listing.start()
            assert done.wait(PATIENCE)
        listing.join(PATIENCE)

    def test_listing_reads_no_points(self, store: Store):
        """Were a study counted row by row, a hundred times the rows would take a hundred times the steps."""
        steps = []
        for size in (10, 1000):
            store.save_study("a", "", points(size))
            seen = [0]
            store._lister.set_progress_handler(lambda seen=seen: seen.append(0), 10)
            store.studies()
            store._lister.set_progress_handler(None, 0)
            steps.append(len(seen))
        assert steps[1] <= steps[0] + 5


class TestProcesses:
    @pytest.mark.parametrize("delay", [0.0, 0.03, 0.1, 0.2, 0.4])
    def test_kill_9_loses_nothing_that_was_stored(self, path: Path, delay: float):
        with process(write_for_ever, path) as (child, pipe):
            told = [heard(pipe)]
            end = time.monotonic() + delay
            while (left := end - time.monotonic()) > 0 and pipe.poll(left):
                told.append(pipe.recv())
            child.kill()
            child.join(PATIENCE)
            told += rest(pipe)
        with Store(path) as store:
            kept = [key for (key,) in raw(path, "SELECT key FROM points")]
            assert len(kept) == len(set(kept))
            assert set(told) <= set(kept)
            assert len(kept) <= len(told) + 1  # the one in flight
            assert raw(path, "PRAGMA integrity_check") == [("ok",)]
            assert store.claim(PruneSpec(seed=len(kept)), CPU)  # it may have been at this one

    def test_two_write_at_once(self, path: Path):
        start = SERVER.Barrier(2)
        with process(write_many, path, start, 0) as (_, one), process(write_many, path, start, 200) as (_, two):
            assert heard(one) == heard(two) == "done"
        with Store(path) as store:
            assert list(store.get(points(400))) == specs(400)

    @pytest.mark.parametrize("finish", [False, True])
    def test_each_point_is_claimed_once(self, path: Path, finish: bool):
        start = SERVER.Barrier(2)
        with process(share, path, start, 1, finish) as (_, one), process(share, path, start, -1, finish) as (_, two):
            assert sorted(heard(one) + heard(two)) == list(range(200))

    def test_claims_end_with_the_process(self, path: Path, store: Store):
        with process(claim_and_wait, path) as (child, pipe):
            assert heard(pipe) is True
            assert not store.claim(PruneSpec(), CPU)
            child.kill()
            child.join(PATIENCE)
            assert store.claim(PruneSpec(), CPU)

    def test_a_claim_lasts_as_long_as_its_point_takes_unless_the_process_stands_still(self, path: Path, store: Store):
        def age() -> float:
            return time.monotonic() - raw(path, "SELECT steady FROM claims")[0][0]

        with process(claim_for_long, path) as (child, pipe):
            assert heard(pipe) is True
            raw(path, "UPDATE claims SET steady = steady - 70")
            patience = time.monotonic() + PATIENCE
            while age() > 60:
                assert time.monotonic() < patience
            assert not store.claim(PruneSpec(), CPU)
            with closing(sqlite3.connect(path, isolation_level=None)) as db:
                db.execute("BEGIN IMMEDIATE")  # so that it does not stand still while it writes
                os.kill(child.pid, signal.SIGSTOP)
                db.execute("UPDATE claims SET steady = steady - 70")
                db.execute("COMMIT")
            assert store.claim(PruneSpec(), CPU)

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells that a process has ended so")
    def test_claims_end_before_the_parent_has_waited(self, path: Path, store: Store):
        script = "import sys, store_processes as t; t.claim_and_wait(t.Pipes(), t.Path(sys.argv[1]))"
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout.readline() == "True\n"
            assert not store.claim(PruneSpec(), CPU)
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its number is still taken
            assert store.claim(PruneSpec(), CPU)

    def test_locked_by_another(self, path: Path):
        with Store(path, wait=0.1) as store:
            store.put(result(PruneSpec()), CPU)
            with process(lock_and_wait, path) as (_, pipe):
                assert heard(pipe) == "locked"
                begin = time.monotonic()
                text = complaint(lambda: store.put(result(PruneSpec(seed=1)), CPU), path)
                assert 0.05 < time.monotonic() - begin < 5
                assert "locked by another program for more than 0.1 s" in text
                assert len(store.get(points(2))) == 1  # reading goes on
            store.put(result(PruneSpec(seed=1)), CPU)
            assert len(store.get(points(2))) == 2

    def test_a_new_file_locked_by_another(self, path: Path):
        with process(lock_and_wait, path) as (_, pipe):
            assert heard(pipe) == "locked"
            assert "locked by another program" in complaint(lambda: Store(path, wait=0.1), path)

    def test_switching_to_wal_is_tried_again(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        class Hasty(sqlite3.Connection):
            """As SQLite is when two processes switch at the same moment: it does not wait."""

            def execute(self, query: str, *values: Any) -> sqlite3.Cursor:
                if "journal_mode" in query and len(tried) < 3:
                    tried.append(query)
                    error = sqlite3.OperationalError("database is locked")
                    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
                    raise error
                return super().execute(query, *values)

        tried: list[str] = []
        connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, **options, factory=Hasty))
        with Store(path):
            assert len(tried) == 3
        tried.clear()
        assert "locked by another program" in complaint(lambda: Store(path, wait=0.0), path)

    def test_waits_for_a_short_lock(self, path: Path, store: Store):
        with process(lock_and_wait, path) as (_, pipe):
            assert heard(pipe) == "locked"
            timer = threading.Timer(0.3, pipe.send, ["go on"])
            timer.start()
            store.put(result(PruneSpec()), CPU)
            timer.join(PATIENCE)
        assert len(store.get(points(1))) == 1


class TestClaims:
    @pytest.fixture
    def other(self, path: Path) -> Iterator[Store]:
        with Store(path) as other:
            yield other

    def test_taken_and_given_up(self, store: Store, other: Store):
        first, second = specs(2)
        assert store.claim(first, CPU)
        assert store.claim(first, CPU)  # ours
        assert not other.claim(first, CPU)
        assert other.claim(second, CPU)
        other.release(first, CPU)  # not theirs to give up
        assert not other.claim(first, CPU)
        store.release(first, CPU)
        assert other.claim(first, CPU)
        assert not store.claim(first, CPU)
        other.release_all()
        assert store.claim(first, CPU)
        assert store.claim(second, CPU)

    def test_many_are_taken_in_one_transaction(self, store: Store, other: Store):
        first, second, third, fourth = specs(4)
        assert other.claim(second, CPU)
        store.put(result(third), CPU)
        seen: list[str] = []
        store._db.set_trace_callback(seen.append)
        assert store.claim_all(points(4)) == {second, third}
        assert sum(text.startswith("BEGIN") for text in seen) == 1
        assert other.claim_all(points(4)) == {first, third, fourth}
        assert store.claim_all(points(4), "another owner") == {first, second, third, fourth}
        assert store.claim_all([]) == set()

    def test_owners_within_one_store(self, store: Store):
        assert store.claim(PruneSpec(), CPU, "one")
        assert store.claim(PruneSpec(), CPU, "one")
        assert not store.claim(PruneSpec(), CPU, "two")

    def test_complete_points_are_not_for_claiming(self, store: Store, other: Store):
        store.put(result(PruneSpec(), 40), CPU)
        assert store.claim(PruneSpec(), CPU)
        store.put(result(PruneSpec()), CPU)
        store.release(PruneSpec(), CPU)
        assert not other.claim(PruneSpec(), CPU)

    def test_end_with_close(self, store: Store, path: Path):
        with Store(path) as other:
            assert other.claim(PruneSpec(), CPU)
        assert store.claim(PruneSpec(), CPU)

    @pytest.mark.parametrize(("seconds", "free"), [(-50, False), (-70, True), (50, False), (70, True)])
    @pytest.mark.parametrize("place", ["here", "elsewhere"])
    def test_end_without_a_heartbeat(self, store: Store, other: Store, path: Path, place: str, seconds: float, free: bool):
        """By the steady clock on the host of both, by the wall clock on another; the other clock does not count there."""
        assert other.claim(PruneSpec(), CPU)
        wrong, told = ("beat", "steady") if place == "here" else ("steady", "beat")
        raw(path, "UPDATE claims SET host = ?" if place == "elsewhere" else "SELECT ?", place)
        raw(path, f"UPDATE claims SET {wrong} = {wrong} - 5000, {told} = {told} + ?", seconds)
        assert store.claim(PruneSpec(), CPU) is free

    def test_beat_keeps_all_of_ours(self, store: Store, other: Store, path: Path):
        first, second, third = specs(3)
        assert other.claim(first, CPU)
        assert other.claim(second, CPU)
        assert store.claim(third, CPU)
        raw(path, "UPDATE claims SET steady = steady - 70")
        other.beat()
        assert not store.claim(first, CPU)
        assert not store.claim(second, CPU)
        assert other.claim(third, CPU)

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells when a process was born")
    def test_a_number_used_again_is_another_process(self, store: Store, other: Store, path: Path):
        assert other.claim(PruneSpec(), CPU)
        raw(path, "UPDATE claims SET born = born - 1")
        assert store.claim(PruneSpec(), CPU)

    def test_another_hosts_processes_are_not_looked_up(self, store: Store, other: Store, path: Path):
        assert other.claim(PruneSpec(), CPU)
        raw(path, "UPDATE claims SET host = 'elsewhere', born = 'then'")
        assert not store.claim(PruneSpec(), CPU)


class TestThreads:
    def test_many_share_a_store(self, store: Store):
        def work(first: int) -> None:
            try:
                for spec in specs(first + 25)[first:]:
                    assert store.claim(spec, CPU)
                    store.put(result(spec), CPU)
                    assert store.get([(spec, CPU)]) == {spec: result(spec)}
                    store.release(spec, CPU)
            except BaseException as error:
                problems.append(error)

        problems: list[BaseException] = []
        threads = [threading.Thread(target=work, args=(25 * number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert problems == []
        assert list(store.get(points(200))) == specs(200)

    def test_close_closes_for_all_of_them(self, path: Path):
        store = Store(path)
        threads = [threading.Thread(target=store.put, args=(result(spec), CPU)) for spec in specs(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        store.close()
        store.close()
        assert [file.name for file in path.parent.iterdir()] == [path.name]  # the last one to close takes WAL's files away
        assert "closed" in complaint(lambda: store.get(points(1)), path)


class TestFiles:
    @pytest.mark.parametrize("content", [b"ab", b"accuracy,count\n0.5,100\n" * 300])
    def test_no_database(self, path: Path, content: bytes):
        path.write_bytes(content)
        assert "is not a study store" in complaint(lambda: Store(path), path)
        assert files(path.parent) == {path.name: content}

    def test_an_empty_file_becomes_a_store(self, path: Path):
        path.touch()
        with Store(path) as store:
            store.put(result(PruneSpec()), CPU)

    def test_another_programs_database(self, path: Path):
        raw(path, "CREATE TABLE bookmarks (address TEXT)")
        before = files(path.parent)
        assert "another program" in complaint(lambda: Store(path), path)
        assert files(path.parent) == before

    def test_a_newer_format(self, path: Path):
        with Store(path) as store:
            store.put(result(PruneSpec()), CPU)
        raw(path, "PRAGMA user_version = 7")
        before = files(path.parent)
        text = complaint(lambda: Store(path), path)
        assert "format 7" in text
        assert f"format {FORMAT}" in text
        assert files(path.parent) == before

    def test_a_newer_format_while_open(self, store: Store, path: Path):
        store.put(result(PruneSpec()), CPU)
        raw(path, "PRAGMA user_version = 7")
        assert "newer format" in complaint(lambda: store.put(result(PruneSpec(seed=1)), CPU), path)
        assert raw(path, "SELECT count(*) FROM points") == [(1,)]

    def test_a_folder(self, tmp_path: Path):
        assert "is a folder" in complaint(lambda: Store(tmp_path), tmp_path)

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path):
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "studies.sqlite"
        assert "INTRAFUSION_STORE" in complaint(lambda: Store(path), path)

    def test_removed_while_open(self, store: Store, path: Path):
        store.put(result(PruneSpec()), CPU)
        path.unlink()
        assert "was removed" in complaint(lambda: store.put(result(PruneSpec(seed=1)), CPU), path)

    @pytest.mark.parametrize("sound", [4096, 16384, 24576])  # bytes at the beginning: of the schema alone, and of rows
    def test_damaged(self, path: Path, sound: int):
        with Store(path) as store:
            for spec in specs(20):
                store.put(result(spec), CPU)
        content = path.read_bytes()
        damaged = content[:sound] + b"\xa5" * (len(content) - sound)
        path.write_bytes(damaged)

        def read() -> None:
            with Store(path) as store:
                store.get(points(20))

        assert "is damaged" in complaint(read, path)
        assert path.read_bytes() == damaged

    def test_a_write_that_breaks_off_leaves_nothing(self, store: Store, path: Path):
        store.save_study("a", "one", points(2))
        broken = [(PruneSpec(), CPU), (PruneSpec(seed=1), replace(CPU, device="cpu"))]
        raw(
            path,
            "CREATE TRIGGER no BEFORE INSERT ON members WHEN NEW.position = 1 BEGIN SELECT RAISE(ABORT, 'no'); END",
        )
        complaint(lambda: store.save_study("a", "two", broken), path)
        raw(path, "DROP TRIGGER no")
        assert (store.study("a").text, store.study("a").points) == ("one", 2)
        store.save_study("a", "two", points(3))  # and the store goes on
        assert store.study("a").points == 3


def fill_the_disk(folder: Path) -> None:
    path, ballast = folder / "studies.sqlite", folder / "ballast"
    ballast.write_bytes(bytes(300_000))
    with Store(path) as store:
        store.save_study("a", "", points(50))
        stored = []

        def fill() -> None:
            for spec in specs(10_000):
                store.put(result(spec), CPU)
                stored.append(spec)

        assert "free some space" in complaint(fill, path)
        assert "free some space" in complaint(lambda: store.save_study("b", "", points(5000)), path)
        assert len(stored) > 50
        assert list(store.get(points(10_000))) == stored
        assert [row.name for row in store.studies()] == ["a"]
        ballast.unlink()
        store.put(result(PruneSpec(seed=10_000)), CPU)
        assert store.delete("a") == 50
    assert raw(path, "PRAGMA integrity_check") == [("ok",)]
    with Store(path) as store:
        assert list(store.get(points(10_001))) == [*stored[50:], PruneSpec(seed=10_000)]


def open_on_a_full_disk(folder: Path) -> None:
    path, ballast = folder / "studies.sqlite", folder / "ballast"
    with Store(path) as store:
        store.put(result(PruneSpec()), CPU)
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert "free some space" in complaint(lambda: Store(path), path)
    assert "free some space" in complaint(lambda: Store(folder / "new.sqlite"), folder)
    ballast.unlink()
    for name, number in [("studies.sqlite", 1), ("new.sqlite", 0)]:
        with Store(folder / name) as store:
            assert len(store.get(points(1))) == number


def write_on_a_read_only_disk(folder: Path) -> None:
    path = folder / "studies.sqlite"
    with Store(path) as store:
        store.put(result(PruneSpec()), CPU)
    before = files(folder)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    assert "is read-only" in complaint(lambda: Store(path), path)
    assert "is read-only" in complaint(lambda: Store(folder / "new.sqlite"), folder)
    assert "INTRAFUSION_STORE" in complaint(lambda: Store(folder / "sub" / "new.sqlite"), folder)
    assert files(folder) == before


def read_on_a_read_only_disk(folder: Path) -> None:
    rw, ro = folder / "rw", folder / "ro"
    rw.mkdir()
    ro.mkdir()
    with Store(rw / "studies.sqlite") as writer:
        writer.put(result(PruneSpec()), CPU)
        subprocess.run(["mount", "--bind", rw, ro], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", ro], check=True)
        with Store(ro / "studies.sqlite") as reader:
            assert reader.get(points(1)) == {PruneSpec(): result(PruneSpec())}
            assert "is read-only" in complaint(lambda: reader.put(result(PruneSpec(seed=1)), CPU), reader.path)


@pytest.mark.parametrize("scene", [fill_the_disk, open_on_a_full_disk, write_on_a_read_only_disk, read_on_a_read_only_disk])
def test_small_disks(scene: Callable[[Path], None], tmp_path: Path):
    script = f"import sys, test_sqlite as t; t.{scene.__name__}(t.Path(sys.argv[1]))"
    command = [*small_disk(tmp_path), shlex.join([sys.executable, "-c", script, str(tmp_path)])]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
