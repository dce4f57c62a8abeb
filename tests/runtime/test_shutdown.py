"""Commands that are asked to stop, at any moment: how soon they are gone, and what they leave."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from places import ROOT

from intrafusion.cli.main import main
from intrafusion.runtime._shutdown_watcher import STAGES, Course
from intrafusion.training.checkpoint import load

PATIENCE = 240  # seconds that nobody waits for, unless something is wrong
SOON = 6.0  # a second, on a machine that others keep busy: what hangs here would take minutes
SAID = "cancelled; the results printed so far are complete"
INT, TERM = bytes([signal.SIGINT]), bytes([signal.SIGTERM])


class TestCourse:
    @staticmethod
    def course(*heard: tuple[float, bytes]) -> list[tuple[float, str]]:
        made = Course()
        for now, what in heard:
            made.hear(what, now)
        return made.due

    @pytest.mark.parametrize("heard", [INT, TERM, INT + TERM, b"()" + INT])
    def test_a_signal_is_followed_by_ever_harsher_stages_within_a_second(self, heard):
        due = self.course((10.0, heard))
        assert [stage for _, stage in due] == ["interrupt", "leave", "kill"]
        assert [round(when - 10, 9) for when, _ in due] == sorted(STAGES.values())
        assert due[-1][0] - 10 < 1

    def test_more_signals_do_not_put_the_end_off(self):
        assert self.course((0, INT), (0.2, INT), (0.5, TERM)) == self.course((0, INT))

    def test_work_that_keeps_its_state_is_waited_for_after_one_signal(self):
        assert self.course((0, b"("), (1, TERM)) == [(1 + STAGES["leave"], "wait")]
        assert self.course((0, b"(("), (1, TERM), (9, b")")) == [(1 + STAGES["leave"], "wait")]
        assert self.course((0, b"("), (1, TERM), (9, b")")) == self.course((9, TERM))

    def test_a_second_signal_ends_the_wait(self):
        assert self.course((0, b"("), (1, INT), (4, INT)) == self.course((4, INT))

    def test_neither_work_nor_other_signals_alone_end_anything(self):
        assert self.course((0, b"()(."), (1, bytes([signal.SIGURG, signal.SIGCHLD]))) == []


PROGRAM = f"""
import sys, types
package = types.ModuleType("intrafusion")  # without what takes seconds to import
package.__path__ = [{str(ROOT / "intrafusion")!r}]
sys.modules["intrafusion"] = package
import hashlib, threading, time
from contextlib import nullcontext
from intrafusion.runtime import cancellation, shutdown

def begin():
    print('"begun"', flush=True)

def python():
    begin()
    while True:
        pass

def tidy():
    try:
        python()
    finally:
        print('"tidied up"', flush=True)

def stubborn():
    begin()
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass

def state():
    with shutdown.finishing():
        begin()
        for _ in range(150):
            time.sleep(0.01)
        print('"kept"', flush=True)
        cancellation.checkpoint()

def unhurried():
    with shutdown.finishing():
        stubborn()

WORK = {{
    "checkpoints": lambda: begin() or [(time.sleep(0.01), cancellation.checkpoint()) for _ in range(10**9)],
    "python": python, "tidy": tidy, "stubborn": stubborn, "state": state, "unhurried": unhurried,
    "sleep": lambda: begin() or time.sleep(1000),
    "lock": lambda: begin() or threading.Event().wait(),
    "c": lambda: begin() or hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9),  # without the interpreter's lock
    "c with the lock": lambda: begin() or sum(range(10**12)),
    "before": python,
}}
shutdown.watch()
name = sys.argv[1]
try:
    with nullcontext() if name == "before" else cancellation.interruptible():
        WORK[name]()
except (KeyboardInterrupt, cancellation.Cancelled):
    sys.exit(shutdown.cancelled())
