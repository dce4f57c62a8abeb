"""Stores for tests: results to put in them, processes that use them, and a disk that is small enough to fill."""

import multiprocessing
import shlex
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from intrafusion import IntrafusionError, PruneSpec
from intrafusion.studies.measurement import Result
from intrafusion.studies.store.sqlite import Origin, Store

CPU = Origin("ab12", "cd34", "cpu")


PATIENCE = 240  # seconds that no test waits for, unless it fails


SERVER = multiprocessing.get_context("forkserver")  # imports torch once, for all the processes that are started here


def specs(number: int) -> list[PruneSpec]:
    return [PruneSpec(seed=seed) for seed in range(number)]


def points(number: int) -> list[tuple[PruneSpec, Origin]]:
    return [(spec, CPU) for spec in specs(number)]


def result(spec: PruneSpec, count: int = 100, total: int = 100, **fields: Any) -> Result:
    """A result whose every number differs from the others."""
    plain = Result(spec, 0.5, (0.4, 0.625), count, total, 0.75, 11, 22, 33, 44, 5, 6, 1.5, b"\x00\xff" * 500)
    return replace(plain, **fields)


def raw(path: Path, query: str, *values: Any) -> list[tuple]:
    """What any SQLite program sees in the file, or changes in it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(query, values).fetchall()


def complaint(act: Callable[[], Any], path: Path) -> str:
    """The one line that `act` ends in, which names the file."""
    with pytest.raises(IntrafusionError) as caught:
        act()
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@contextmanager
def process(work: Callable[..., None], *args: Any) -> Iterator[tuple[Any, Connection]]:
    """A real process that does `work(pipe, *args)`, and our end of the pipe; it does not outlive the block."""
    here, there = SERVER.Pipe()
    child = SERVER.Process(target=work, args=(there, *args))
    child.start()
    there.close()
    try:
        yield child, here
    finally:
        child.kill()
        child.join(PATIENCE)
        child.close()
        here.close()


def heard(pipe: Connection) -> Any:
    assert pipe.poll(PATIENCE)
    return pipe.recv()


def rest(pipe: Connection) -> Iterator[Any]:
    """What a process that has ended still said."""
    with suppress(EOFError):
        while True:
            yield pipe.recv()


def claim_and_wait(pipe: Connection, path: Path) -> None:
    with Store(path) as store:
        pipe.send(store.claim(PruneSpec(), CPU))
        pipe.recv()


def lock_and_wait(pipe: Connection, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        pipe.send("locked")
        pipe.recv()


class Pipes:
    """The pipe of a process that another program started: lines."""

    def send(self, what: Any) -> None:
        print(what, flush=True)

    def recv(self) -> str:
        return sys.stdin.readline()


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def small_disk(folder: Path) -> list[str]:
    """A command, up to its last word, that does this word where `folder` is a disk of 6 MB, which nobody else sees."""
    mount = shlex.join(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)])
    for rights in ("-m", "-rm"):
        command = ["unshare", rights, "sh", "-c", f'{mount} && eval "$0"']
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    pytest.skip("needs the right to mount a small disk")
