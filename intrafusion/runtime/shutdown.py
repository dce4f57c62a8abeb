"""Termination of a command by a signal: within a second, whatever it computes.

A first signal asks the work to stop (`cancellation.interruptible`); it ends at its next checkpoint and cleans up. Other code
may reach no checkpoint for minutes, and while C code holds the interpreter lock no Python code runs. A separate process
(`_shutdown_watcher`) therefore receives every signal through the interpreter's wakeup file descriptor. Unless the command ends
by itself, the watcher first interrupts the work wherever it is, then has a thread end the process, and finally kills it. Files
on disk survive that.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from intrafusion.runtime import _shutdown_watcher, log

STATUS = 130  # exit status of a cancelled command
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CANCELLED = "cancelled; the results printed so far are complete"
_FINISHING = "cancelled; finishing this training step and saving its state; a second signal stops at once"

_watcher: subprocess.Popen | None = None
_once = threading.Lock()


def watch() -> None:
    """Make SIGINT and SIGTERM end this process within a second from now on; it must be the command line's own process.

    Does nothing if the process is already watched, and on systems that are not POSIX.
    """
    global _watcher
    if os.name != "posix" or _watcher is not None:
        return
    for number in SIGNALS:
        signal.signal(number, lambda *_: _leave())  # until there is work that can be asked to stop
    words = _CANCELLED
    if os.environ.get("INTRAFUSION_LOG") == "json":
        words = json.dumps({"level": "info", "event": "message", "message": words})
    _watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", _shutdown_watcher.__file__, str(os.getpid()), words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    assert _watcher.stdin is not None
    assert _watcher.stdout is not None
    os.set_blocking(_watcher.stdin.fileno(), False)  # as required of a wakeup file descriptor
    signal.set_wakeup_fd(_watcher.stdin.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_obey, args=(_watcher.stdout,), daemon=True).start()


def cancelled() -> int:
    """Report on stderr that the command was cancelled; return its status.

    A watched process exits here, because an orderly exit takes a second.
    """
    if _watcher is not None:
        _leave()
    log.say(_CANCELLED)
    return STATUS


@contextmanager
def finishing() -> Iterator[None]:
    """Within this block, give the work time after a first signal to reach a checkpoint and save its state."""
    _note(_shutdown_watcher.BEGIN)
    try:
        yield
    finally:
        _note(_shutdown_watcher.END)


def _note(what: bytes) -> None:
    if _watcher is not None and _watcher.stdin is not None:
        with suppress(OSError):  # the watcher is gone
            os.write(_watcher.stdin.fileno(), what)


def _obey(orders: IO[bytes]) -> None:
    while order := orders.read(1):
        if order == _shutdown_watcher.WAIT:
            log.say(_FINISHING)
        else:
            _leave()


def _leave() -> None:
    if _once.acquire(blocking=False):
        log.say(_CANCELLED)
        _note(_shutdown_watcher.TOLD)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(STATUS)


def _is_command() -> bool:
    """Return whether this process runs the command line.

    While Python imports the package for `python -m`, argv[0] is "-m".
    """
    program = next(iter(sys.argv), "")
    return program == "-m" or Path(program).stem == "intrafusion"


if _is_command():  # before imports that take seconds
    watch()
