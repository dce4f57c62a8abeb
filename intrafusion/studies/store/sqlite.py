"""The store of study results: one SQLite file, shared by every process that opens it.

A result is stored once, under a key of everything it depends on: the relevant part of its spec, its network, its images and
the code. It is therefore never computed again. Results of other versions of the code stay listed but are not reused. The
file uses WAL with synchronous=NORMAL: a killed process loses nothing for which `put` has returned; after a power cut the
last results may be missing, but the file is intact. The file must be on a local disk, because WAL does not work over a
network.
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
from typing import Any, Self

from intrafusion.errors import IntrafusionError
from intrafusion.runtime.code_digest import code_version
from intrafusion.runtime.paths import store_path
from intrafusion.runtime.processes import birth, host, is_running
from intrafusion.spec import PruneSpec
from intrafusion.studies.measurement import Result
from intrafusion.studies.relevant_fields import own_code, relevant, trains
from intrafusion.studies.store.schema import BEHIND, FORMAT, open_store, plain_database_errors, transaction

VOID_AFTER = 60.0  # seconds without a heartbeat after which a claim is void
BEAT = 15.0  # seconds between two heartbeats
_MEASURED = tuple(f.name for f in fields(Result) if f.name not in ("spec", "interval", "older_code"))  # one column each
_TOLD = ("weights", "data_path", "limit", "calibration", "training")  # fields that the fingerprints cover
_COLUMNS = ("key", "spec", "model", "data", "device", "version", "measured_at", "low", "high", *_MEASURED)
_PUT = (
    f"INSERT INTO points ({', '.join(_COLUMNS)}) VALUES ({', '.join(f':{name}' for name in _COLUMNS)}) ON CONFLICT (key)"
    f" DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _COLUMNS)} WHERE excluded.count > points.count"
)
_BATCH = 500  # keys in one query: older builds of SQLite allow at most 999


@dataclass(frozen=True)
class Origin:
    """What a point was measured on.

    model, data: fingerprints (hex) of the network and the images. device: its name, for example "cpu".
    """

    model: str
    data: str
    device: str

    @property
    def kind(self) -> str:
        """The kind of device: "cpu", "mps", "xpu", or "cuda" for any other name."""
        return self.device if self.device in ("cpu", "mps") else "xpu" if "Intel" in self.device else "cuda"


@dataclass(frozen=True)
class StudyRow:
    """A stored study and its progress.

    text: its TOML. created: ISO 8601, UTC. points: number of all points, of which `done` are measured on all their images,
    `partial` on the first of their images, and `failed` have a recorded failure (a partial point may also have failed).
    seconds: total measuring time of its points. devices: where they were measured. older: number of results of its points
    that other versions of the code have measured.
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
    """Return the key of a point, the same in every store: SHA-256 (hex) of everything on which its result depends.

    It covers the relevant part of its spec, the fingerprints, the version of the code, and, if its recovery trains, the kind
    of device; without training the device does not affect the result. Paths and numbers of images are left out, because the
    fingerprints identify the files' contents and the images that are used. A moved file therefore keeps its key, and a limit
    above the number of images is the same as no limit.
    """
    spec = relevant(spec)
    known = {name: value for name, value in spec.to_dict().items() if name not in _TOLD}
    device = origin.kind if trains(spec) else None
    text = json.dumps([known, origin.model, origin.data, device, code_version(), own_code(spec)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """Results, studies and claims in one file, which is created if missing; safe for many threads and processes.

    path: None for `store_path`. wait: seconds to wait for another process's lock. Every problem with the file raises an
    IntrafusionError of one line. Stored data are kept, and the store can be used again once the problem is solved.
    """

    def __init__(self, path: Path | str | None = None, wait: float = 10.0):
        self.path = (store_path() if path is None else Path(path)).absolute()
        self.wait = wait
        self._lock, self._listing = threading.RLock(), threading.Lock()
        self._token = secrets.token_hex(8)
        self._held: set[str] = set()
        self._heart: threading.Thread | None = None
        self._closed = threading.Event()
        self.measured: dict[str, int] = {}  # number of images of each result stored by this object, by point key
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
        """Return whether the file is still the one that was opened; it may have been removed or replaced."""
        try:
            return os.path.samestat(os.stat(self.path), self._file)
        except OSError:
            return False

    def close(self) -> None:
        """Release all claims and close the file. A store may be closed twice."""
        self._closed.set()
        with self._lock:
            with suppress(IntrafusionError):  # claims that cannot be released end with the process
                self.release_all()
            self._db.close()
        with self._listing:
            self._lister.close()

    def get(self, points: Iterable[tuple[PruneSpec, Origin]]) -> dict[PruneSpec, Result]:
        """Return the stored results among `points`, complete or not, by the given specs."""
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
        """Store a result and remove a recorded failure of its point.

        A stored result is replaced only by one on more images.
        """
        self.put_all([(result, origin)])

    def put_all(self, results: Iterable[tuple[Result, Origin]], released: Iterable[tuple[PruneSpec, Origin]] = ()) -> None:
        """Store results like `put`, in order, and release the claims of some points, all in one transaction."""
        rows = [_row(result, origin) for result, origin in results]
        gone = self._ours({point_key(spec, origin) for spec, origin in released})
        if not rows and not gone:
            return
        with self._write() as db:
            for row in rows:
                db.execute(_PUT, row)
                db.execute("DELETE FROM failures WHERE key = ?", (row["key"],))
            self._give_up(db, gone)
        self.measured |= {row["key"]: row["count"] for row in rows}

    def fail(self, spec: PruneSpec, origin: Origin, reason: str) -> None:
        """Record that a point could not be measured; a later run tries it again. Does nothing for a complete point."""
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
        """Delete the results and failures of these points, so that they are measured again; studies still list them."""
        keys = [(point_key(spec, origin),) for spec, origin in points]
        with self._write() as db:
            for table in ("points", "failures"):
                db.executemany(f"DELETE FROM {table} WHERE key = ?", keys)

    def failures(self, name: str) -> dict[PruneSpec, str]:
        """Return the reasons why points of a study failed, by spec, in study order."""
        query = "SELECT m.spec, reason FROM members m JOIN failures USING (key) WHERE study = ? ORDER BY position"
        with self._read() as db:
            rows = db.execute(query, (_find(db, self.path, name),)).fetchall()
        return {_spec(row["spec"]): row["reason"] for row in rows}

    def claim(self, spec: PruneSpec, origin: Origin, owner: str | None = None) -> bool:
        """Claim a point, so that no other process measures it. Returns False if another has claimed or completed it.

        A claim lasts until it is released, or until its process dies or hangs: a thread sends a heartbeat every 15 s, and a
        claim without a heartbeat for 60 s, by the monotonic clock on the same host, is void. owner: distinguishes several
        users of this store object; an owner may claim again a point that it already holds.
        """
        return not self.claim_all([(spec, origin)], owner)

    def claim_all(self, points: Iterable[tuple[PruneSpec, Origin]], owner: str | None = None) -> set[PruneSpec]:
        """Claim points like `claim`, in one transaction. Returns those that another process has claimed or completed."""
        keys = {spec: point_key(spec, origin) for spec, origin in points}
        if not keys:
            return set()
        with self._write() as db:
            pid = os.getpid()
            mine = self._token, owner, host(), pid, birth(pid), time.time(), time.monotonic()
            refused = {spec for spec, key in keys.items() if not self._claims(db, key, mine)}
            self._held |= {key for spec, key in keys.items() if spec not in refused}
            if self._heart is None and len(refused) < len(keys):
                self._heart = threading.Thread(target=self._beat_on, daemon=True)
                self._heart.start()
        return refused

    def _claims(self, db: sqlite3.Connection, key: str, mine: tuple) -> bool:
        """Write the claim of a point unless another process has claimed or completed it. mine: its columns after the key."""
        row = db.execute("SELECT * FROM claims WHERE key = ?", (key,)).fetchone()
        ours = row is not None and (row["token"], row["owner"]) == mine[:2]
        if not ours and (_is_complete(db, key) or (row is not None and _is_held(row))):
            return False
        db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (key, *mine))
        return True

    def _beat_on(self) -> None:
        while not self._closed.wait(BEAT):
            with suppress(IntrafusionError):  # the thread that writes results reports the problem
                self.beat()

    def beat(self) -> None:
        """Renew all claims of this object."""
        if self._held:
            with self._write() as db:
                now = time.time(), time.monotonic()
                db.execute("UPDATE claims SET beat = ?, steady = ? WHERE token = ?", (*now, self._token))

    def release(self, spec: PruneSpec, origin: Origin) -> None:
        """Release the claim of a point, if this object holds it."""
        self._release({point_key(spec, origin)})

    def release_all(self) -> None:
        """Release all claims of this object."""
        self._release(set(self._held))

    def _release(self, keys: set[str]) -> None:
        if ours := self._ours(keys):
            with self._write() as db:
                self._give_up(db, ours)

    def _ours(self, keys: set[str]) -> set[str]:
        with self._lock:
            return keys & self._held

    def _give_up(self, db: sqlite3.Connection, keys: set[str]) -> None:
        db.executemany("DELETE FROM claims WHERE key = ? AND token = ?", [(key, self._token) for key in keys])
        self._held -= keys

    def save_study(self, name: str, text: str, points: Sequence[tuple[PruneSpec, Origin]]) -> None:
        """Store a study: its text and its points without duplicates. It replaces a stored study of this name.

        Results of these points by other versions of the code stay in the study, after the points.
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
        """Return all stored studies, newest first. It does not wait for writers in this or another process."""
        with self._listing, plain_database_errors(self.path, self.wait):
            rows = self._lister.execute("SELECT * FROM studies ORDER BY id DESC").fetchall()
            tallies = self._lister.execute("SELECT * FROM tallies").fetchall()
        of_study: dict[int, list[sqlite3.Row]] = {row["id"]: [] for row in rows}
        for tally in tallies:
            of_study.get(tally["study"], []).append(tally)  # another process may have made a study in between
        return [_study(row, of_study[row["id"]]) for row in rows]

    def study(self, name: str) -> StudyRow:
        """Return one stored study. Raises IntrafusionError with the names that exist if there is none of this name."""
        with self._read() as db:
            study = (_find(db, self.path, name),)
            row = db.execute("SELECT * FROM studies WHERE id = ?", study).fetchone()
            return _study(row, db.execute("SELECT * FROM tallies WHERE study = ?", study).fetchall())

    def results(self, name: str) -> list[Result]:
        """Return the results of a study, in study order, with the specs with which the study was saved.

        Results of other versions of the code are included and have `older_code` set.
        """
        query = "SELECT p.*, m.spec AS asked FROM members m JOIN points p USING (key) WHERE study = ? ORDER BY position"
        with self._read() as db:
            rows = db.execute(query, (_find(db, self.path, name),)).fetchall()
        return [_result(_spec(row["asked"]), row) for row in rows]

    def delete(self, name: str) -> int:
        """Delete a study and those of its points that no other study holds. Returns the number of deleted results."""
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
            if not self.is_there():  # SQLite would keep writing to the removed file
                raise IntrafusionError(f"{self.path} was removed while it was open; start again")
            if db.execute("PRAGMA user_version").fetchone()[0] != FORMAT:
                raise IntrafusionError(
                    f"{self.path} was upgraded to a newer format while it was open; start again with the newer intrafusion"
                )
            yield db


def _result(spec: PruneSpec, row: sqlite3.Row) -> Result:
    measured = {name: row[name] for name in _MEASURED}
    return Result(spec, interval=(row["low"], row["high"]), older_code=row["version"] != code_version(), **measured)


def _row(result: Result, origin: Origin) -> dict[str, Any]:
    """Return the columns of a result."""
    row = {"key": point_key(result.spec, origin), "spec": result.spec.key(), **vars(origin)}
    row |= {"version": code_version(), "measured_at": _now(), "low": result.interval[0], "high": result.interval[1]}
    return row | {name: getattr(result, name) for name in _MEASURED}


def _spec(text: str) -> PruneSpec:
    return PruneSpec.from_dict(json.loads(text))


def _older(db: sqlite3.Connection, study: int) -> Iterator[tuple[str, PruneSpec]]:
    """Yield keys and pathless specs of a study's results by other versions of the code, skipping unreadable specs."""
    query = "SELECT key, m.spec FROM members m JOIN points p USING (key) WHERE study = ? AND version != ? ORDER BY position"
    for row in db.execute(query, (study, code_version())).fetchall():
        with suppress(IntrafusionError):
            yield row["key"], _pathless(_spec(row["spec"]))


def _pathless(spec: PruneSpec) -> PruneSpec:
    """Return the spec without its paths, so that it does not depend on where the files are."""
    return spec.but(weights=None, data_path=None)


def _study(row: sqlite3.Row, tallies: Sequence[sqlite3.Row]) -> StudyRow:
    """Build a study from its row and its tallies, which are counts by version of the code and device."""

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
    """Return a study's id. Raises IntrafusionError with the names that exist if there is none of this name."""
    ids = dict(db.execute("SELECT name, id FROM studies ORDER BY id DESC").fetchall())
    if name not in ids:
        raise IntrafusionError(f"no study {name!r} in {path}; choose one of {', '.join(ids) or '(none yet)'}")
    return ids[name]


def _is_complete(db: sqlite3.Connection, key: str) -> bool:
    return db.execute("SELECT 1 FROM points WHERE key = ? AND count = total", (key,)).fetchone() is not None


def _is_held(claim: sqlite3.Row) -> bool:
    """Return whether the process that holds a claim may still be working on the point."""
    if claim["host"] != host():  # its monotonic clock is not comparable; abs(): the wall clock may be set either way
        return abs(time.time() - claim["beat"]) <= VOID_AFTER
    return abs(time.monotonic() - claim["steady"]) <= VOID_AFTER and is_running(claim["pid"], claim["born"])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
