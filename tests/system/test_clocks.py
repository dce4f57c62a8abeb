"""The system's clock is set while studies run: real processes under libfaketime, which tells them another time."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from places import ROOT
from study_processes import PATIENCE, check_sound, plain, read, started, stored, told, until

HOUR = 3600


@pytest.fixture
def set_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the wall clock of all processes that are started from now on, by seconds, within a second of it."""
    found = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if found is None:
        pytest.skip("needs libfaketime: apt-get install faketime")
    file = tmp_path / "clock"
    for name, value in {
        "LD_PRELOAD": found, "FAKETIME_TIMESTAMP_FILE": file, "FAKETIME_CACHE_DURATION": 1, "FAKETIME_DONT_FAKE_MONOTONIC": 1,
        "DONT_FAKE_MONOTONIC": 1, "FAKETIME_DONT_RESET": 1,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    # libfaketime does not know time.sleep's way, an absolute moment of the clock that it leaves alone
    (tmp_path / "sitecustomize.py").write_text(
        "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def set_to(seconds: int) -> None:
        part = file.with_suffix(".part")
        part.write_text(f"{seconds:+d}\n")
        part.replace(file)

    set_to(0)
    return set_to


@contextmanager
def asking(path: Path) -> Iterator[Callable[[], tuple[bool, float]]]:
    """A process with a store of its own, and a way to have it claim a point: whether it got it, and its time of day."""
    script = (
        "import sys, time, store_processes as t\nstore = t.Store(sys.argv[1])\n"
        "for _ in sys.stdin: print(int(store.claim(t.PruneSpec(), t.CPU)), time.time(), flush=True)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT, **pipes) as process:

        def ask() -> tuple[bool, float]:
            process.stdin.write("\n")
            process.stdin.flush()
            got, now = process.stdout.readline().split()
            return got == "1", float(now)

        try:
            yield ask
        finally:
            process.kill()


def test_a_claim_survives_a_clock_that_is_set(tmp_path, set_clock):
    with asking(tmp_path / "s.sqlite") as ours:
        with asking(tmp_path / "s.sqlite") as theirs:
            assert theirs()[0]
            for seconds in (0, -HOUR, HOUR):
                set_clock(seconds)
                now = 0.0
                while abs(now - time.time() - seconds) > HOUR / 2:  # it was not yet set for them
                    got, now = ours()
                assert not got
        assert ours()[0]  # their process has ended


def test_a_study_while_the_clock_is_set(tmp_path, set_clock):
    """Back an hour and forth again, while it runs: each point is measured once, no time is negative."""
    path = tmp_path / "s.sqlite"
    with started(path, "--sparsity", "0.1:0.7:0.1") as process, ThreadPoolExecutor(1) as reader:
        output = reader.submit(process.communicate, timeout=PATIENCE)
        until(path.exists)
        for hours in itertools.cycle((-1, 1, -2, 2)):
            if output.done():
                break
            set_clock(hours * HOUR)
            time.sleep(0.5)
    out, err = output.result()
    assert process.returncode == 0, err
    assert told(err) == (28, 0, 28, 0)
    assert plain(read(out)) == stored(path)
    assert all(row["seconds"] > 0 for row in read(out))
    check_sound(path)
