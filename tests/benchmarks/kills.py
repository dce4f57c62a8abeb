"""Kill a study with SIGKILL at random moments, repeatedly: is a reported point lost, or is a point stored twice?

python tests/benchmarks/kills.py [KILLS [SEED]]: this many kills (default 50) of the command line's `sweep`, and as many of a
server whose Curves page measures. One kill in five comes at a random moment of the whole life of an undisturbed process,
start-up included. The others come while it is working, after its first claim of a point. The next process continues with the
contents of the file. When a study is complete, it is compared with an undisturbed one, and another study begins. Reported
points are those that the command line printed, and the number of points that the page said were done. If none was lost or
stored twice, it then runs tests/writers.py; `writers` as the first argument runs only that.
"""

import dataclasses
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from places import ROOT, TESTS
from servers import GONE, PATIENCE, Tab, served
from study_processes import STUDY, read

from intrafusion import PruneSpec

PAGE = "curves?model=digits-mlp&limit=all&" + "&".join(f"sparsities={percent}" for percent in range(5, 100, 5))
_TIMES = ("seconds", "measured_at")  # columns that differ between runs
Rows = dict[str, dict]  # complete points by spec, without times
Life = Callable[[Path, "Moment"], "Death"]
_STARTING = 0.2  # share of kills timed from the start of the process


