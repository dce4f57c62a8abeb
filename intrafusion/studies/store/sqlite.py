"""Where results of studies are kept: one SQLite file, shared by every process that opens it.

A result is stored once, under the key of what it depends on: its spec as far as it matters, its network, its images and the
code, so that it is never computed again. What other code has stored stays listed, but answers nothing. WAL with
synchronous=NORMAL: a killed process loses nothing that `put` returned from; after a power cut the last results may be
missing, and the file is sound. The file belongs on a local disk: WAL does not work over a network.
"""

import hashlib
import json
import math
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from intrafusion.errors import IntrafusionError
from intrafusion.runtime.code_digest import code_version
from intrafusion.runtime.paths import store_path
from intrafusion.runtime.processes import birth, host, is_running
from intrafusion.spec import PruneSpec
from intrafusion.studies.measurement import Result
from intrafusion.studies.relevant_fields import own_code, relevant, trains
from intrafusion.studies.store.schema import BEHIND, FORMAT, open_store, plain_database_errors, transaction

VOID_AFTER = 60.0  # seconds without a heartbeat that end a claim
BEAT = 15.0  # seconds between two of them
_MEASURED = tuple(f.name for f in fields(Result) if f.name not in ("spec", "interval", "older_code"))  # a column each
_TOLD = ("weights", "data_path", "limit", "calibration", "training")  # fields that the fingerprints stand for
_BATCH = 500  # keys of one query: SQLite takes no more than 999 in its older builds


@dataclass(frozen=True)
class Origin:
    """What a point was measured on. model, data: fingerprints (hex) of network and images; device: in words, as "cpu"."""

    model: str
    data: str
    device: str

    @property
    def kind(self) -> str:
        """The kind of device: "cpu", "cuda" for all that have another name."""
        return self.device if self.device in ("cpu", "mps") else "cuda"


@dataclass(frozen=True)
class StudyRow:
    """A stored study and how far it is. text: its TOML; created: ISO 8601, UTC; seconds: what its points took, summed.

    points: all of them, of which `done` are measured on all their images, `partial` on the first of them, and `failed`
    have a failure recorded (a partial one may have failed, too). devices: where they were measured. older: results of its
    points that other versions of the code have measured.
    """

    name: str
    text: str
    created: str
    points: int
    done: int
    partial: int
    failed: int
    seconds: float
    devices: tuple[str, ...]
    older: int = 0


