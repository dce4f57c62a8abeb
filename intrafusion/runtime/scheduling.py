"""Turn-taking among jobs: turns alternate between the longest-waiting job and the reader who has computed least recently."""

import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

_HALF = 60.0  # half-life in seconds of past computing
_FORGET = 0.01  # seconds of past computing that are negligible
_READERS = 1000  # readers remembered before negligible ones are dropped


class Waiting(Protocol):
    """An entry in a line. who: the reader it computes for. left: when that reader went away, None while here."""

    who: str
    left: float | None


One = TypeVar("One", bound=Waiting)


class Line(Generic[One]):
    """Jobs that take turns: one computes, the others wait.

    Every other turn goes to the job that has waited longest, so that no job waits for more than two turns of each job that was
    in line before it. The turns between go to readers who are here, and among those to the one who has computed least in the
    last minute or so. A newcomer is therefore next, however much the others have requested.

    turn: seconds after which a computing job should yield, if others wait.
    """

    def __init__(self, turn: float = 0.5, clock: Callable[[], float] = time.monotonic):
        self.turn = turn
        self._clock = clock
        self._now: One | None = None
        self._waiting: list[One] = []  # the longest-waiting first
        self._turns = 0
        self._spent: dict[str, tuple[float, float]] = {}  # per reader: decayed seconds of computing, and their time
        self._changed = threading.Condition()

    @property
    def jobs(self) -> list[One]:
        """The computing job, then the waiting ones, the longest-waiting first."""
        with self._changed:
            return [*filter(None, [self._now]), *self._waiting]

    @property
    def others_wait(self) -> bool:
        """Whether other jobs wait for the turn of the computing one."""
        return bool(self._waiting)

    def join(self, job: One) -> None:
        with self._changed:
            self._waiting.append(job)

    def leave(self, job: One) -> None:
        with self._changed:
            if self._now is job:
                self._now = None
            elif job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify_all()

    def pass_on(self, job: One) -> None:
        """End a job's turn and put it at the end of the line."""
        with self._changed:
            self._now = None
            self._waiting.append(job)
            self._changed.notify_all()

    def wait(self, job: One, stop: threading.Event) -> None:
        """Return when the job has its turn, or `stop` is set."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_turn_of(job) or stop.is_set())

    def wake(self) -> None:
        """Wake the waiting jobs, so that they notice a request to stop."""
        with self._changed:
            self._changed.notify_all()

    def spend(self, who: str, seconds: float) -> None:
        """Record that a reader has computed for `seconds`."""
        with self._changed:
            now = self._clock()
            self._spent[who] = self._recent(who, now) + seconds, now
            if len(self._spent) > _READERS:
                self._spent = {who: self._spent[who] for who in self._spent if self._recent(who, now) > _FORGET}

    def _is_turn_of(self, job: One) -> bool:
        if self._now is None and self._waiting:
            self._turns += 1
            first = self._waiting[0] if self._turns % 2 else min(self._waiting, key=self._claims(self._clock()))
            self._waiting.remove(first)
            self._now = first
            self._changed.notify_all()
        return self._now is job

    def _claims(self, now: float) -> Callable[[One], tuple[bool, float]]:
        """Return the sort key of jobs for a turn: the least one goes first."""
        return lambda job: (job.left is not None, self._recent(job.who, now))

    def _recent(self, who: str, now: float) -> float:
        """Return the seconds that a reader has computed recently, with exponential decay."""
        spent, when = self._spent.get(who, (0.0, 0.0))
        return spent * 0.5 ** ((now - when) / _HALF)
