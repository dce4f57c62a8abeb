"""Time the list of studies in a store of many rows against one of few rows.

python tests/benchmarks/bench_store.py [STUDIES [POINTS]]: by default 500 studies of 2,000 synthetic points each. Exits with 1
if the ratio of the two times is above 10.
"""

import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from intrafusion.runtime.code_digest import code_version
from intrafusion.spec import PruneSpec
from intrafusion.studies.store.sqlite import Store


def made(path: Path, studies: int, points: int) -> None:
    """Create a store with complete points, all from this version of the code."""
    Store(path).close()
    specs = [PruneSpec(seed=seed).key() for seed in range(points)]
    told = (
        "m",
        "d",
        code_version(),
        "cpu",
        0.5,
        0.4,
        0.6,
        100,
        100,
        0.7,
        2,
        3,
        4,
        5,
        6,
        7,
        1.5,
        "2026-01-01",
        bytes(100),
    )
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN")
        for study in range(1, studies + 1):
            keys = [f"{study:032x}{point:032x}" for point in range(points)]
            rows = list(zip(keys, specs, strict=True))
            db.execute("INSERT INTO studies VALUES (?, ?, '[axes]', '2026-01-01')", (study, f"study {study}"))
            db.executemany(f"INSERT INTO points VALUES ({', '.join('?' * 21)})", [(*row, *told) for row in rows])
            db.executemany("INSERT INTO members VALUES (?, ?, ?, ?)", [(study, n, *row) for n, row in enumerate(rows)])
        db.execute("COMMIT")


def listed(path: Path) -> float:
    """Return the CPU seconds of listing the studies, the best of five."""
    taken = []
    with Store(path) as store:
        for _ in range(5):
            began = time.process_time()
            rows = store.studies()
            taken.append(time.process_time() - began)
            assert all(row.done == row.points for row in rows)
    return min(taken)


def main(studies: int = 500, points: int = 2000) -> float:
    """Return the ratio of the listing time to that of as many studies with one point each."""
    with tempfile.TemporaryDirectory() as folder:
        times = []
        for each in (1, points):
            path = Path(folder) / f"{each}.sqlite"
            began = time.process_time()
            made(path, studies, each)
            writing = time.process_time() - began
            times.append(listed(path))
            print(f"{studies * each:,} points: made in {writing:.1f} s, listed in {times[-1] * 1000:.1f} ms", flush=True)
    return times[1] / times[0]


if __name__ == "__main__":
    ratio = main(*map(int, sys.argv[1:]))
    print(f"ratio {ratio:.1f}")
    sys.exit(ratio > 10)
