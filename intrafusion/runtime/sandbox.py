"""Work on untrusted files in a child process, which may crash, can be ended at any time, and leaves nothing behind.

The child (`_sandbox_worker`) is a new process of the same interpreter. It has a minimal environment and its own temporary
folder. Where the system permits it, it has no network, and no right to change files outside its folder. Its processor time,
memory, open files and file sizes are limited. The parent also watches its memory and run time. At most two children run at a
time; others wait. A child that breaks a limit, or dies, gives a one-line error. A child's answer is as untrusted as the file:
callers must check it again.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from intrafusion.errors import IntrafusionError
from intrafusion.runtime import _sandbox_worker, log
from intrafusion.runtime.cancellation import OnProgress, checkpoint
from intrafusion.runtime.paths import home

MIB = 1 << 20
CHILDREN = 2
Step = tuple[int, int]  # parts done, parts in total
_LOOK = 0.05  # seconds between two checks of a child
_LAST = 5.0  # seconds to exit for a child that has closed its output
_START = 300.0  # seconds that a child may take to import its libraries, on a busy machine
_LINE, _LINES = MIB, 1_000_000  # most bytes of a line, and most lines, that a child may write
_KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "SYSTEMROOT")  # environment variables passed on to a child
_slots = threading.BoundedSemaphore(CHILDREN)


@dataclass(frozen=True)
class Limits:
    """Limits of one child.

    seconds: processor time. grow: bytes of memory beyond those of an idle child. file: bytes of a file that it writes. wall:
    seconds of real time, most of which other work on the machine may take.
    """

    seconds: int = 60
    grow: int = 896 * MIB
    file: int = 2048 * MIB
    wall: float = 300.0


def steps(
    task: str, folder: Path, what: str, limits: Limits, arguments: dict[str, Any], note: Callable[[str], None]
) -> Generator[Step, None, Any]:
    """Run one task in a child process, yielding its progress; return its answer.

    task: "module:function", called in the child as function(folder, tell, **arguments), with JSON for arguments and result;
    tell(done, total) reports a step. folder: the child's own, absolute; the task runs in its subfolder `given`, and the caller
    removes it. what: the file's name, for messages. note: receives lines that the task logs for the user. Raises
    IntrafusionError if the task refuses the file, if the child breaks a limit or dies, and for an invalid answer; Cancelled if
    this thread's work is asked to stop.
    """
    with _slot(), _Child(task, folder, what, limits, arguments) as child:
        return (yield from child.heard(note))


def drained(work: Generator[Step, None, Any], progress: OnProgress | None = None) -> Any:
    """Exhaust a generator of steps and return its result. progress: called with each step."""
    try:
        while True:
            step = next(work)
            if progress:
                progress(*step)
    except StopIteration as end:
        return end.value
    finally:
        work.close()


def is_alone() -> bool:
    """Return whether this system lets a child leave the network."""
    if sys.platform != "linux":
        return False
    network = {"network": os.readlink("/proc/self/ns/net")}
    with tempfile.TemporaryDirectory(prefix="intrafusion-") as folder:
        task = "intrafusion.runtime._sandbox_worker:has_left"
        return drained(steps(task, Path(folder), "nothing", Limits(), network, lambda line: None)) is True


@contextmanager
def _slot() -> Iterator[None]:
    while not _slots.acquire(timeout=_LOOK):
        checkpoint()
    try:
        yield
    finally:
        _slots.release()


class _Child:
    """A child process that runs one task; leaving the block ends it and the processes that it started."""

    def __init__(self, task: str, folder: Path, what: str, limits: Limits, arguments: dict[str, Any]):
        self._task, self._what, self._limits = task, what, limits
        self._idle: int | None = None  # bytes of memory before the task began
        self._grown = 0
        self._ended = False
        self._began = time.monotonic()
        own = {"seconds": limits.seconds, "grow": limits.grow, "file": limits.file}
        request = {"parent": os.getpid(), "path": _path(), "task": task, "limits": own, "arguments": arguments}
        (folder / "request.json").write_text(json.dumps(request))
        for name in ("given", "tmp"):
            (folder / name).mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-I", _sandbox_worker.__file__, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd=folder / "given",
            env=_environment(folder / "tmp"),
            start_new_session=True,
        )

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        seconds = round(time.monotonic() - self._began, 2)
        log.event("check ended", what=self._what, task=self._task, seconds=seconds, grown_mib=self._grown // MIB)

    def heard(self, note: Callable[[str], None]) -> Generator[Step, None, Any]:
        """Yield the child's progress and return its answer."""
        assert self._process.stdout is not None
        for number, line in enumerate(_lines(self._process.stdout)):
            checkpoint()
            self._watch()
            if number > _LINES:
                raise self._nonsense()
            match self._read(line):
                case None:
                    continue
                case {"ready": int(idle)}:
                    self._idle, self._began = idle, time.monotonic()
                case {"done": [int(done), int(total)]} if 0 <= done <= total:
                    yield done, total
                case {"note": str(text)}:
                    note(text)
                case {"answer": answer}:
                    return answer
                case {"refused": str(why)}:
                    raise IntrafusionError(why)
                case {"memory": True}:
                    raise self._too_large()
                case {"failed": str(why), "traceback": str(where)}:
                    log.event("check failed", what=self._what, task=self._task, reason=why, traceback=where)
                    raise IntrafusionError(f"rejected {self._what}: cannot read it ({why})")
                case _:
                    raise self._nonsense()
        raise self._died(self._end(_LAST))

    def _read(self, line: bytes | None) -> Any:
        try:
            return None if line is None else json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._nonsense() from error

    def _watch(self) -> None:
        """Raise IntrafusionError if the child has exceeded its time or memory limit."""
        most = _START if self._idle is None else self._limits.wall
        if time.monotonic() - self._began > most:
            raise IntrafusionError(f"rejected {self._what}: checking it took more than {most:,.0f} s")
        if self._idle:
            self._grown = max(self._grown, _resident(self._process.pid) - self._idle)
            if self._grown > self._limits.grow:
                raise self._too_large()

    def _end(self, patience: float = 0.0) -> int:
        """Kill the child and its process group; return its exit status.

        patience: seconds to wait first, for the child to exit with its own status.
        """
        if self._ended:
            return self._process.wait()
        self._ended = True
        if patience:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        if os.name == "posix":
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return self._process.wait()

    def _died(self, status: int) -> IntrafusionError:
        if status == -getattr(signal, "SIGXCPU", 0):
            took = f"{self._limits.seconds:,} s of processor time"
            return IntrafusionError(f"rejected {self._what}: checking it took more than {took}")
        if status < 0:
            return IntrafusionError(f"rejected {self._what}: the process that checked it was killed (signal {-status})")
        return self._nonsense()

    def _too_large(self) -> IntrafusionError:
        most = f"{self._limits.grow // MIB:,} MiB of memory"
        return IntrafusionError(f"rejected {self._what}: checking it takes more than {most}")

    def _nonsense(self) -> IntrafusionError:
        return IntrafusionError(f"rejected {self._what}: the process that checked it ended without a result")


def _lines(pipe: IO[bytes]) -> Iterator[bytes | None]:
    """Yield each line as it arrives, and None whenever none arrives for a while.

    An unterminated line is yielded as it is once it exceeds _LINE bytes.
    """
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(_LOOK):
                yield None
                continue
            if not (new := os.read(pipe.fileno(), 1 << 16)):
                return
            *lines, rest = (rest + new).split(b"\n")
            yield from lines
            if len(rest) > _LINE:
                yield rest


def _resident(pid: int) -> int:
    """Return the bytes of memory that a process holds; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _path() -> list[str]:
    """Return the import path for the child: this package and the libraries of this process."""
    own = str(Path(__file__).parents[2])
    return [own, *(place for place in sys.path if place and place != own and Path(place).is_absolute())]


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    one = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    places = {name: str(folder) for name in ("HOME", "TMPDIR", "TEMP", "TMP")}
    return kept | one | places | {"CUDA_VISIBLE_DEVICES": "", "INTRAFUSION_HOME": str(home().absolute())}