@dataclasses.dataclass
class Death:
    """How a process ended.

    rows: results that it reported. done: how many points it said were done. worked: seconds since its first claim.
    """

    killed: bool
    rows: list[dict]
    done: int
    worked: float = 0.0


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill: this many seconds after the start of the process, or, if `at_work`, after its first claim of a point."""

    seconds: float
    at_work: bool


@dataclasses.dataclass
class Tally:
    """Outcome of the kills. studies: how many were completed and equal the undisturbed one."""

    kills: int = 0
    early: int = 0  # kills before the first complete point
    reported: int = 0
    lost: int = 0
    doubled: int = 0
    studies: int = 0
    seconds: float = 0.0


def rows_in(path: Path) -> Rows:
    """Return the complete points of a store file. Raise AssertionError if the file is corrupt."""
    with closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert not db.execute("PRAGMA foreign_key_check").fetchall()
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return {}  # killed while creating the file
        found = [dict(row) for row in db.execute("SELECT * FROM points WHERE count = total")]
    return {row["spec"]: {name: value for name, value in row.items() if name not in _TIMES} for row in found}


def doubled_in(path: Path) -> int:
    """Return how many points are stored twice, complete or not."""
    with closing(sqlite3.connect(path)) as db:
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return 0
        return db.execute("SELECT count(*) - count(DISTINCT spec) FROM points").fetchone()[0]


def claims(path: Path, pid: int) -> bool:
    """Return whether this process currently claims a point."""
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return db.execute("SELECT 1 FROM claims WHERE pid = ?", (pid,)).fetchone() is not None
    return False  # the file is being created


class Killer(threading.Thread):
    """A thread that kills a process at a given moment, unless it has ended before."""

    def __init__(self, process: subprocess.Popen, path: Path, moment: Moment):
        super().__init__()
        self.process, self.path, self.moment = process, path, moment
        self.began = 0.0  # when the process first claimed a point
        self.start()

    def run(self) -> None:
        started = time.monotonic()
        while not self.began and self.process.poll() is None and (self.moment.at_work or self._waits(started)):
            time.sleep(0.01)
            self.began = time.monotonic() if claims(self.path, self.process.pid) else 0.0
        while self.process.poll() is None and self._waits(self.began if self.moment.at_work else started):
            time.sleep(0.01)
        self.process.kill()

    def _waits(self, since: float) -> bool:
        return time.monotonic() - since < self.moment.seconds


def command_line(path: Path, moment: Moment) -> Death:
    """Run the study on the command line and kill it at this moment."""
    words = [sys.executable, "-m", "intrafusion", *STUDY, "--store", str(path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        killer = Killer(process, path, moment)
        out = process.stdout.read()
        process.wait()
        killer.join()
    rows = read(out[: out.rfind("\n") + 1])
    return Death(process.returncode == -9, rows, 0, time.monotonic() - killer.began)


def server(path: Path, moment: Moment) -> Death:
    """Start a server, poll its page until the study is done, and kill the server at this moment if that comes first."""
    done, total, tab = 0, -1, None
    with served(path) as (process, port):
        killer = Killer(process, path, moment)
        while done != total and process.poll() is None:
            with suppress(*GONE):
                tab = tab or Tab(port, PAGE)
                now, of, _ = tab.progress()
                done, total = max(done, now), of or -1
            time.sleep(0.2)
        death = Death(done != total, [], done, time.monotonic() - killer.began)
        process.kill()
        killer.join()
    return death


def lost(death: Death, stored: Rows) -> int:
    """Return how many reported points are missing in the file, or have a different result there."""
    fields = {field.name for field in dataclasses.fields(PruneSpec)}
    missing = 0
    for row in death.rows:
        row = row | {"dataset": row["data"]}
        known = stored.get(PruneSpec.from_dict({name: row[name] for name in fields}).key(), {})
        told = row.keys() & known.keys() - fields - {"data"} - {*_TIMES}
        missing += len(told) < 12 or any(row[name] != known[name] for name in told)
    return missing + max(0, death.done - len(stored))


def endure(life: Life, kills: int, moments: random.Random, folder: Path) -> Tally:
    """Kill a process `kills` times. Raise AssertionError if a file is corrupt or a completed study differs."""
    began, path, never = time.monotonic(), folder / "undisturbed.sqlite", Moment(PATIENCE, False)
    alone = life(path, never)
    assert not alone.killed
    whole, working, undisturbed = time.monotonic() - began, alone.worked, rows_in(path)
    print(f"  undisturbed: {len(undisturbed)} points in {whole:.1f} s, {working:.1f} s of it at them", flush=True)
    tally, path, before = Tally(), folder / "0.sqlite", {}  # type: Tally, Path, Rows
    while tally.kills < kills or before or not tally.studies:
        at_work = moments.random() >= _STARTING
        moment = Moment(moments.uniform(0, working if at_work else whole), at_work)
        death = life(path, moment if tally.kills < kills else never)
        stored = rows_in(path) if path.exists() else {}
        tally.kills += death.killed
        tally.early += death.killed and not stored
        tally.reported += len(death.rows) + death.done
        tally.lost += lost(death, stored) + sum(stored.get(spec) != row for spec, row in before.items())
        tally.doubled += doubled_in(path) if path.exists() else 0
        before = stored
        if not death.killed:
            assert stored == undisturbed
            tally.studies += 1
            path, before = folder / f"{tally.studies}.sqlite", {}
    tally.seconds = time.monotonic() - began
    return tally


def main(kills: int = 50, seed: int = 0) -> list[Tally]:
    tallies: list[Tally] = []
    for name, life in (("command line", command_line), ("server", server)):
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            tally = endure(life, kills, random.Random(seed), Path(folder))
        print(
            f"  {tally.kills} kills in {tally.seconds:.0f} s, {tally.early} of them before the first point was complete; "
            f"{tally.reported} points reported, {tally.lost} lost, {tally.doubled} doubled; "
            f"{tally.studies} studies became complete, equal to the undisturbed one",
            flush=True,
        )
        tallies.append(tally)
    return tallies


def writers(kills: int = 50, seed: int = 0) -> int:
    """Run tests/writers.py with this many kills per writer. Return its exit status: 0 if no partial file was ever visible."""
    print("writers", flush=True)
    return subprocess.run([sys.executable, str(TESTS / "support" / "writers.py"), str(kills), str(seed)], cwd=ROOT).returncode


if __name__ == "__main__":
    alone = sys.argv[1:2] == ["writers"]
    numbers = [int(word) for word in sys.argv[1 + alone :]]
    failed = not alone and any(tally.lost or tally.doubled for tally in main(*numbers))
    sys.exit(failed or writers(*numbers))
