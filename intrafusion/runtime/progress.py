"""Progress of work in steps, estimates of the time that it still takes, and their formatting as text."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

_FAR, _SLACK = 3.0, 2.0  # a result is far too late after this many times the longest so far, plus seconds
_FREE = 0.001  # seconds: a result that took less was cached, and says nothing about the others

T = TypeVar("T")


@dataclass(frozen=True)
class Progress(Generic[T]):
    """Progress of work in steps. doing: the present step as text. share: in [0, 1]. result: None before there is any."""

    doing: str
    share: float
    result: T | None = None


class Arrivals:
    """Records how much of the work was done when. Work is counted in parts, like its total; seconds count only its own time."""

    def __init__(self) -> None:
        self.done = 0.0
        self._seen = 0.0  # seconds spent up to the last result
        self._marks = [(0.0, 0.0)]  # cumulative work and seconds after each result that took time, without the others

    def add(self, work: float, spent: float) -> None:
        """Record a result: `work` more is done, after `spent` seconds in total."""
        took, self._seen = spent - self._seen, spent
        self.done += work
        if took > _FREE:
            done, seconds = self._marks[-1]
            self._marks.append((done + max(0.0, work), seconds + took))

    def seconds_left(self, total: float, spent: float) -> float | None:
        """Return the seconds left at the pace of the later half of the work done so far; None before two results took time.

        The beginning is left out because it loads what all results share. Between two results the time counts down, but by at
        most one result's worth, because the following results are still to come. Also None if a result takes far longer than
        the longest of those: their pace no longer applies.
        """
        done, seconds = self._marks[-1]
        if len(self._marks) < 3 or done == 0:
            return None
        half = bisect_right(self._marks, (done / 2, math.inf)) - 1
        work, results = done - self._marks[half][0], len(self._marks) - 1 - half
        longest = max(after[1] - before[1] for before, after in pairwise(self._marks[half:]))
        waited = spent - self._seen
        if waited > _FAR * longest + _SLACK:
            return None
        pace = (seconds - self._marks[half][1]) / work
        left = total - self.done
        return max(left - waited / pace, left - work / results, 0.0) * pace


def in_words(seconds: float) -> str:
    """Return a duration as text, rounded like an estimate: "12 s" (1 s at least), "2 min 30 s", "25 min", "1 h 20 min"."""
    if seconds < 59.5:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 595:
        return _mixed(10 * round(seconds / 10), "min", "s")
    if seconds < 3570:
        return f"{seconds / 60:.0f} min"
    return _mixed(10 * round(seconds / 600), "h", "min")


def _mixed(count: int, big: str, small: str) -> str:
    whole, rest = divmod(count, 60)
    return f"{whole:,} {big} {rest} {small}" if rest else f"{whole:,} {big}"
