"""The end of a command that was asked to stop by a signal: within a second, whatever it computes.

A first signal asks the work (`cancellation.interruptible`), which ends at its next checkpoint and tidies up. Other code may
reach no checkpoint for minutes, and while C code keeps the interpreter's lock no line of Python runs. So a process of its own
(`ending_watcher`) hears of every signal through the interpreter's wakeup file. Unless the command ends by itself, the watcher
interrupts the work where it stands, then has a thread end the process, and at last kills it. What is on disk survives that.
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

STATUS = 130  # of a command that was cancelled
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CANCELLED = "cancelled; the results printed so far are complete"
_FINISHING = "cancelled: this step of training is completed first and its state kept; a second signal ends it at once"

_watcher: subprocess.Popen | None = None
_once = threading.Lock()


def watch() -> None:
    """Let SIGINT and SIGTERM end this process within a second from now on: the process must be the command line's own.

    Does nothing where the process is watched already, and on systems that are not POSIX.
    """
    global _watcher
    if os.name != "posix" or _watcher is not None:
        return
    for number in SIGNALS:
        signal.signal(number, lambda *_: _leave())  # while there is no work that could be asked to stop
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
    os.set_blocking(_watcher.stdin.fileno(), False)  # as a wakeup file must be
    signal.set_wakeup_fd(_watcher.stdin.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_obey, args=(_watcher.stdout,), daemon=True).start()


def cancelled() -> int:
    """Say on stderr that the command was cancelled; its status. A watched process ends here: an orderly end takes a second."""
    if _watcher is not None:
        _leave()
    log.say(_CANCELLED)
    return STATUS


@contextmanager
def finishing() -> Iterator[None]:
    """Within this block a first signal is given the time that the work needs to reach a checkpoint and to keep its state."""
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
    """Whether this process runs the command line: while Python imports the package for `python -m`, argv[0] is "-m"."""
    program = next(iter(sys.argv), "")
    return program == "-m" or Path(program).stem == "intrafusion"


if _is_command():  # before anything that takes seconds to import
    watch()
