"""Studies in processes of the command line: started, read, stopped, and checked against what is stored."""

import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from places import ROOT

from intrafusion.cli.main import main
from intrafusion.studies.store.sqlite import Store

PATIENCE = 240  # seconds that no test waits for, unless it fails


STUDY = ["sweep", "--model", "digits-mlp", "--limit", "all", "--sparsity", "0.1:0.7:0.04", "--name", "s", "--json"]


POINTS = 16 * 2 * 2


SUMMARY = re.compile(r"(\d+) points: (\d+) from the store, (\d+) measured(?:, (\d+) measured by other processes)?")


@contextmanager
def started(path: Path, *more: str) -> Iterator[subprocess.Popen]:
    """The study, running; it does not outlive the block, nor get more than a few lines ahead of who reads them."""
    words = [sys.executable, "-m", "intrafusion", *STUDY, "--store", str(path), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "pipesize": 4096}
    with subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def finished(path: Path, *more: str) -> tuple[list[dict], tuple[int, ...]]:
    """The study, run to its end here: its rows, and how many points it says there are, were stored, it and others measured."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert main([*STUDY, "--store", str(path), *more]) == 0
    return read(out.getvalue()), told(err.getvalue())


def told(err: str) -> tuple[int, ...]:
    (line,) = err.splitlines()
    found = SUMMARY.fullmatch(line)
    assert found, line
    return tuple(int(number or 0) for number in found.groups())


def read(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def plain(rows: list[dict]) -> dict[str, dict]:
    """Rows by what was pruned how; none comes twice. Without the time they took."""
    named = {f"{row['groups']} {row['merge']} {row['sparsity']}": row | {"seconds": 0} for row in rows}
    assert len(named) == len(rows)
    return named


def stored(path: Path) -> dict[str, dict]:
    """What the store holds of the study, complete."""
    with Store(path) as store:
        results = store.results("s") if store.studies() else []  # it may not have come that far
    return plain([json.loads(json.dumps(result.to_row())) for result in results if result.complete])


def rows_in(path: Path) -> int:
    """Points that the store holds, complete or not, while others write."""
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return db.execute("SELECT count(*) FROM points").fetchone()[0]
    except sqlite3.OperationalError:  # it is being made
        return 0


def until(happens: Callable[[], bool]) -> None:
    patience = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < patience
        time.sleep(0.01)


def check_sound(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        count, different = db.execute("SELECT count(*), count(DISTINCT spec) FROM points").fetchone()
    assert count == different <= POINTS
