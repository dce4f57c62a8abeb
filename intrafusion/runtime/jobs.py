"""Background work of the app: started once for each key, observed by anyone, in turns, cancelled at any time.

One job computes at a time, so that timings mean something and the device is not shared. The turn goes round: a job that has
computed for half a second lets another one, at its next result or `cancellation.checkpoint`, so that a short job never waits
for the end of a long one; `Line` says which. Jobs belong to the process, not to a browser session: a reload, or a second
reader, finds them running; those that nobody waits for any more end after a while, see `Jobs.tend`.
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
_LATE = 2.0  # seconds that turns may take longer than they should


class Job(Generic[T]):
    """An iterator drained in a thread, whenever the job has its turn.

    key, title: which job this is, to the program and in words. total: how many parts its work has, 0 when not known.
    who: the reader who asked for it. askers: the sessions that wait for it; none where it is to end by itself alone.
    waited: seconds of waiting for its turns so far, see `cancellation.Turns`.
    asked, started: time.monotonic() when it was asked for, and of its first turn (None before). error: one line, when it
    failed; error_id: where the log has it, when nobody expected it. held: bytes of its results, once it has ended.
    See `Jobs.start` for the rest.
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
        self.left: float | None = None  # since when none of the askers has been here
        self.waited = 0.0
        self.asked, self.started = time.monotonic(), None  # type: float, float | None
        self.error: str | None = None
        self.error_id: str | None = None
        self.held = 0
        self._work: Callable[[], Iterator[T]] | None = work
        self._part = part
        self._parts: OrderedDict[Hashable, tuple[T, float]] = OrderedDict()
        self._arrivals = Arrivals()
        self._computed: tuple[float, float | None] = 0.0, None  # seconds in earlier turns, when this turn began
        self._waits = time.perf_counter()  # since when, where it waits for a turn
        self._aside: list[torch.Tensor] | None = None  # while it computes beside others: its random numbers
        self._outcome: str | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._line: Line[Job] = line or Line()
        self._line.join(self)
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """waiting (for a turn, be it the first or the next), running or stopping; in the end done, failed or cancelled."""
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
        """What the work gave so far: the last result of each part, in the order in which the parts began."""
        with self._lock:
            return [result for result, _ in self._parts.values()]

    @property
    def done(self) -> float:
        """How many parts of `total` are done, parts of parts included."""
        with self._lock:
            return round(self._arrivals.done, 9)

    @property
    def share(self) -> float | None:
        """How much of its work is done, in [0, 1]; None when `total` is not known."""
        if self.state == "done":
            return 1.0
        return min(self.done / self.total, 1.0) if self.total else None

    @property
    def elapsed(self) -> float:
        """Seconds of its own computing so far; waiting is not counted."""
        before, since = self._computed
        return before if since is None else before + time.perf_counter() - since

    @property
    def waits(self) -> float:
        """Seconds for which it has waited for its next turn."""
        return 0.0 if self._computed[1] is not None else time.perf_counter() - self._waits

    @property
    def seconds_left(self) -> float | None:
        """Seconds of its own computing still to come; None before two results took time, and when `total` is not known."""
        if not (self.total and self.active):
            return None
        with self._lock:
            return self._arrivals.seconds_left(self.total, self.elapsed)

    def cancel(self) -> None:
        """Ask the job to stop, at its next checkpoint or result; what it has computed stays."""
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
        except BaseException as error:  # the page must hear of any failure; the log has the rest
            self.error, self.error_id = explain(error, "job", title=self.title)
        finally:
            self._halt()
            try:
                self.held = held_bytes(self.results)
            finally:
                self._outcome = outcome
            event("job ended", title=self.title, state=outcome, seconds=round(self.elapsed, 3), results=len(self._parts))
            try:
                give_back_memory()  # before the next turn: nobody's timings shall hold it
            finally:
                self._line.leave(self)

    def _compute(self) -> None:
        work, self._work = self._work, None  # it holds models; they go when this returns
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
        """Wait for the next turn where this one is over and another job waits; idle: where another job waits.

        Other threads of the job's work, and what tidies up after it was stopped, have no turn to pass on.
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
        """Go on beside the job whose turn is next; what is computed meanwhile counts."""
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
        """Whether this is the thread that computes, in its turn, for a job that nobody has stopped."""
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
        """Return with the turn, or without one when the job was asked to stop."""
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
    """The states of the process's random numbers, which are the job's for as long as its turn lasts."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _set_chance(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


class Jobs:
    """The process's jobs by key. turn: as `Line` has it.

    When a job starts, those that have ended and that nobody has asked for longest are forgotten, until there are at most
    `limit` jobs, and those that have ended hold at most `memory` bytes.
    """

    def __init__(self, limit: int = 64, turn: float = 0.5, memory: int = 1 << 29):
        self._jobs: OrderedDict[Hashable, Job] = OrderedDict()
        self._limit, self._memory = limit, memory
        self._lock = threading.Lock()
        self._line: Line[Job] = Line(turn)
        atexit.register(self.stop)  # a thread inside torch while the interpreter goes down aborts the process

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
        """The active job of this key, or a new one; a finished one is replaced.

        total: how many parts the work has; 0 when not known. title: what it is, in words ("curve of digits-resnet"). part:
        where several results may come of one part, which part a result is of (any key) and how much of it is done, in [0, 1];
        the part's last result is kept. None: each result is a part of its own. computes: False for work that leaves the device
        alone, such as a download: it neither waits for a turn nor takes one. who: the reader who asks. Other jobs may compute
        whenever `work` yields or calls `cancellation.checkpoint`; `cancellation` says what that means for locks.
        """
        with self._lock:
            job = self._jobs.get(key)
            if job is None or not job.active:
                self._jobs.pop(key, None)
                self._forget()  # before the new one starts, which may end at once
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
        """The active jobs: those that need no turn, then the line, the first of which computes."""
        line = self._line.jobs
        with self._lock:
            others = [job for job in self._jobs.values() if job not in line]
        return [job for job in others + line if job.active]

    def tend(self, is_here: Callable[[str], bool], grace: float, now: float | None = None) -> None:
        """Cancel the jobs that nobody waits for any more: all of whose askers have been away for `grace` seconds.

        is_here: whether a session is here. Jobs without askers go on. To be called every few seconds.
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
        """How many jobs compute before this one does: 0 when it has the turn, or needs none."""
        line = self._line.jobs
        return line.index(job) if job in line else 0

    def seconds_left(self, job: Job) -> float | None:
        """Seconds from now until the job is done, while all in line take turns; None when not known.

        Nor where the job has waited for its turn for longer than they take that were in line before: something else holds.
        """
        left, line = job.seconds_left, self._line.jobs
        if left is None or job not in line:
            return left
        if job.waits > 2 * len(line) * self._line.turn + _LATE:
            return None
        theirs = [other.seconds_left for other in line if other is not job]
        return left + sum(left if other is None else min(left, other) for other in theirs)

    def stop(self, timeout: float = 10) -> None:
        """Cancel every job and wait for each up to `timeout` seconds."""
        with self._lock:
            everyone = {*self._jobs.values(), *self._line.jobs}  # one that tidies up may have been replaced already
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
    """Return what nobody uses to the system: pruned networks sit in reference cycles, and allocators keep what is freed."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if _malloc_trim is not None:
        _malloc_trim(0)
