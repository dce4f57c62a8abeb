"""Tasks that a hostile file could cause in a child process. Each is called with the child's folder and `tell`."""

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path


def _mark(folder: Path, pid: int | None = None) -> None:
    (folder / f"pid{pid or os.getpid()}").touch()


def tells(folder, tell, given):
    tell(1, 2)
    print("not on the pipe")
    names = sorted(os.environ)
    return {"given": given, "environment": names, "temporary": tempfile.gettempdir(), "flags": sys.flags.isolated}


def loops(folder, tell):
    _mark(folder)
    while True:
        pass


def waits(folder, tell):
    _mark(folder)
    time.sleep(600)


def allocates(folder, tell):
    _mark(folder)
    return len([bytearray(8 << 20) for _ in range(1000)])


def allocates_and_hides_it(folder, tell):
    try:
        allocates(folder, tell)
    except MemoryError as error:
        raise ValueError("out of sorts") from error


def shares_memory(folder, tell):
    """Allocate shared memory, which no process limit covers."""
    _mark(folder)
    whole = mmap.mmap(-1, 2 << 30)
    for place in range(0, 2 << 30, 4096):
        whole[place] = 1
    time.sleep(600)


def crashes(folder, tell):
    _mark(folder)
    ctypes.string_at(0)


def kills_itself(folder, tell):
    _mark(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def writes(folder, tell):
    _mark(folder)
    with open(folder / "large", "wb") as file:
        while True:
            file.write(bytes(1 << 20))


def opens_files(folder, tell):
    _mark(folder)
    return [os.open(folder, os.O_RDONLY) for _ in range(2000)]


def connects(folder, tell, port):
    _mark(folder)
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


def forks(folder, tell):
    _mark(folder)
    if os.fork() == 0:
        _mark(folder)
        time.sleep(600)
    time.sleep(0.2)
    return "forked"


def _on_the_pipe(content: bytes) -> None:
    for number in range(3, 20):
        with contextlib.suppress(OSError):
            os.write(number, content)


def prints(folder, tell):
    _mark(folder)
    _on_the_pipe(b"\x00\xff{\n")
    time.sleep(600)


def prints_without_end(folder, tell):
    _mark(folder)
    while True:
        _on_the_pipe(b"x" * 4096)


def says_nonsense(folder, tell):
    _mark(folder)
    _on_the_pipe(b'{"done": ["many", -1]}\n')
    time.sleep(600)


def says_deep_nonsense(folder, tell):
    _mark(folder)
    _on_the_pipe(b"[" * 100_000 + b"\n")
    time.sleep(600)


def leaves(folder, tell):
    _mark(folder)
    os._exit(0)


def fails(folder, tell):
    _mark(folder)
    raise TypeError("of no use\nat all")


def answers_no_json(folder, tell):
    _mark(folder)
    return object()


def writes_elsewhere(folder, tell, place):
    """Try to change files inside and outside the child's folder. Return the names of the actions that succeeded."""
    outside, found = Path(place), []
    (folder / "made").mkdir()
    for name, act in {
        "own": lambda: (folder / "made" / "x").write_text("x"),
        "own, moved": lambda: (folder / "made" / "x").rename(folder / "tmp" / "x"),
        "null": lambda: Path(os.devnull).write_text("x"),
        "read": lambda: (outside / "there").read_text(),
        "write": lambda: (outside / "there").write_text("x"),
        "make": lambda: (outside / "new").write_text("x"),
        "folder": lambda: (outside / "new").mkdir(),
        "link": lambda: (outside / "new").symlink_to("there"),
        "cut": lambda: os.truncate(outside / "there", 0),
        "move": lambda: (outside / "there").rename(folder / "tmp" / "there"),
        "remove": lambda: (outside / "there").unlink(),
    }.items():
        with contextlib.suppress(OSError):
            act()
            found.append(name)
    return found
