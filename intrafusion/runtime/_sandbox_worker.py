"""The child process of `sandbox`: limits itself, runs one task on an untrusted file, and answers on a pipe.

It runs as a script (`python -I`, with its folder as the argument), reads `request.json` there, and writes JSON lines to stdout:
{"ready": bytes of memory}, then {"done": [n, of]} and {"note": a line}, and at the end one of {"answer": ...}, {"refused":
why}, {"memory": true} and {"failed": type and message, "traceback": ...}. Namespaces and Landlock are set up first, because
they need a single-threaded process; then libraries are imported; limits come last, so that what the libraries use does not
count.
"""

import ctypes
import importlib
import json
import logging
import os
import signal
import struct
import sys
import time
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # sched.h
_PARENT_DEATH, _NO_NEW_PRIVILEGES = 1, 38  # prctl.h
_MAKE_RULES, _ADD_RULE, _RESTRICT = 444, 445, 446  # numbers of Landlock's system calls, the same on all architectures
_BENEATH, _WRITE = 1, 1 << 1  # landlock.h: a rule type, and the right to write a file
_CHANGES = tuple(
    sum(1 << bit for bit in (1, *range(4, most))) for most in (13, 14, 15)
)  # all rights to change files, by Landlock version
_SPARE = 64 << 20  # bytes reserved for reporting that memory ran out
_FILES = 256  # most open files
_OFTEN = 0.1  # least seconds between two progress lines


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    say = _speaker()
    _leave_network()
    _end_with(request["parent"])
    _go_first()
    _change_nothing_outside(folder)
    sys.path[:] = request["path"]
    package = types.ModuleType("intrafusion")  # importing the real package imports all its parts and takes twice as long
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["intrafusion"] = package
    module, _, name = request["task"].partition(":")
    work = getattr(importlib.import_module(module), name)
    _limit(**request["limits"])
    say(ready=_resident())
    say(**_outcome(work, folder, say, request["arguments"]))
    os._exit(0)


def _speaker() -> Callable[..., None]:
    """Return a function that writes JSON lines to the original stdout, and redirect stdout to stderr."""
    lines: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**about: Any) -> None:
        lines.write(json.dumps(about) + "\n")
        lines.flush()

    return say


def _outcome(work: Callable[..., Any], folder: Path, say: Callable[..., None], arguments: dict[str, Any]) -> dict[str, Any]:
    from intrafusion.errors import IntrafusionError, one_line

    logging.basicConfig(level=logging.WARNING, handlers=[_Notes(say)])
    try:
        return {"answer": work(folder, _progress(say), **arguments)}
    except BaseException as error:  # an untrusted file can make libraries raise anything
        _spare_memory()
        if _ran_out(error):
            return {"memory": True}
        if isinstance(error, IntrafusionError):
            return {"refused": str(error)}
        said = f"{type(error).__name__}: {one_line(error)}"
        return {"failed": said, "traceback": "".join(traceback.format_exception(error))[-8000:]}


def _ran_out(error: BaseException | None) -> bool:
    """Return whether an error, or an error that caused it, means out of memory."""
    from intrafusion.errors import is_out_of_memory

    while error is not None:
        if is_out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Notes(logging.Handler):
    """Logging handler that forwards the package's messages for the user."""

    def __init__(self, say: Callable[..., None]):
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("intrafusion"):
            self._say(note=record.getMessage())


def _progress(say: Callable[..., None]) -> Callable[[int, int], None]:
    last = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > _OFTEN:
            last = time.monotonic()
            say(done=[done, total])

    return tell


def _leave_network() -> None:
    """Move to an empty network namespace, in a new user namespace, where the system permits it."""
    if sys.platform != "linux":
        return
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NET) == 0:
        with suppress(OSError):  # then the process has no user name, but the same rights
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                Path(f"/proc/self/{name}").write_text(text)


def _go_first() -> None:
    """Make the out-of-memory killer choose this process first."""
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


def _change_nothing_outside(folder: Path) -> None:
    """Give up the right to create, change or remove files outside a folder, where the system has Landlock (Linux 5.13)."""
    if sys.platform != "linux":
        return
    call = ctypes.CDLL(None).syscall
    version = call(_MAKE_RULES, None, ctypes.c_size_t(0), 1)
    if version < 1:  # Landlock is disabled or missing
        return
    rights = _CHANGES[min(version, len(_CHANGES)) - 1]
    rules = call(_MAKE_RULES, ctypes.byref(ctypes.c_uint64(rights)), ctypes.c_size_t(8), 0)
    for place, permitted in ((str(folder), rights), (os.devnull, _WRITE)):
        opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
        call(_ADD_RULE, rules, _BENEATH, struct.pack("=Qi", permitted, opened), 0)
        os.close(opened)
    ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    call(_RESTRICT, rules, 0)
    os.close(rules)


def has_left(folder: Path, tell: Callable[[int, int], None], network: str) -> bool:
    """Task: return whether this process is in another network namespace than `network`."""
    return os.readlink("/proc/self/ns/net") != network


def _end_with(parent: int) -> None:
    """Have this process killed when its parent ends; exit now if the parent has already ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    if os.name == "posix" and os.getppid() != parent:
        os._exit(1)


def _limit(seconds: int, grow: int, file: int) -> None:
    """Set the limits of this process.

    seconds: processor time from now. grow: bytes of memory beyond what it holds now. file: bytes of a file that it writes.
    """
    if os.name != "posix":
        return
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds += int(used.ru_utime + used.ru_stime) + 1
    _set(resource.RLIMIT_CORE, 0)
    _set(resource.RLIMIT_FSIZE, file)
    _set(resource.RLIMIT_NOFILE, _FILES)
    _set(resource.RLIMIT_NPROC, 0)  # neither processes nor threads; root is exempt
    _set(resource.RLIMIT_CPU, seconds, seconds + 5)
    if sys.platform == "linux":
        _set(resource.RLIMIT_DATA, _status("VmData") + grow, _status("VmData") + grow + _SPARE)


def _set(kind: int, soft: int, hard: int | None = None) -> None:
    import resource

    most = resource.getrlimit(kind)[1]
    soft, hard = (value if most == resource.RLIM_INFINITY else min(value, most) for value in (soft, hard or soft))
    resource.setrlimit(kind, (soft, hard))


def _spare_memory() -> None:
    """Raise the memory limit slightly, so that the outcome can still be reported."""
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _resident() -> int:
    """Return the bytes of memory that this process holds; 0 where the system does not tell."""
    return _status("VmRSS") if sys.platform == "linux" else 0


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
