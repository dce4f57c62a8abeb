"""Whose turn it is to compute: the one who has waited longest, and in between the reader who has computed least of late."""

import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

_HALF = 60.0  # seconds after which computing counts for half
_FORGET = 0.01  # seconds of computing that no longer count
_READERS = 1000  # remembered before those are forgotten


class Waiting(Protocol):
    """What waits in a line. who: the reader it computes for. left: since when that one has been away, None while here."""

    who: str
    left: float | None


One = TypeVar("One", bound=Waiting)


class Line(Generic[One]):
    """Work that takes turns: one computes, the others wait.

    Every other turn goes to whoever has waited longest, so that nobody waits for more than two turns of each who is in line
    before. The turns between go to readers who are here, and of those to the one who has computed least in the last minute
    or so: a newcomer is next, whatever the others have asked for.

    turn: seconds after which work that computes shall let others, when others wait.
    """

    def __init__(self, turn: float = 0.5, clock: Callable[[], float] = time.monotonic):
        self.turn = turn
        self._clock = clock
        self._now: One | None = None
        self._waiting: list[One] = []  # the longest first
        self._turns = 0
        self._spent: dict[str, tuple[float, float]] = {}  # seconds that a reader has computed, as they counted when
        self._changed = threading.Condition()

    @property
    def jobs(self) -> list[One]:
        """Who computes, then who waits, the longest first."""
        with self._changed:
            return [*filter(None, [self._now]), *self._waiting]

    @property
    def others_wait(self) -> bool:
        """Whether somebody wants the turn of the one that computes."""
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
        """End a job's turn; it waits for the next one."""
        with self._changed:
            self._now = None
            self._waiting.append(job)
            self._changed.notify_all()

    def wait(self, job: One, stop: threading.Event) -> None:
        """Return when the job has its turn, or `stop` is set."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_turn_of(job) or stop.is_set())

    def wake(self) -> None:
        """Let those who wait see that a job was asked to stop."""
        with self._changed:
            self._changed.notify_all()

    def spend(self, who: str, seconds: float) -> None:
        """A reader has computed for so long."""
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
        """What says who needs the turn most: the least."""
        return lambda job: (job.left is not None, self._recent(job.who, now))

    def _recent(self, who: str, now: float) -> float:
        """Seconds that a reader has computed of late."""
        spent, when = self._spent.get(who, (0.0, 0.0))
        return spent * 0.5 ** ((now - when) / _HALF)
