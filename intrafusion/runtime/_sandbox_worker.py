"""The child process of `sandbox`: limits itself, does one piece of work on a stranger's file, and answers on a pipe.

It runs as a script (`python -I`, with its folder for an argument), reads `request.json` there, and writes JSON lines to stdout:
{"ready": bytes of memory}, then {"done": [n, of]}, {"note": a line}, and in the end one of {"answer": ...}, {"refused": why},
{"memory": true} and {"failed": type and words, "traceback": ...}. Namespaces and Landlock come first, as they want a process of
one thread, then libraries, and limits last, so that what the libraries take does not count.
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
_MAKE_RULES, _ADD_RULE, _RESTRICT = 444, 445, 446  # system calls of Landlock, on all machines
_BENEATH, _WRITE = 1, 1 << 1  # landlock.h: a kind of rule, and the right to write a file
_CHANGES = tuple(
    sum(1 << bit for bit in (1, *range(4, most))) for most in (13, 14, 15)
)  # all rights to change files, by version
_SPARE = 64 << 20  # bytes that are left to say that memory ran out
_FILES = 256  # that it may have open
_OFTEN = 0.1  # seconds between two lines of progress


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    say = _speaker()
    _leave_network()
    _end_with(request["parent"])
    _go_first()
    _change_nothing_outside(folder)
    sys.path[:] = request["path"]
    package = types.ModuleType("intrafusion")  # the package itself imports all of its parts, which takes twice as long
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["intrafusion"] = package
    module, _, name = request["task"].partition(":")
    work = getattr(importlib.import_module(module), name)
    _limit(**request["limits"])
    say(ready=_resident())
    say(**_outcome(work, folder, say, request["arguments"]))
    os._exit(0)


def _speaker() -> Callable[..., None]:
    """Write lines to what was stdout; what else is printed goes nowhere."""
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
    except BaseException as error:  # whatever a file makes of the libraries that read it
        _spare_memory()
        if _ran_out(error):
            return {"memory": True}
        if isinstance(error, IntrafusionError):
            return {"refused": str(error)}
        said = f"{type(error).__name__}: {one_line(error)}"
        return {"failed": said, "traceback": "".join(traceback.format_exception(error))[-8000:]}


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory was refused, be it the reason of another error's."""
    from intrafusion.errors import is_out_of_memory

    while error is not None:
        if is_out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Notes(logging.Handler):
    """Hands on what the package would have logged for the person."""

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
    """Leave the network for an empty one, as the user of a namespace of its own, where the system permits that."""
    if sys.platform != "linux":
        return
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NET) == 0:
        with suppress(OSError):  # then it has no name, and the same rights
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                Path(f"/proc/self/{name}").write_text(text)


def _go_first() -> None:
    """Be the process that ends where the machine's memory does."""
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


def _change_nothing_outside(folder: Path) -> None:
    """Lose the right to make, change or remove files outside a folder, where the system has Landlock (Linux 5.13)."""
    if sys.platform != "linux":
        return
    call = ctypes.CDLL(None).syscall
    version = call(_MAKE_RULES, None, ctypes.c_size_t(0), 1)
    if version < 1:  # it is turned off, or not there
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
    """A task: whether this is another network namespace than the one of this name."""
    return os.readlink("/proc/self/ns/net") != network


def _end_with(parent: int) -> None:
    """Be killed when the parent ends; end now where it has ended. No core is dumped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    if os.name == "posix" and os.getppid() != parent:
        os._exit(1)


def _limit(seconds: int, grow: int, file: int) -> None:
    """seconds: of processor time from now. grow: bytes of memory above those of now. file: bytes of a file that it writes."""
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
    """Let the end of the work have a little more memory than the work had."""
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    return _status("VmRSS") if sys.platform == "linux" else 0


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
