"""Stopping long work where it stands: computations call `checkpoint` between batches, and a job's stop reaches them there."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


class Cancelled(BaseException):
    """Somebody asked this work to stop. No Exception, so that nobody takes it for a failure that can be answered."""


@contextmanager
def stoppable(stop: threading.Event) -> Iterator[None]:
    """Within this block, and this thread, `checkpoint` raises Cancelled once `stop` is set."""
    before = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this block, of the main thread, Ctrl-C or a SIGTERM ends work at its next `checkpoint`; a second one, at once.

    So that what a run leaves behind when it is stopped is never in the middle of a step. Where a signal came and no
    checkpoint after it, the block ends with Cancelled. After a signal, SIGURG raises it wherever the work stands: see `ending`.
    In other threads, which hear of no signals, this does nothing.
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


def checkpoint() -> None:
    """Raise Cancelled when this thread's work was asked to stop; outside of such work, do nothing.

    Call it wherever a long computation could end without harm: it costs a tenth of a microsecond. It never waits, because a
    computation may hold a lock here (a memo's, of a key that another job needs); turns are handed on between results only.
    """
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise Cancelled
