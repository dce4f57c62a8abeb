"""The file of a store: its schema and migrations, opening it, and plain messages for SQLite's errors."""

import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from intrafusion.errors import IntrafusionError, one_line

STAMP = int.from_bytes(b"itfs")  # PRAGMA application_id, which distinguishes a store from databases of other programs

_FIRST = (
    """CREATE TABLE points (
        key TEXT PRIMARY KEY, spec TEXT NOT NULL, model TEXT NOT NULL, data TEXT NOT NULL, version TEXT NOT NULL,
        device TEXT NOT NULL, accuracy REAL NOT NULL, low REAL NOT NULL, high REAL NOT NULL, count INTEGER NOT NULL,
        total INTEGER NOT NULL, dense_accuracy REAL NOT NULL, params INTEGER NOT NULL, params_before INTEGER NOT NULL,
        macs INTEGER NOT NULL, macs_before INTEGER NOT NULL, channels INTEGER NOT NULL,
        channels_before INTEGER NOT NULL, seconds REAL NOT NULL, measured_at TEXT NOT NULL, correct BLOB NOT NULL)""",
    "CREATE TABLE failures (key TEXT PRIMARY KEY, spec TEXT NOT NULL, reason TEXT NOT NULL, failed_at TEXT NOT NULL)",
    """CREATE TABLE claims (
        key TEXT PRIMARY KEY, token TEXT NOT NULL, owner TEXT, host TEXT NOT NULL, pid INTEGER NOT NULL,
        born TEXT NOT NULL, beat REAL NOT NULL)""",
    "CREATE TABLE studies (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, text TEXT NOT NULL, created TEXT NOT NULL)",
    """CREATE TABLE members (
        study INTEGER NOT NULL REFERENCES studies ON DELETE CASCADE, position INTEGER NOT NULL, key TEXT NOT NULL,
        spec TEXT NOT NULL, PRIMARY KEY (study, key))""",
    "CREATE INDEX members_of_point ON members (key)",
    f"PRAGMA application_id = {STAMP}",
)
_STEADY_BEATS = (  # existing claims of the previous format are judged by the wall clock until they end
    "ALTER TABLE claims ADD COLUMN steady REAL NOT NULL DEFAULT 0",
)
_SHARED_ROWS = (  # points whose results cannot differ share one row, and a study lists all of them
    "ALTER TABLE members RENAME TO members_by_key",
    """CREATE TABLE members (
        study INTEGER NOT NULL REFERENCES studies ON DELETE CASCADE, position INTEGER NOT NULL, key TEXT NOT NULL,
        spec TEXT NOT NULL, PRIMARY KEY (study, position))""",
    "INSERT INTO members SELECT study, position, key, spec FROM members_by_key",
    "DROP TABLE members_by_key",
    "CREATE INDEX members_of_point ON members (key)",
)
BEHIND = 1 << 32  # members from this position on are results of earlier members by other versions of the code


def _add(select: str) -> str:
    """Return SQL that adds the selected rows to the tallies.

    The columns are study, version, device, points, done, partial, failed and seconds.
    """
    sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in ("points", "done", "partial", "failed", "seconds"))
    return f"INSERT INTO tallies {select} ON CONFLICT (study, version, device) DO UPDATE SET {sums};"


def _of_point(row: str, sign: str) -> str:
    """Return SQL that adds a stored point to the tallies of each study that holds it, or subtracts it (sign "-")."""
    kinds = ", ".join(f"{sign} count(*) * ({row}.count {kind} {row}.total)" for kind in "=<")
    return _add(
        f"SELECT study, {row}.version, {row}.device, 0, {kinds}, 0, {sign} {row}.seconds FROM members"
        f" WHERE key = {row}.key GROUP BY study"
    )


def _of_failure(row: str, sign: str) -> str:
    """Return SQL that adds a failure to the tallies of each study that holds its point, or subtracts it (sign "-")."""
    return _add(
        f"SELECT study, '', '', 0, 0, 0, {sign} count(*), 0 FROM members"
        f" WHERE key = {row}.key AND position < {BEHIND} GROUP BY study"
    )


def _of_member(row: str, sign: str, others: int) -> str:
    """Return SQL that adds a member to the tallies of its study, or subtracts it (sign "-").

    The seconds of its point count only if `others` member rows of the study now have that point.
    """
    own = f"{sign} ({row}.position < {BEHIND})"
    alone = f"(SELECT count(*) FROM members WHERE key = {row}.key AND study = {row}.study) = {others}"
    failed = f"{own} * EXISTS (SELECT 1 FROM failures WHERE key = {row}.key)"
    measured = f"{sign} (count = total), {sign} (count < total), 0, {sign} seconds * ({alone})"
    return _add(f"SELECT {row}.study, '', '', {own}, 0, 0, {failed}, 0 WHERE TRUE") + _add(
        f"SELECT {row}.study, version, device, 0, {measured} FROM points WHERE key = {row}.key"
    )


def _trigger(event: str, table: str, work: str) -> str:
    return f"CREATE TRIGGER {table}_{event.lower()} AFTER {event} ON {table} BEGIN {work} END"


