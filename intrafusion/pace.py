"""Stopping long work where it stands: computations call `checkpoint` between batches, and a job's stop reaches them there."""

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


def checkpoint() -> None:
    """Raise Cancelled when this thread's work was asked to stop; outside of such work, do nothing.

    Call it wherever a long computation could end without harm: it costs a tenth of a microsecond. It never waits, because a
    computation may hold a lock here (a memo's, of a key that another job needs); turns are handed on between results only.
    """
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise Cancelled
