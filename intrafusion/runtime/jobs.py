"""Background jobs of the app: started once per key, visible to every session, run in turns, cancellable at any time.

Only one job computes at a time, so that timings are meaningful and the device is not shared. Turns rotate: a job that has
computed for half a second yields to another one at its next result or `cancellation.checkpoint`, so that a short job never
waits for a long one to end; `Line` decides which is next. Jobs belong to the process, not to a browser session: they survive a
reload, and a second reader sees them running. Jobs that nobody waits for any more end after a while, see `Jobs.tend`.
"""

import atexit
import ctypes
import gc
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import torch

from intrafusion.runtime.cache import held_bytes
from intrafusion.runtime.cancellation import Cancelled, checkpoint, stoppable
from intrafusion.runtime.log import event, explain
from intrafusion.runtime.progress import Arrivals
from intrafusion.runtime.scheduling import Line

T = TypeVar("T")
Part = Callable[[Any], tuple[Hashable, float]]
_LATE = 2.0  # seconds by which turns may overrun


class Job(Generic[T]):
    """An iterator that a thread consumes whenever the job has its turn.

    key, title: identify the job, for the program and as text. total: number of parts of its work, 0 if not known. who: the
    reader who requested it. askers: the sessions that wait for it; empty if it should only end by itself. waited: seconds spent
    waiting for turns so far, see `cancellation.Turns`. asked, started: time.monotonic() of the request, and of its first turn
    (None before). error: one line, if it failed; error_id: id of the log entry, if the error was unexpected. held: bytes of its
    results, once it has ended. See `Jobs.start` for the other arguments.
    """

    def __init__(
        self,
        key: Hashable,
        total: int,
        work: Callable[[], Iterator[T]],
        title: str = "",
        part: Part | None = None,
        line: "Line[Job] | None" = None,
        who: str = "",
    ):
        self.key, self.total, self.title, self.who = key, total, title, who
        self.askers: set[str] = set()
        self.left: float | None = None  # time since which none of the askers has been here
        self.waited = 0.0
        self.asked, self.started = time.monotonic(), None  # type: float, float | None
        self.error: str | None = None
        self.error_id: str | None = None
        self.held = 0
        self._work: Callable[[], Iterator[T]] | None = work
        self._part = part
        self._parts: OrderedDict[Hashable, tuple[T, float]] = OrderedDict()
        self._arrivals = Arrivals()
        self._computed: tuple[float, float | None] = 0.0, None  # seconds in earlier turns, start of this turn
        self._waits = time.perf_counter()  # start of the current wait for a turn
        self._aside: list[torch.Tensor] | None = None  # its random state, while it computes beside others
        self._outcome: str | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._line: Line[Job] = line or Line()
        self._line.join(self)
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """waiting (for its first or next turn), running or stopping; at the end done, failed or cancelled."""
        if self._outcome is not None:
            return self._outcome
        if self._stop.is_set():
            return "stopping"
        return "waiting" if self._computed[1] is None else "running"

    @property
    def active(self) -> bool:
        return self._outcome is None

    @property
    def results(self) -> list[T]:
        """The results so far: the last one of each part, in the order in which the parts began."""
        with self._lock:
            return [result for result, _ in self._parts.values()]

    @property
    def done(self) -> float:
        """Number of parts of `total` that are done, including fractions of parts."""
        with self._lock:
            return round(self._arrivals.done, 9)

    @property
    def share(self) -> float | None:
        """Fraction of the work that is done, in [0, 1]; None if `total` is not known."""
        if self.state == "done":
            return 1.0
        return min(self.done / self.total, 1.0) if self.total else None

    @property
    def elapsed(self) -> float:
        """Seconds of its own computing so far, without waiting."""
        before, since = self._computed
        return before if since is None else before + time.perf_counter() - since

    @property
    def waits(self) -> float:
        """Seconds that it has waited for its next turn."""
        return 0.0 if self._computed[1] is not None else time.perf_counter() - self._waits

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds of its own computing left; None before two results took time, and if `total` is not known."""
        if not (self.total and self.active):
            return None
        with self._lock:
            return self._arrivals.seconds_left(self.total, self.elapsed)

    def cancel(self) -> None:
        """Ask the job to stop at its next checkpoint or result; its results so far are kept."""
        self._stop.set()
        self._line.wake()

    def wait(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def _drain(self) -> None:
        outcome = "failed"
        try:
            with stoppable(self._stop, self):
                self._compute()
            outcome = "done"
        except Cancelled:
            complete = self._part is None and 0 < self.total <= len(self._parts)
            outcome = "done" if complete else "cancelled"
        except BaseException as error:  # the page must show any failure; the log has the details
            self.error, self.error_id = explain(error, "job", title=self.title)
        finally:
            self._halt()
            try:
                self.held = held_bytes(self.results)
            finally:
                self._outcome = outcome
            event("job ended", title=self.title, state=outcome, seconds=round(self.elapsed, 3), results=len(self._parts))
            try:
                give_back_memory()  # before the next turn, so that it distorts no timings
            finally:
                self._line.leave(self)

    def _compute(self) -> None:
        work, self._work = self._work, None  # it holds models, which are freed when this returns
        assert work is not None
        self._take_turn()
        results = iter(work())
        try:
            for result in results:
                self._keep(result)
                checkpoint()
        finally:
            if close := getattr(results, "close", None):
                close()

    def pass_on(self, idle: bool = False) -> None:
        """Wait for the next turn if this one is over and another job waits. idle: if another job waits at all.

        Threads other than the job's own, and cleanup after a stop, have no turn to yield.
        """
        if not self._has_turn:
            return
        since = self._computed[1] or 0.0
        is_over = idle or time.perf_counter() - since >= self._line.turn
        if is_over and self._line.others_wait:
            chance = _chance()
            self._halt()
            self._line.pass_on(self)
            self._wait_for_turn()
            _set_chance(chance)

    def step_aside(self) -> None:
        """Continue concurrently with the job whose turn is next; what is computed meanwhile counts."""
        if self._has_turn:
            self._aside = _chance()
            self._line.leave(self)

    def come_back(self) -> None:
        """Wait for a turn, after `step_aside`."""
        if self._aside is not None and threading.current_thread() is self._thread:
            self._halt()
            self._line.join(self)
            self._wait_for_turn()
            _set_chance(self._aside)
            self._aside = None

    @property
    def _has_turn(self) -> bool:
        """Whether this is the job's own thread, it has the turn, and nobody has stopped the job."""
        return (
            threading.current_thread() is self._thread
            and self._computed[1] is not None
            and self._aside is None
            and not self._stop.is_set()
        )

    def _take_turn(self) -> None:
        self._wait_for_turn()
        if self._stop.is_set():
            raise Cancelled
        event("job started", title=self.title, parts=self.total)
        self.started = time.monotonic()

    def _wait_for_turn(self) -> None:
        """Return with the turn, or without one if the job was asked to stop."""
        self._waits = time.perf_counter()
        self._line.wait(self, self._stop)
        self.waited += time.perf_counter() - self._waits
        if not self._stop.is_set():
            self._computed = self._computed[0], time.perf_counter()

    def _halt(self) -> None:
        before, elapsed = self._computed[0], self.elapsed
        self._computed = elapsed, None
        self._line.spend(self.who, elapsed - before)

    def _keep(self, result: T) -> None:
        elapsed = self.elapsed
        part, share = (len(self._parts), 1.0) if self._part is None else self._part(result)
        with self._lock:
            before = self._parts[part][1] if part in self._parts else 0.0
            self._parts[part] = result, share
            self._arrivals.add(share - before, elapsed)


