"""Real servers that share a store, are killed, and run out of disk in the midst of a study."""

import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from benchmarks.kills import Death, doubled_in, lost, rows_in
from servers import GONE, PATIENCE, Tab, served
from store_processes import small_disk
from study_processes import finished

from intrafusion.studies.store.sqlite import Store

MERGES = "merges=drop&merges=fusion&merges=fold"
PAGE = f"curves?model=digits-mlp&limit=all&{MERGES}&" + "&".join(f"sparsities={percent}" for percent in range(10, 91, 5))
POINTS = 17 * 3


def opened(port: int, page: str = PAGE) -> Tab:
    """The page, once the server answers."""
    patience = time.monotonic() + PATIENCE
    while True:
        try:
            return Tab(port, page)
        except GONE:
            assert time.monotonic() < patience
            time.sleep(0.05)


def until(tab: Tab, enough: Callable[[int], bool]) -> int:
    """Look at the page until it says that so many points are done; how many."""
    patience = time.monotonic() + PATIENCE
    while True:
        done, total, words = tab.progress()
        assert total in (0, POINTS), words
        if enough(done):
            return done
        assert time.monotonic() < patience, words


def count_measurements(path: Path) -> None:
    """Have the store write down each result that is brought to it: the point, and how many images it has seen."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE brought (key TEXT, count INTEGER)")
        db.execute("CREATE TRIGGER note BEFORE INSERT ON points BEGIN INSERT INTO brought VALUES (NEW.key, NEW.count); END")
        db.commit()


def test_two_servers_share_a_study_and_one_of_them_is_killed(tmp_path):
    """Before that and after, no point is measured twice, none is lost, and both show all of them."""
    path = tmp_path / "s.sqlite"
    Store(path).close()
    count_measurements(path)
    with served(path) as (first, one), served(path) as (_, other):
        for port in (one, other):
            opened(port, "overview?model=digits-mlp").look()  # imports what both need, so that they begin at once
        tab, theirs = opened(one), opened(other)
        with ThreadPoolExecutor(2) as readers:
            list(readers.map(Tab.look, (tab, theirs)))
        reported = until(tab, lambda done: done >= POINTS / 2)
        first.kill()
        first.wait()
        assert len(rows_in(path)) >= reported
        with pytest.raises(GONE):
            tab.progress()
        until(theirs, lambda done: done == POINTS)
        with served(path) as (_, again):
            until(opened(again), lambda done: done == POINTS)
    assert len(rows_in(path)) == POINTS
    assert doubled_in(path) == 0
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT key, count FROM brought GROUP BY key, count HAVING count(*) > 1").fetchall() == []


def stored(process: subprocess.Popen, path: Path, copy: Path) -> int:
    """Points in the file as this process sees the disk; SQLite would follow the link to our own."""
    for end in ("", "-wal"):
        shutil.copy(f"/proc/{process.pid}/root{path}{end}", f"{copy}{end}")
    return len(rows_in(copy))


def test_a_server_whose_disk_is_full_goes_on_and_stores_everything_later(tmp_path):
    path, ballast = tmp_path / "s.sqlite", tmp_path / "ballast"
    *within, last = small_disk(tmp_path)
    fill = f"head -c 5900000 /dev/zero > {shlex.quote(str(ballast))}"
    script = last.replace('eval "$0"', f'{fill} && exec "$0" "$@"')
    assert script != last
    with served(path, (*within, script, sys.executable)) as (process, port):
        tab = opened(port)
        until(tab, lambda done: done == POINTS)
        said = tab.look()
        assert "results are held in memory" in said
        assert "free some space" in said
        assert stored(process, path, tmp_path / "before.sqlite") < POINTS
        Path(f"/proc/{process.pid}/root{ballast}").unlink()
        patience = time.monotonic() + PATIENCE
        while "results are held in memory" in tab.look():
            assert time.monotonic() < patience
            time.sleep(0.5)
        assert stored(process, path, tmp_path / "after.sqlite") == POINTS


def test_the_benchmark_sees_what_is_lost(tmp_path):
    path = tmp_path / "s.sqlite"
    rows, _ = finished(path, "--sparsity", "0.3", "0.5")
    stored, name = rows_in(path), rows_in(path).popitem()[0]
    assert lost(Death(True, rows, len(rows)), stored) == 0
    assert lost(Death(True, [], len(rows) + 1), stored) == 1
    assert lost(Death(True, rows, 0), {key: row for key, row in stored.items() if key != name}) == 1
    assert lost(Death(True, rows, 0), stored | {name: stored[name] | {"accuracy": 0.123}}) == 1
