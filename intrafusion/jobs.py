"""Background work of the app: started once for each key, observed by anyone, cancelled between two results.

One job computes at a time, so that timings mean something and the accelerator is not shared; the others wait their turn.
Jobs belong to the process, not to a browser session: a reload, or a second reader, finds them running.
"""

import atexit
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from intrafusion.errors import IntrafusionError, one_line

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Job(Generic[T]):
    """An iterator drained in a thread. results: what it yielded so far; error: one line, when it failed."""

    def __init__(self, total: int, work: Callable[[], Iterator[T]], turn: threading.Lock):
        self.total = total
        self.results: list[T] = []
        self.error: str | None = None
        self.state = "waiting"  # then "running", and "done", "failed" or "cancelled"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._drain, args=(work, turn), daemon=True)
        self._thread.start()

    @property
    def active(self) -> bool:
        return self.state in ("waiting", "running")

    def cancel(self) -> None:
        """Ask the job to stop; what it has computed stays."""
        self._stop.set()

    def wait(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def _drain(self, work: Callable[[], Iterator[T]], turn: threading.Lock) -> None:
        try:
            while not turn.acquire(timeout=0.1):
                if self._stop.is_set():
                    self.state = "cancelled"
                    return
            exhausted = False
            try:
                if self._stop.is_set():
                    self.state = "cancelled"
                    return
                self.state = "running"
                for result in work():
                    self.results.append(result)
                    if self._stop.is_set():
                        break
                else:
                    exhausted = True
            finally:
                turn.release()
            complete = exhausted or 0 < self.total <= len(self.results)
            self.state = "done" if complete else "cancelled"
        except IntrafusionError as error:
            self.error, self.state = str(error), "failed"
        except Exception as error:  # the page must hear of any failure; the log has the rest
            _log.exception("a background job failed")
            self.error, self.state = (
                f"{type(error).__name__}: {one_line(error)}",
                "failed",
            )


class Jobs:
    """The process's jobs by key, the oldest finished ones forgotten beyond `limit`."""

    def __init__(self, limit: int = 64):
        self._jobs: OrderedDict[Hashable, Job] = OrderedDict()
        self._limit = limit
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        atexit.register(self.stop)  # a thread inside torch while the interpreter goes down aborts the process

    def get(self, key: Hashable) -> Job | None:
        with self._lock:
            return self._jobs.get(key)

    def start(self, key: Hashable, total: int, work: Callable[[], Iterator]) -> Job:
        """The running job of this key, or a new one; a finished one is replaced."""
        with self._lock:
            job = self._jobs.get(key)
            if job is None or not job.active:
                job = self._jobs[key] = Job(total, work, self._turn)
                self._jobs.move_to_end(key)
                for old in [k for k, j in self._jobs.items() if not j.active][: max(0, len(self._jobs) - self._limit)]:
                    del self._jobs[old]
            return job

    def stop(self, timeout: float = 10) -> None:
        """Cancel every job and wait for each up to `timeout` seconds."""
        with self._lock:
            active = [job for job in self._jobs.values() if job.active]
        for job in active:
            job.cancel()
        for job in active:
            job.wait(timeout)
