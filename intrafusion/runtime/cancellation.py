"""Cooperative interruption of long work: computations call `checkpoint` between batches, layers and epochs.

At a checkpoint, a cancelled job ends, and a job whose turn is over waits while another job computes (see `jobs`). Code that
holds a lock at a checkpoint therefore holds it while other jobs compute. A thread that waits for such a lock must call
`checkpoint(idle=True)` while it waits, as `cache.Cache` does, so that the job that holds the lock gets its turn.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

OnProgress = Callable[[int, int], None]  # called with the parts done and the parts in total, 0 if that is not known


class Cancelled(BaseException):
    """Raised when work was asked to stop. Not an Exception, so that it is not handled as a failure."""


class Turns(Protocol):
    """Work that takes turns with other work. waited: seconds spent waiting for turns."""

    waited: float

    def pass_on(self, idle: bool = False) -> None:
        """Wait for the next turn if this one is over and other work waits. idle: if other work waits at all."""

    def step_aside(self) -> None:
        """Continue without a turn, concurrently with other work."""

    def come_back(self) -> None:
        """Wait for a turn, after `step_aside`."""


@dataclass(frozen=True)
class _Work:
    stop: threading.Event
    turns: Turns | None


_work: ContextVar[_Work | None] = ContextVar("work", default=None)


@contextmanager
def stoppable(stop: threading.Event, turns: Turns | None = None) -> Iterator[None]:
    """Within this block, in this thread, make `checkpoint` raise Cancelled once `stop` is set.

    turns: the turns that this work takes; None for those of the enclosing block.
    """
    outer = _work.get()
    before = _work.set(_Work(stop, turns or (outer.turns if outer is not None else None)))
    try:
        yield
    finally:
        _work.reset(before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this block, in the main thread, make Ctrl-C or SIGTERM end work at the next `checkpoint`; a second one, at once.

    A stopped run therefore never leaves its state in the middle of a step. If a signal arrives and no checkpoint follows, the
    block ends with Cancelled. After a signal, SIGURG raises Cancelled wherever the work is: see `shutdown`. In other threads,
    which receive no signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = threading.Event()

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    def press(number: int, frame: object) -> None:
        is_ending = isinstance(sys.exception(), Cancelled | KeyboardInterrupt | GeneratorExit)  # it is already cleaning up
        if stop.is_set() and not is_ending:
            raise Cancelled

    handlers = {signal.SIGINT: ask, signal.SIGTERM: ask}
    if hasattr(signal, "SIGURG"):
        handlers[signal.SIGURG] = press
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with stoppable(stop):
            yield
            checkpoint()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def checkpoint(idle: bool = False) -> None:
    """Raise Cancelled if this thread's work was asked to stop; let other work compute if its turn is over.

    Outside of such work, do nothing. Call it wherever a long computation can safely end or pause: it costs a fifth of a
    microsecond. idle: this work only waits for something, so its turn is over at once.
    """
    work = _work.get()
    if work is None:
        return
    if work.turns is not None and not work.stop.is_set():
        work.turns.pass_on(idle)
    if work.stop.is_set():
        raise Cancelled


@contextmanager
def beside() -> Iterator[None]:
    """Within this block, let other work compute at the same time: for a long call without checkpoints.

    Use it only for third-party code that needs none of our locks and no random numbers of the process.
    """
    work = _work.get()
    if work is None or work.turns is None:
        yield
        return
    work.turns.step_aside()
    try:
        yield
    finally:
        work.turns.come_back()


def clock() -> float:
    """Return `time.perf_counter`, minus the time that this thread's work has spent waiting for turns."""
    work = _work.get()
    return time.perf_counter() - (work.turns.waited if work is not None and work.turns is not None else 0.0)