"""


@contextmanager
def program(name: str, **environment: str) -> Iterator[subprocess.Popen]:
    """A watched process that is at this work."""
    command = [sys.executable, "-c", PROGRAM, name]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    ) as process:
        try:
            assert process.stdout.readline() == '"begun"\n'
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen, *numbers: int, between: float = 0.0) -> float:
    """Seconds until it is gone after these signals."""
    for number in numbers[:-1]:
        process.send_signal(number)
        time.sleep(between)
    began = time.monotonic()
    process.send_signal(numbers[-1])
    process.wait(PATIENCE)
    return time.monotonic() - began


class TestWatched:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize(
        ("name", "status"),
        [
            ("checkpoints", 130), ("python", 130), ("sleep", 130), ("lock", 130), ("c", 130), ("stubborn", 130),
            ("before", 130), ("c with the lock", -signal.SIGKILL),
        ],
    )  # fmt: skip
    def test_whatever_it_computes_it_is_gone_in_a_second_and_says_so_once(self, name, status, number):
        with program(name) as process:
            assert end(process, number) < SOON
            assert process.returncode == status
            assert process.stderr.read() == f"{SAID}\n"

    def test_where_it_stands_in_python_it_tidies_up(self):
        with program("tidy") as process:
            assert end(process, signal.SIGTERM) < SOON
            assert (process.returncode, process.stdout.read()) == (130, '"tidied up"\n')

    def test_work_that_keeps_its_state_is_waited_for_and_that_is_told(self):
        with program("state") as process:
            assert end(process, signal.SIGTERM) > STAGES["kill"]
            assert (process.returncode, process.stdout.read()) == (130, '"kept"\n')
            waits, said = process.stderr.read().splitlines()
            assert waits.endswith("saving its state; a second signal stops at once")
            assert said == SAID

    def test_a_second_signal_does_not_wait(self):
        with program("unhurried") as process:
            assert end(process, signal.SIGINT, signal.SIGINT, between=0.1) < SOON
            assert (process.returncode, process.stderr.read()) == (130, f"{SAID}\n")

    def test_where_the_log_is_json_so_is_what_is_said_for_it(self):
        with program("c with the lock", INTRAFUSION_LOG="json") as process:
            end(process, signal.SIGINT)
            (line,) = process.stderr.read().splitlines()
        assert json.loads(line)["message"] == SAID

    def test_nobody_stays_behind(self):
        with program("python") as process:
            (watcher,) = children(process.pid)
            process.kill()
            process.wait()
            patience = time.monotonic() + PATIENCE
            while Path(f"/proc/{watcher}").exists() and "Z" not in Path(f"/proc/{watcher}/stat").read_text().split()[2]:
                assert time.monotonic() < patience
                time.sleep(0.01)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def command(*words: str, code: str | None = None) -> Iterator[subprocess.Popen]:
    """A command, from its first moment; or a program that runs one."""
    run = ["-m", "intrafusion", *words] if code is None else ["-c", code, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *run], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as done:
        try:
            yield done
        finally:
            done.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_the_library_is_imported(number):
    with command("models") as process:
        patience = time.monotonic() + PATIENCE
        while not children(process.pid):
            assert time.monotonic() < patience
            time.sleep(0.005)
        assert end(process, number) < SOON
        assert (process.returncode, process.stdout.read(), process.stderr.read()) == (130, "", f"{SAID}\n")


OWN = """
import hashlib, sys, time
words = sys.argv[1:]
sys.argv = ["intrafusion"]  # as the script of that name, which has the process to itself
from intrafusion.studies import sweeps
from intrafusion.cli.main import main
from intrafusion.training import loop
"""
HELD_UP = f"""{OWN}
measure, calls = sweeps.measure, []

def held_up(*given):
    calls.append(given)
    if len(calls) == 4:
        print("held up", file=sys.stderr, flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    return measure(*given)

sweeps.measure = held_up
raise SystemExit(main(words))
"""
SLOW = f"""{OWN}
advance = loop._Run._advance

def slow(run, device):
    print("a step", file=sys.stderr, flush=True)
    time.sleep(1.5)
    advance(run, device)

loop._Run._advance = slow
raise SystemExit(main(words))
"""


def test_a_curve_that_is_held_up_leaves_whole_lines_and_a_sound_store(tmp_path, capsys):
    store = tmp_path / "s.sqlite"
    words = ("curve", "--model", "digits-mlp", "--limit", "20", "--json", "--store", str(store))
    with command(*words, code=HELD_UP) as process:
        assert process.stderr.readline() == "held up\n"
        assert end(process, signal.SIGTERM) < SOON
        assert (process.returncode, process.stderr.read()) == (130, f"{SAID}\n")
        printed = [json.loads(line) for line in process.stdout.read().splitlines()]
    assert len(printed) == 3
    with closing(sqlite3.connect(store)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert main(words) == 0  # a claim of the process that is gone holds up nobody
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()][:3] == printed
    assert err == "6 points: 3 from the store, 3 measured\n"


def test_a_slow_step_of_training_is_completed_and_its_state_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
    with command("lab", "--model", "digits-mlp", "--epochs", "1", "--json", code=SLOW) as process:
        assert process.stderr.readline() == "a step\n"
        end(process, signal.SIGINT)
        waits, said = process.stderr.read().splitlines()
    assert (process.returncode, said) == (130, SAID)
    assert waits.startswith("cancelled; finishing this training step")
    (kept,) = tmp_path.glob("lab/*.phases/*.run")
    assert load(kept)["step"] == 1
