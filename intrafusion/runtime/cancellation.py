"""Where long work can be interrupted: computations call `checkpoint` between batches, layers and epochs.

There a job that was asked to stop ends, and one whose turn is over waits while another job computes (see `jobs`). Code that
holds a lock at a checkpoint therefore holds it while other jobs compute: whoever waits for such a lock must call
`checkpoint(idle=True)` while it waits, as `cache.Cache` does, so that the job that has the lock gets its turn.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol


class Cancelled(BaseException):
    """Somebody asked this work to stop. No Exception, so that nobody takes it for a failure that can be answered."""


class Turns(Protocol):
    """Work that takes turns with other work. waited: seconds that it has spent waiting for them."""

    waited: float

    def pass_on(self, idle: bool = False) -> None:
        """Wait for the next turn where this one is over and other work waits; idle: where other work waits."""

    def step_aside(self) -> None:
        """Go on without a turn, beside other work."""

    def come_back(self) -> None:
        """Wait for a turn, after `step_aside`."""


@dataclass(frozen=True)
class _Work:
    stop: threading.Event
    turns: Turns | None


_work: ContextVar[_Work | None] = ContextVar("work", default=None)


@contextmanager
def stoppable(stop: threading.Event, turns: Turns | None = None) -> Iterator[None]:
    """Within this block, and this thread, `checkpoint` raises Cancelled once `stop` is set.

    turns: those that this work takes; None for those of the block around this one.
    """
    outer = _work.get()
    before = _work.set(_Work(stop, turns or (outer.turns if outer is not None else None)))
    try:
        yield
    finally:
        _work.reset(before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this block, of the main thread, Ctrl-C or a SIGTERM ends work at its next `checkpoint`; a second one, at once.

    So that what a run leaves behind when it is stopped is never in the middle of a step. Where a signal came and no checkpoint
    after it, the block ends with Cancelled. After a signal, SIGURG raises it wherever the work stands: see `shutdown`. In other
    threads, which hear of no signals, this does nothing.
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
        is_ending = isinstance(sys.exception(), Cancelled | KeyboardInterrupt | GeneratorExit)  # it tidies up
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
    """Raise Cancelled when this thread's work was asked to stop, and let other work compute when its turn is over.

    Outside of such work, do nothing. Call it wherever a long computation could end or pause without harm: it costs a fifth
    of a microsecond. idle: this work only waits for something, so that its turn is over at once.
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
    """Within this block other work may compute at the same time: for a long call that has no checkpoint.

    For code of others alone that needs no lock of ours and no random numbers of the process.
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
    """`time.perf_counter`, but for this thread's work it stands still while that waits for its turn."""
    work = _work.get()
    return time.perf_counter() - (work.turns.waited if work is not None and work.turns is not None else 0.0)
