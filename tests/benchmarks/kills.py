"""kill -9 at random moments of a study, again and again: is any point lost that was reported, or any there twice?

python tests/benchmarks/kills.py [KILLS [SEED]]: so many kills of the command line's `sweep` and as many of a server whose
Curves page measures (50 each). A kill comes at a moment drawn from the whole life of an undisturbed process, start-up to end;
the next process goes on with what the file holds, and when a study is complete it is compared with one that nobody disturbed,
and another begins. Reported is what the command line printed, and the number of points that the page said were done.
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers import GONE, PATIENCE, Tab, served
from test_studies_survive import STUDY, read

from intrafusion import PruneSpec

ROOT = Path(__file__).parents[2]
PAGE = "curves?model=digits-mlp&limit=all&criteria=l1&criteria=l2&merges=drop&merges=fusion&merges=fold&" + "&".join(
    f"sparsities={percent}" for percent in range(5, 100, 5)
)
_TIMES = ("seconds", "measured_at")  # columns that differ from run to run
Rows = dict[str, dict]  # complete points by their spec, without times
Life = Callable[[Path, float], "Death"]


@dataclasses.dataclass
class Death:
    """How a process ended. rows: results that it reported; done: how many points it said were done."""

    killed: bool
    rows: list[dict]
    done: int


@dataclasses.dataclass
class Tally:
    """What came of the kills. studies: how many became complete and equal to the undisturbed one."""

    kills: int = 0
    before_any: int = 0  # kills before the first point
    reported: int = 0
    lost: int = 0
    doubled: int = 0
    studies: int = 0
    seconds: float = 0.0


def rows_in(path: Path) -> Rows:
    """The complete points of a sound file. Raises AssertionError for one that is not."""
    with closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert not db.execute("PRAGMA foreign_key_check").fetchall()
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return {}  # it was being made
        found = [dict(row) for row in db.execute("SELECT * FROM points WHERE count = total")]
    return {row["spec"]: {name: value for name, value in row.items() if name not in _TIMES} for row in found}


def doubled_in(path: Path) -> int:
    """Points that are there twice, complete or not."""
    with closing(sqlite3.connect(path)) as db:
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return 0
        return db.execute("SELECT count(*) - count(DISTINCT spec) FROM points").fetchone()[0]


def command_line(path: Path, after: float) -> Death:
    """Run the study, and kill it after so many seconds."""
    words = [sys.executable, "-m", "intrafusion", *STUDY, "--store", str(path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        timer = threading.Timer(after, process.kill)
        timer.start()
        out = process.stdout.read()
        process.wait()
        timer.cancel()
    return Death(process.returncode == -9, read(out[: out.rfind("\n") + 1]), 0)


def server(path: Path, after: float) -> Death:
    """Start a server, look at its page again and again until the study is done, and kill it after so many seconds."""
    done, total, end = 0, -1, time.monotonic() + after
    with served(path) as (process, port):
        timer = threading.Timer(after, process.kill)
        timer.start()
        tab = None
        while done != total and process.poll() is None:
            with suppress(*GONE):
                tab = tab or Tab(port, PAGE)
                now, of, _ = tab.progress()
                done, total = max(done, now), of or -1
        timer.cancel()
        return Death(process.poll() is not None and time.monotonic() >= end, [], done)


def lost(death: Death, stored: Rows) -> int:
    """How many points were reported and are not in the file, or are there with another result."""
    fields = {field.name for field in dataclasses.fields(PruneSpec)}
    missing = 0
    for row in death.rows:
        row = row | {"dataset": row["data"]}
        known = stored.get(PruneSpec.from_dict({name: row[name] for name in fields}).key(), {})
        told = row.keys() & known.keys() - fields - {"data"} - {*_TIMES}
        missing += len(told) < 12 or any(row[name] != known[name] for name in told)
    return missing + max(0, death.done - len(stored))


def endure(life: Life, kills: int, moments: random.Random, folder: Path) -> Tally:
    """Kill it so many times. Raises AssertionError for a file that is not sound, or a study that ends differently."""
    began = time.monotonic()
    assert not life(folder / "undisturbed.sqlite", PATIENCE).killed
    whole, undisturbed = time.monotonic() - began, rows_in(folder / "undisturbed.sqlite")
    print(f"  undisturbed: {len(undisturbed)} points in {whole:.1f} s", flush=True)
    tally, path, before = Tally(), folder / "0.sqlite", {}  # type: Tally, Path, Rows
    while tally.kills < kills or before or not tally.studies:
        death = life(path, moments.uniform(0, whole) if tally.kills < kills else PATIENCE)
        stored = rows_in(path) if path.exists() else {}
        tally.kills += death.killed
        tally.before_any += death.killed and not stored
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
    tallies = []
    for name, life in (("command line", command_line), ("server", server)):
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            tally = endure(life, kills, random.Random(seed), Path(folder))
        print(
            f"  {tally.kills} kills in {tally.seconds:.0f} s, {tally.before_any} of them before the first point; "
            f"{tally.reported} points reported, {tally.lost} lost, {tally.doubled} doubled; "
            f"{tally.studies} studies became complete, equal to the undisturbed one",
            flush=True,
        )
        tallies.append(tally)
    return tallies


if __name__ == "__main__":
    sys.exit(any(tally.lost or tally.doubled for tally in main(*map(int, sys.argv[1:]))))