def point_key(spec: PruneSpec, origin: Origin) -> str:
    """The name of a point in every store: SHA-256 (hex) of what its result depends on.

    That is what is relevant of its spec, the fingerprints, the code's version, and the kind of device where its recovery
    trains: elsewhere a device changes no answer. Paths and numbers of images are left out, as the fingerprints say what the
    files hold and which images are looked at: a moved file is still known, and a limit above all images is none.
    """
    spec = relevant(spec)
    known = {name: value for name, value in spec.to_dict().items() if name not in _TOLD}
    device = origin.kind if trains(spec) else None
    text = json.dumps([known, origin.model, origin.data, device, code_version(), own_code(spec)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """Results, studies and claims in one file, created where there is none; for any number of threads and processes.

    path: None for `store_path`. wait: seconds of patience with another process's lock. Every problem with the file is
    an IntrafusionError of one line; what was stored before stays, and the store can be used again once it is solved.
    """

    def __init__(self, path: Path | str | None = None, wait: float = 10.0):
        self.path = (store_path() if path is None else Path(path)).absolute()
        self.wait = wait
        self._lock, self._listing = threading.RLock(), threading.Lock()
        self._token = secrets.token_hex(8)
        self._held: set[str] = set()
        self._heart: threading.Thread | None = None
        self._closed = threading.Event()
        self.measured: dict[str, int] = {}  # images of each point whose result was stored through this object, by key
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        with plain_database_errors(self.path, self.wait):
            self._db = open_store(self.path, self.wait)
            self._lister = open_store(self.path, self.wait)
            self._file = os.stat(self.path)

    def is_there(self) -> bool:
        """Whether the file is still the one that was opened: it may have been removed, or another put in its place."""
        try:
            return os.path.samestat(os.stat(self.path), self._file)
        except OSError:
            return False

    def close(self) -> None:
        """Release all claims and close the file; a second time does nothing."""
        self._closed.set()
        with self._lock:
            with suppress(IntrafusionError):  # a claim that cannot be released ends with the process
                self.release_all()
            self._db.close()
        with self._listing:
            self._lister.close()

    def get(self, points: Iterable[tuple[PruneSpec, Origin]]) -> dict[PruneSpec, Result]:
        """The stored results among `points`, complete or not, under the specs as asked."""
        asked = [(spec, point_key(spec, origin)) for spec, origin in points]
        keys = list({key for _, key in asked})
        found: dict[str, sqlite3.Row] = {}
        with self._read() as db:
            for start in range(0, len(keys), _BATCH):
                batch = keys[start : start + _BATCH]
                marks = ",".join("?" * len(batch))
                found |= {row["key"]: row for row in db.execute(f"SELECT * FROM points WHERE key IN ({marks})", batch)}
        return {spec: _result(spec, found[key]) for spec, key in asked if key in found}

    def put(self, result: Result, origin: Origin) -> None:
        """Store a result; one that is there already gives way only to more images. Forgets that the point had failed."""
        key, (low, high) = point_key(result.spec, origin), result.interval
        row = {"key": key, "spec": result.spec.key(), **vars(origin), "version": code_version(), "measured_at": _now()}
        row |= {"low": low, "high": high, **{name: getattr(result, name) for name in _MEASURED}}
        with self._write() as db:
            db.execute(
                f"INSERT INTO points ({', '.join(row)}) VALUES ({', '.join('?' * len(row))}) ON CONFLICT (key) DO UPDATE"
                f" SET {', '.join(f'{name} = excluded.{name}' for name in row)} WHERE excluded.count > points.count",
                tuple(row.values()),
            )
            db.execute("DELETE FROM failures WHERE key = ?", (key,))
        self.measured[key] = result.count

    def fail(self, spec: PruneSpec, origin: Origin, reason: str) -> None:
        """Record that a point could not be measured; a later run tries it again. A complete point does not fail."""
        key = point_key(spec, origin)
        with self._write() as db:
            if not _is_complete(db, key):
                row = key, spec.key(), " ".join(reason.split()), _now()
                db.execute(
                    "INSERT INTO failures VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE"
                    " SET spec = excluded.spec, reason = excluded.reason, failed_at = excluded.failed_at",
                    row,
                )

    def forget(self, points: Iterable[tuple[PruneSpec, Origin]]) -> None:
        """Remove what is known of these points, so that they are measured anew; studies still list them."""
        keys = [(point_key(spec, origin),) for spec, origin in points]
        with self._write() as db:
            for table in ("points", "failures"):
                db.executemany(f"DELETE FROM {table} WHERE key = ?", keys)

    def failures(self, name: str) -> dict[PruneSpec, str]:
        """Why points of a study failed, in study order."""
        query = "SELECT m.spec, reason FROM members m JOIN failures USING (key) WHERE study = ? ORDER BY position"
        with self._read() as db:
            rows = db.execute(query, (_find(db, self.path, name),)).fetchall()
        return {_spec(row["spec"]): row["reason"] for row in rows}

    def claim(self, spec: PruneSpec, origin: Origin, owner: str | None = None) -> bool:
        """Ask to measure a point, so that no other process does: False where another is at it, or has completed it.

        It lasts until it is released, or its process is dead or stands still: a thread of its own gives a sign of life every
        15 s, and a claim without one for 60 s is void, by a clock that nobody sets. owner: tells apart several that share
        this store object; what one holds already, it may claim again.
        """
        key = point_key(spec, origin)
        with self._write() as db:
            row = db.execute("SELECT * FROM claims WHERE key = ?", (key,)).fetchone()
            ours = row is not None and (row["token"], row["owner"]) == (self._token, owner)
            if not ours and (_is_complete(db, key) or (row is not None and _is_held(row))):
                return False
            pid = os.getpid()
            mine = key, self._token, owner, host(), pid, birth(pid), time.time(), time.monotonic()
            db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?, ?, ?, ?)", mine)
            self._held.add(key)
            if self._heart is None:
                self._heart = threading.Thread(target=self._beat_on, daemon=True)
                self._heart.start()
        return True

    def _beat_on(self) -> None:
        while not self._closed.wait(BEAT):
            with suppress(IntrafusionError):  # who writes results hears of it
                self.beat()

    def beat(self) -> None:
        """Renew all our claims."""
        if self._held:
            with self._write() as db:
                now = time.time(), time.monotonic()
                db.execute("UPDATE claims SET beat = ?, steady = ? WHERE token = ?", (*now, self._token))

    def release(self, spec: PruneSpec, origin: Origin) -> None:
        """Give up our claim of a point, if there is one."""
        self._release({point_key(spec, origin)})

    def release_all(self) -> None:
        """Give up all our claims."""
        self._release(set(self._held))

    def _release(self, keys: set[str]) -> None:
        ours = [(key, self._token) for key in keys & self._held]
        if ours:
            with self._write() as db:
                db.executemany("DELETE FROM claims WHERE key = ? AND token = ?", ours)
                self._held -= keys

    def save_study(self, name: str, text: str, points: Sequence[tuple[PruneSpec, Origin]]) -> None:
        """Keep a study: its text and which points are its own, each once. A stored one of this name gives way to it.

        What another version of the code has measured of these points stays in the study, behind them.
        """
        members: dict[PruneSpec, tuple[str, str]] = {}
        for spec, origin in points:
            members.setdefault(_pathless(spec), (point_key(spec, origin), spec.key()))
        with self._write() as db:
            db.execute(
                "INSERT INTO studies (name, text, created) VALUES (?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET text = excluded.text",
                (name, text, _now()),
            )
            study = _find(db, self.path, name)
            older = [(key, members[spec][1]) for key, spec in _older(db, study) if spec in members]
            db.execute("DELETE FROM members WHERE study = ?", (study,))
            rows = [(study, position, *member) for position, member in enumerate(members.values())]
            rows += [(study, position, *member) for position, member in enumerate(older, BEHIND)]
            db.executemany("INSERT INTO members VALUES (?, ?, ?, ?)", rows)

    def studies(self) -> list[StudyRow]:
        """All stored studies, newest first. It waits for nothing that writes, in this process or another."""
        with self._listing, plain_database_errors(self.path, self.wait):
            rows = self._lister.execute("SELECT * FROM studies ORDER BY id DESC").fetchall()
            tallies = self._lister.execute("SELECT * FROM tallies").fetchall()
        of_study: dict[int, list[sqlite3.Row]] = {row["id"]: [] for row in rows}
        for tally in tallies:
            of_study.get(tally["study"], []).append(tally)  # another process may have made a study in between
        return [_study(row, of_study[row["id"]]) for row in rows]

    def study(self, name: str) -> StudyRow:
        """One stored study. Raises IntrafusionError with the names that exist."""
        with self._read() as db:
            study = (_find(db, self.path, name),)
            row = db.execute("SELECT * FROM studies WHERE id = ?", study).fetchone()
            return _study(row, db.execute("SELECT * FROM tallies WHERE study = ?", study).fetchall())

    def results(self, name: str) -> list[Result]:
        """What is measured of a study, in study order, under the specs that the study was saved with.

        What another version of the code has measured is among it, and says so.
        """
        query = "SELECT p.*, m.spec AS asked FROM members m JOIN points p USING (key) WHERE study = ? ORDER BY position"
        with self._read() as db:
            rows = db.execute(query, (_find(db, self.path, name),)).fetchall()
        return [_result(_spec(row["asked"]), row) for row in rows]

    def delete(self, name: str) -> int:
        """Remove a study and those of its points that no other study holds; how many results went."""
        alone = "SELECT key FROM members WHERE study = :study EXCEPT SELECT key FROM members WHERE study != :study"
        with self._write() as db:
            chosen = {"study": _find(db, self.path, name)}
            gone = db.execute(f"DELETE FROM points WHERE key IN ({alone})", chosen).rowcount
            db.execute(f"DELETE FROM failures WHERE key IN ({alone})", chosen)
            db.execute("DELETE FROM studies WHERE id = :study", chosen)
        return gone

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._lock, plain_database_errors(self.path, self.wait):
            yield self._db

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._read() as db, transaction(db, "IMMEDIATE"):
            if not self.is_there():  # SQLite would go on writing into the removed file
                raise IntrafusionError(f"{self.path} was removed while it was open: start again")
            if db.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
                raise IntrafusionError(
                    f"{self.path} was brought to a newer format while it was open: start again, with the newer intrafusion"
                )
            yield db


def _result(spec: PruneSpec, row: sqlite3.Row) -> Result:
    measured = {name: row[name] for name in _MEASURED}
    return Result(spec, interval=(row["low"], row["high"]), older_code=row["version"] != code_version(), **measured)


def _spec(text: str) -> PruneSpec:
    return PruneSpec.from_dict(json.loads(text))


def _older(db: sqlite3.Connection, study: int) -> Iterator[tuple[str, PruneSpec]]:
    """Keys and pathless specs of a study's points that other code has measured, as far as this code can read them."""
    query = "SELECT key, m.spec FROM members m JOIN points p USING (key) WHERE study = ? AND version != ? ORDER BY position"
    for row in db.execute(query, (study, code_version())).fetchall():
        with suppress(IntrafusionError):
            yield row["key"], _pathless(_spec(row["spec"]))


def _pathless(spec: PruneSpec) -> PruneSpec:
    """What is the same spec wherever the files lie."""
    return spec.but(weights=None, data_path=None)


def _study(row: sqlite3.Row, tallies: Sequence[sqlite3.Row]) -> StudyRow:
    """A study from its own row and those of its tallies: counts, by the version of the code and the device."""

    def total(name: str, rows: Iterable[sqlite3.Row] = tallies) -> int:
        return sum(tally[name] for tally in rows)

    ours = [tally for tally in tallies if tally["version"] == code_version()]
    theirs = [tally for tally in tallies if tally["version"] != code_version()]
    return StudyRow(
        row["name"],
        row["text"],
        row["created"],
        points=total("points"),
        done=total("done", ours),
        partial=total("partial", ours),
        failed=total("failed"),
        seconds=max(0.0, math.fsum(tally["seconds"] for tally in tallies)),
        devices=tuple(sorted({tally["device"] for tally in tallies if tally["done"] + tally["partial"]})),
        older=total("done", theirs) + total("partial", theirs),
    )


def _find(db: sqlite3.Connection, path: Path, name: str) -> int:
    """A study's id. Raises IntrafusionError with the names that exist."""
    ids = dict(db.execute("SELECT name, id FROM studies ORDER BY id DESC").fetchall())
    if name not in ids:
        raise IntrafusionError(f"no study {name!r} in {path}: it holds {', '.join(ids) or 'none yet'}")
    return ids[name]


def _is_complete(db: sqlite3.Connection, key: str) -> bool:
    return db.execute("SELECT 1 FROM points WHERE key = ? AND count = total", (key,)).fetchone() is not None


def _is_held(claim: sqlite3.Row) -> bool:
    """Whether the process of a claim may still be at it."""
    if claim["host"] != host():  # whose steady clock began at another moment; the wall clock may be set, either way
        return abs(time.time() - claim["beat"]) <= VOID_AFTER
    return abs(time.monotonic() - claim["steady"]) <= VOID_AFTER and is_running(claim["pid"], claim["born"])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
