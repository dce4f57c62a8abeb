"""Files of older versions: brought up to date with all that is in them, or left as they were."""

import dataclasses
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from store_processes import CPU, PATIENCE, SERVER, complaint, files, heard, points, process, raw, result, specs

from intrafusion import PruneSpec
from intrafusion.studies.store import sqlite as stores
from intrafusion.studies.store.schema import FORMAT, STAMP, STEPS
from intrafusion.studies.store.sqlite import Store, point_key

FORMAT_1 = """
    CREATE TABLE points (
        key TEXT PRIMARY KEY, spec TEXT NOT NULL, model TEXT NOT NULL, data TEXT NOT NULL, version TEXT NOT NULL,
        device TEXT NOT NULL, accuracy REAL NOT NULL, low REAL NOT NULL, high REAL NOT NULL, count INTEGER NOT NULL,
        total INTEGER NOT NULL, dense_accuracy REAL NOT NULL, params INTEGER NOT NULL, params_before INTEGER NOT NULL,
        macs INTEGER NOT NULL, macs_before INTEGER NOT NULL, channels INTEGER NOT NULL,
        channels_before INTEGER NOT NULL, seconds REAL NOT NULL, measured_at TEXT NOT NULL, correct BLOB NOT NULL);
    CREATE TABLE failures (key TEXT PRIMARY KEY, spec TEXT NOT NULL, reason TEXT NOT NULL, failed_at TEXT NOT NULL);
    CREATE TABLE claims (
        key TEXT PRIMARY KEY, token TEXT NOT NULL, owner TEXT, host TEXT NOT NULL, pid INTEGER NOT NULL,
        born TEXT NOT NULL, beat REAL NOT NULL);
    CREATE TABLE studies (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, text TEXT NOT NULL, created TEXT NOT NULL);
    CREATE TABLE members (
        study INTEGER NOT NULL REFERENCES studies ON DELETE CASCADE, position INTEGER NOT NULL, key TEXT NOT NULL,
        spec TEXT NOT NULL, PRIMARY KEY (study, key));
    CREATE INDEX members_of_point ON members (key);
    PRAGMA application_id = 1769236083;
    PRAGMA user_version = 1;
    PRAGMA journal_mode = WAL
"""
MEASURED, FAILED = specs(300), PruneSpec(seed=300)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file of format 1: 300 results, a failure, a study of all of them, the claim of a process on another machine."""
    path = tmp_path / "studies.sqlite"
    for statement in FORMAT_1.split(";"):
        raw(path, statement)
    written = ["BEGIN"]
    for spec in MEASURED:
        written.append(_insert("points", _row(spec)))
    for position, spec in enumerate([*MEASURED, FAILED]):
        key = point_key(spec, CPU)
        written.append(_insert("members", {"study": 1, "position": position, "key": key, "spec": spec.key()}))
    key = point_key(FAILED, CPU)
    told = {"key": key, "spec": FAILED.key(), "reason": "no memory", "failed_at": "2026-01-01T00:00:00+00:00"}
    claim = {"key": key, "token": "t", "host": "elsewhere", "pid": 1, "born": "1", "beat": 4e9}
    study = {"id": 1, "name": "s", "text": "[axes]", "created": "2026-01-01T00:00:00+00:00"}
    written += [_insert("failures", told), _insert("claims", claim), _insert("studies", study), "COMMIT"]
    _run(path, written)
    return path


def _row(spec: PruneSpec) -> dict[str, Any]:
    fields = {field.name: getattr(result(spec), field.name) for field in dataclasses.fields(result(spec))}
    low, high = fields.pop("interval")
    fields.pop("older_code")
    about = {"key": point_key(spec, CPU), "version": stores.code_version(), "measured_at": "2026-01-01T00:00:00+00:00"}
    return fields | dataclasses.asdict(CPU) | about | {"spec": spec.key(), "low": low, "high": high}


def _insert(table: str, row: dict[str, Any]) -> str:
    values = (f"x'{v.hex()}'" if isinstance(v, bytes) else f"'{v}'" if isinstance(v, str) else repr(v) for v in row.values())
    return f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(values)})"


def _run(path: Path, statements: list[str]) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def check_whole(path: Path) -> None:
    """All that was in the old file is in the new one, under the same names, and it can be written."""
    with Store(path) as store:
        assert store.get(points(301)) == {spec: result(spec) for spec in MEASURED}
        assert store.failures("s") == {FAILED: "no memory"}
        row = store.study("s")
        assert (row.text, row.points, row.done, row.failed, row.older) == ("[axes]", 301, 300, 1, 0)
        assert (row.seconds, row.devices) == (450.0, ("cpu",))
        assert store.results("s") == [result(spec) for spec in MEASURED]
        store.put(result(FAILED), CPU)
        assert store.study("s").done == 301
    assert raw(path, "PRAGMA user_version") == [(FORMAT,)]
    assert raw(path, "PRAGMA integrity_check") == [("ok",)]


def test_an_old_file_is_the_same_as_a_new_one(old: Path, tmp_path: Path):
    Store(old).close()
    with Store(tmp_path / "new.sqlite") as new:
        columns = "SELECT m.type, m.name, p.* FROM sqlite_master m LEFT JOIN pragma_table_info(m.name) p"
        assert raw(old, columns) == raw(new.path, columns)
    assert raw(old, "PRAGMA application_id") == [(STAMP,)]
    check_whole(old)


def test_what_other_code_has_measured_stays_behind_its_points(old: Path):
    row = _row(MEASURED[0]) | {"key": "elsewhere", "version": "another"}
    member = {"study": 1, "position": 301, "key": "elsewhere", "spec": MEASURED[0].key()}
    _run(old, [_insert("points", row), _insert("members", member)])
    with Store(old) as store:
        found = store.study("s")
        assert (found.points, found.done, found.failed, found.older) == (301, 300, 1, 1)
        assert [one.spec for one in store.results("s")] == [*MEASURED, MEASURED[0]]
        assert store.results("s")[-1].older_code


def test_claims_of_old_processes_last_until_they_are_silent(old: Path):
    with Store(old) as store:
        raw(old, "UPDATE claims SET beat = strftime('%s', 'now') - 40")
        assert not store.claim(FAILED, CPU)
        raw(old, "UPDATE claims SET beat = strftime('%s', 'now') - 80")
        assert store.claim(FAILED, CPU)


def migrate_and_stop(pipe: Any, path: Path, at: int) -> None:
    """Bring the file up to date, and stop for ever before the `at`-th of its statements."""

    class Stopping(sqlite3.Connection):
        begun, seen = False, 0

        def execute(self, query: str, *values: Any) -> sqlite3.Cursor:
            self.begun |= query == "BEGIN IMMEDIATE"
            if self.begun:
                self.seen += 1
            if self.seen == at:
                pipe.send(query)
                pipe.recv()
            return super().execute(query, *values)

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **options: connect(*args, **options, factory=Stopping)
    Store(path)
    pipe.send("done")


STATEMENTS = 1 + 3 + sum(map(len, STEPS[1:])) + 2  # BEGIN, a look at the format, the steps, the new format, COMMIT


@pytest.mark.parametrize("at", range(1, STATEMENTS + 1))
def test_killed_before_any_statement_of_a_migration(old: Path, at: int):
    with process(migrate_and_stop, old, at) as (child, pipe):
        assert heard(pipe) != "done"
        child.kill()
        child.join(PATIENCE)
    assert raw(old, "PRAGMA user_version") == [(1,)]
    assert raw(old, "PRAGMA integrity_check") == [("ok",)]
    assert raw(old, "SELECT count(*) FROM points") == [(300,)]
    assert [name for _, name, *_ in raw(old, "PRAGMA table_info(claims)")][-1] == "beat"
    check_whole(old)


def test_a_migration_that_fails_leaves_the_file_as_it_was(old: Path, monkeypatch: pytest.MonkeyPatch):
    before = files(old.parent)
    broken = (STEPS[0], (*STEPS[1], "INSERT INTO nowhere VALUES (1)"))
    monkeypatch.setattr("intrafusion.studies.store.schema.STEPS", broken)
    assert "nowhere" in complaint(lambda: Store(old), old)
    assert files(old.parent) == before
    monkeypatch.undo()
    check_whole(old)


def open_at_once(pipe: Any, path: Path, start: Any) -> None:
    start.wait(PATIENCE)
    with Store(path) as store:
        pipe.send(len(store.get(points(301))))
        pipe.recv()


def test_four_processes_open_an_old_file_at_once(old: Path):
    start = SERVER.Barrier(4)
    with ExitStack() as stack:
        pipes = [stack.enter_context(process(open_at_once, old, start))[1] for _ in range(4)]
        assert [heard(pipe) for pipe in pipes] == [300] * 4
    check_whole(old)