_TALLIES = (  # counts for each study, updated by triggers, so that listing studies reads no points
    """CREATE TABLE tallies (
        study INTEGER NOT NULL, version TEXT NOT NULL, device TEXT NOT NULL, points INTEGER NOT NULL,
        done INTEGER NOT NULL, partial INTEGER NOT NULL, failed INTEGER NOT NULL, seconds REAL NOT NULL,
        PRIMARY KEY (study, version, device)) WITHOUT ROWID""",
    "ALTER TABLE members RENAME TO members_mixed",
    """CREATE TABLE members (
        study INTEGER NOT NULL REFERENCES studies ON DELETE CASCADE, position INTEGER NOT NULL, key TEXT NOT NULL,
        spec TEXT NOT NULL, PRIMARY KEY (study, position))""",
    "DROP INDEX members_of_point",
    "CREATE INDEX members_of_point ON members (key, study)",
    _trigger("INSERT", "points", _of_point("NEW", "+")),
    _trigger("DELETE", "points", _of_point("OLD", "-")),
    _trigger("UPDATE", "points", _of_point("OLD", "-") + _of_point("NEW", "+")),
    _trigger("INSERT", "failures", _of_failure("NEW", "+")),
    _trigger("DELETE", "failures", _of_failure("OLD", "-")),
    _trigger("INSERT", "members", _of_member("NEW", "+", 1)),
    _trigger("DELETE", "members", _of_member("OLD", "-", 0)),
    _trigger("DELETE", "studies", "DELETE FROM tallies WHERE study = OLD.id;"),
    f"""INSERT INTO members SELECT study,
        position + {BEHIND} * (row_number() OVER (PARTITION BY study, spec ORDER BY position) > 1), key, spec
        FROM members_mixed""",
    "DROP TABLE members_mixed",
)
STEPS = (
    _FIRST,
    _STEADY_BEATS,
    _SHARED_ROWS,
    _TALLIES,
)  # migrations from an empty file to each format in turn; a released step must never change
FORMAT = len(STEPS)  # format of the file, in PRAGMA user_version


def open_store(path: Path, wait: float) -> sqlite3.Connection:
    """Open or create the file; an older format is migrated in one transaction.

    Raises IntrafusionError for a file that is not one of our stores or has a newer format; it is left unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IntrafusionError(f"cannot create the folder of {path}: {error.strerror}; {_ELSEWHERE}") from error
    db = sqlite3.connect(path, timeout=wait, isolation_level=None, check_same_thread=False)
    try:
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = NORMAL")
        with transaction(db, "DEFERRED"):
            found = _format(db, path)
        _use_wal(db, wait)
        if found < FORMAT:
            with transaction(db, "IMMEDIATE"):
                for step in STEPS[_format(db, path) :]:  # read the format again: another process may have migrated it
                    for statement in step:
                        db.execute(statement)
                db.execute(f"PRAGMA user_version = {FORMAT}")
    except BaseException:
        db.close()
        raise
    return db


def _format(db: sqlite3.Connection, path: Path) -> int:
    """Return the file's format, 0 for an empty file.

    Raises IntrafusionError, before anything is written, for another program's database or a newer format.
    """
    stamp, version, tables = (
        db.execute(query).fetchone()[0]
        for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if (stamp, version, tables) == (0, 0, 0):
        return 0
    if stamp != STAMP:
        raise IntrafusionError(f"{path} is a database of another program; {_ELSEWHERE}")
    if version > FORMAT:
        raise IntrafusionError(
            f"{path} has format {version}, but this version of intrafusion reads format {FORMAT}; update intrafusion"
        )
    return version


def _use_wal(db: sqlite3.Connection, wait: float) -> None:
    """Switch a new file to WAL.

    When two processes do so at once, SQLite does not wait for the lock, so this function retries for `wait` seconds.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


@contextmanager
def transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    """Commit the statements of the block as one transaction; roll back on any exception."""
    try:
        db.execute(f"BEGIN {kind}")
        yield
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # report the original exception
            db.rollback()
        raise


_ELSEWHERE = "choose another file for the store, for example with INTRAFUSION_STORE"
_FULL = "the disk of {path} is full; free some space and run again; earlier results are safe"
_DENIED = f"cannot open {{path}} for writing: it or its folder is read-only or inaccessible; {_ELSEWHERE}"
_SENTENCES = {
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_BUSY: "{path} has been locked by another program for more than {wait:g} s; close that program and run again",
    sqlite3.SQLITE_READONLY: _DENIED,
    sqlite3.SQLITE_CANTOPEN: _DENIED,
    sqlite3.SQLITE_PERM: _DENIED,
    sqlite3.SQLITE_NOTADB: f"{{path}} is not a study store; {_ELSEWHERE}",
    sqlite3.SQLITE_CORRUPT: "{path} is damaged; move it away to start a new store;"
    " the .recover command of sqlite3 saves the readable part",
}


@contextmanager
def plain_database_errors(path: Path, wait: float) -> Iterator[None]:
    """Turn SQLite's errors into an IntrafusionError of one line: what is wrong, with which file, and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = _code(error)
        if path.is_dir():
            sentence = "{path} is a folder; choose a file, such as {path}/studies.sqlite"
        elif code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and _disk_is_full(path):
            sentence = _FULL  # SQLite does not give the reason if a side file cannot grow
        else:
            sentence = _SENTENCES.get(code, f"cannot use {{path}}: {{error}}; {_ELSEWHERE}")
        raise IntrafusionError(sentence.format(path=path, wait=wait, error=one_line(error))) from error


def _code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code, or 0 for an error of Python's module itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _disk_is_full(path: Path) -> bool:
    try:
        return shutil.disk_usage(path.parent).free < 2**16
    except OSError:
        return False
