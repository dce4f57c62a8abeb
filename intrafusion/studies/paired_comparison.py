"""Paired comparison of two results on the same images; it detects smaller differences than comparing two intervals."""

import math
from dataclasses import dataclass

import numpy as np

from intrafusion.errors import IntrafusionError
from intrafusion.studies.measurement import Result


@dataclass(frozen=True)
class Paired:
    """The paired comparison of two results on the same `count` images.

    difference: accuracy of the first minus that of the second, as a fraction. interval: of that difference, by
    `matched_wald`. only_first, only_second: number of images that only the first or only the second classifies correctly.
    """

    difference: float
    interval: tuple[float, float]
    only_first: int
    only_second: int
    count: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.interval[0] <= 0 <= self.interval[1]

    @property
    def p(self) -> float:
        """McNemar's exact two-sided p: how often a fair coin splits the discordant images at least as unevenly."""
        from scipy.stats import binom  # here, because the import takes a second

        disputed = self.only_first + self.only_second
        return min(1.0, 2 * float(binom.cdf(min(self.only_first, self.only_second), disputed, 0.5)))


def paired(first: Result, second: Result, z: float = 1.959964) -> Paired:
    """Compare two results on the images that both were measured on.

    Both follow the same order of images, so these are the images of the shorter result. Raises IntrafusionError if the
    results were measured on different images.
    """
    for name in ("dataset", "data_path", "limit", "seed"):
        ours, theirs = getattr(first.spec, name), getattr(second.spec, name)
        if ours != theirs:
            raise IntrafusionError(f"cannot compare results on different images: {name} is {ours} and {theirs}")
    if first.total != second.total:
        raise IntrafusionError(f"cannot compare results on different images: {first.total:,} and {second.total:,} of them")
    count = min(first.count, second.count)
    right, also = _answers(first, count), _answers(second, count)
    only_first, only_second = (int(np.bitwise_count(bits).sum()) for bits in (right & ~also, also & ~right))
    return Paired(
        (only_first - only_second) / count,
        matched_wald(only_first, only_second, count, z),
        only_first,
        only_second,
        count,
    )


def matched_wald(only_first: int, only_second: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the interval of the difference of two proportions on matched pairs (95 % by default), clipped to [-1, 1].

    Wald's interval with half a pair added to each of the four cells: Agresti and Min, "Simple improved confidence intervals
    for comparing matched proportions", Statistics in Medicine 24, 2005. McNemar's test is `Paired.p`. Raises
    IntrafusionError for impossible counts.
    """
    if min(only_first, only_second) < 0 or only_first + only_second > count or count < 1:
        raise IntrafusionError(f"cannot compute an interval for {only_first} and {only_second} of {count} pairs")
    b, c, n = only_first + 0.5, only_second + 0.5, count + 2
    half = z * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return max(-1.0, (b - c) / n - half), min(1.0, (b - c) / n + half)


def _answers(result: Result, count: int) -> np.ndarray:
    """Return which of the first `count` images are classified correctly, packed, and padded with zeros.

    uint8 (ceil(count / 8),). Raises IntrafusionError if the result holds fewer answers.
    """
    size = -(-count // 8)
    bits = np.frombuffer(result.correct, np.uint8, size).copy() if len(result.correct) >= size else None
    if bits is None:
        raise IntrafusionError(f"this result has no predictions for {count:,} images; measure it again")
    if spare := size * 8 - count:
        bits[-1] &= 0xFF << spare & 0xFF
    return bits