def _chance() -> list[torch.Tensor]:
    """Return the states of the process's random number generators, which belong to the job during its turn."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _set_chance(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


class Jobs:
    """The process's jobs by key. turn: see `Line`.

    When a job starts, ended jobs are dropped, least recently requested first, until there are at most `limit` jobs, and the
    ended ones hold at most `memory` bytes.
    """

    def __init__(self, limit: int = 64, turn: float = 0.5, memory: int = 1 << 29):
        self._jobs: OrderedDict[Hashable, Job] = OrderedDict()
        self._limit, self._memory = limit, memory
        self._lock = threading.Lock()
        self._line: Line[Job] = Line(turn)
        atexit.register(self.stop)  # a thread inside torch at interpreter shutdown aborts the process

    def get(self, key: Hashable) -> Job | None:
        with self._lock:
            if key in self._jobs:
                self._jobs.move_to_end(key)
            return self._jobs.get(key)

    def start(
        self,
        key: Hashable,
        total: int,
        work: Callable[[], Iterator],
        title: str = "",
        part: Part | None = None,
        computes: bool = True,
        who: str = "",
    ) -> Job:
        """Return the active job of this key, or start one; a finished job is replaced.

        total: number of parts of the work; 0 if not known. title: what it is, as text ("curve of digits-resnet"). part: if
        several results may come from one part, maps a result to its part (any key) and the fraction of that part that is done,
        in [0, 1]; the part's last result is kept. None: each result is a part of its own. computes: False for work that does
        not use the device, such as a download: it neither waits for a turn nor takes one. who: the reader who requests it.
        Other jobs may compute whenever `work` yields or calls `cancellation.checkpoint`; `cancellation` says what that means
        for locks.
        """
        with self._lock:
            job = self._jobs.get(key)
            if job is None or not job.active:
                self._jobs.pop(key, None)
                self._forget()  # before the new one starts, because it may end at once
                job = self._jobs[key] = Job(key, total, work, title, part, self._line if computes else None, who)
            return job

    def _forget(self) -> None:
        ended = [key for key, job in self._jobs.items() if not job.active]
        held = sum(self._jobs[key].held for key in ended)
        for key in ended:
            if len(self._jobs) < self._limit and held <= self._memory:
                return
            held -= self._jobs.pop(key).held

    def queue(self) -> list[Job]:
        """Return the active jobs: those that need no turn, then the line, whose first job computes."""
        line = self._line.jobs
        with self._lock:
            others = [job for job in self._jobs.values() if job not in line]
        return [job for job in others + line if job.active]

    def tend(self, is_here: Callable[[str], bool], grace: float, now: float | None = None) -> None:
        """Cancel abandoned jobs: those whose askers have all been away for `grace` seconds.

        is_here: whether a session is here. Jobs without askers continue. Call it every few seconds.
        """
        now = time.monotonic() if now is None else now
        for job in self.queue():
            if not job.askers or any(map(is_here, job.askers)):
                job.left = None
            elif job.left is None:
                job.left = now
            if job.left is not None and now - job.left >= grace and job.state != "stopping":
                event("job left", title=job.title)
                job.cancel()

    def ahead(self, job: Job) -> int:
        """Return how many jobs compute before this one; 0 if it has the turn, or needs none."""
        line = self._line.jobs
        return line.index(job) if job in line else 0

    def seconds_left(self, job: Job) -> float | None:
        """Return the seconds until the job is done, assuming that all in line take turns; None if not known.

        It is also None if the job has waited longer for its turn than the line should take: something else blocks it.
        """
        left, line = job.seconds_left, self._line.jobs
        if left is None or job not in line:
            return left
        if job.waits > 2 * len(line) * self._line.turn + _LATE:
            return None
        theirs = [other.seconds_left for other in line if other is not job]
        return left + sum(left if other is None else min(left, other) for other in theirs)

    def stop(self, timeout: float = 10) -> None:
        """Cancel every job and wait up to `timeout` seconds for each."""
        with self._lock:
            everyone = {*self._jobs.values(), *self._line.jobs}  # a job that is cleaning up may have been replaced already
        for job in everyone:
            job.cancel()
        for job in everyone:
            job.wait(timeout)


def _find_malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # not glibc
        return None


_malloc_trim = _find_malloc_trim()


def give_back_memory() -> None:
    """Return unused memory to the system: pruned networks are in reference cycles, and allocators keep freed memory."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if _malloc_trim is not None:
        _malloc_trim(0)
