"""How long work still takes: estimated from when its results came, and said in words."""

import math
from bisect import bisect_right
from itertools import pairwise

_FAR, _SLACK = 3.0, 2.0  # times the longest result so far, and seconds more, after which one is far later than expected
_FREE = 0.001  # seconds: a result that came sooner was known before, and says nothing of the others


class Arrivals:
    """When how much of the work was done. Work is counted in parts, as its total is; seconds are those spent on it alone."""

    def __init__(self) -> None:
        self.done = 0.0
        self._seen = 0.0  # seconds spent before the last result
        self._marks = [(0.0, 0.0)]  # work and seconds after each result that took time; the others are left out of both

    def add(self, work: float, spent: float) -> None:
        """A result is there: so much more work is done, after so many seconds spent in all."""
        took, self._seen = spent - self._seen, spent
        self.done += work
        if took > _FREE:
            done, seconds = self._marks[-1]
            self._marks.append((done + max(0.0, work), seconds + took))

    def seconds_left(self, total: float, spent: float) -> float | None:
        """Seconds to come at the pace of the later half of the work done so far; None before two results took time.

        The beginning is left out because it loads what all results share. Between two results the time runs down, but
        by no more than one result's worth, as those behind it are still to come. None again where a result takes far
        longer than the longest of those: what they say of the pace is no longer true.
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
    """A duration, no more exact than an estimate can be: "12 s" (1 s at least), "2 min 30 s", "25 min", "1 h 20 min"."""
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
