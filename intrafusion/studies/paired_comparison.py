"""Paired comparison of two results on the same images; it detects smaller differences than comparing two intervals.

Results on all images are compared by the interval of `matched_wald`, which describes other images of the same kind. Results on
the first images only, because the study goes on or has stopped early, are compared by `sequential_interval`, which describes
the difference on all images of the study and may be looked at after every image.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from intrafusion.errors import IntrafusionError
from intrafusion.studies.measurement import Result

_ERROR = 0.05  # probability that any interval of the sequence, at any time, misses the true difference
_BETS = (np.arange(6) + 0.5) / 12  # shares of the capital that are bet on the first image
_MOST = 0.75  # most capital that one image can cost


@dataclass(frozen=True)
class Paired:
    """The paired comparison of two results on the same `count` images, the first of `total`.

    difference: accuracy of the first minus that of the second, as a fraction. interval: 95 %; if `complete`, of the difference
    on other images of the same kind, by `matched_wald`; if not, of the difference on all `total` images, by
    `sequential_interval`. only_first, only_second: number of images that only the first or only the second classifies
    correctly.
    """

    difference: float
    interval: tuple[float, float]
    only_first: int
    only_second: int
    count: int
    total: int

    @property
    def complete(self) -> bool:
        """Whether these are all images of the study."""
        return self.count == self.total

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.interval[0] <= 0 <= self.interval[1]

    @property
    def p(self) -> float:
        """The p-value of a fair coin on the discordant images, for which it is chance which of the two is right.

        If `complete`, McNemar's exact two-sided p: how often the coin splits them at least as unevenly. If not, a p that holds
        at any time: the coin's likelihood over that of a coin of unknown, uniformly distributed bias (Robbins, "Statistical
        methods related to the law of the iterated logarithm", Annals of Mathematical Statistics 41, 1970).
        """
        from scipy.stats import binom  # here, because the import takes a second

        disputed = self.only_first + self.only_second
        if not self.complete:
            return min(1.0, (disputed + 1) * float(binom.pmf(self.only_first, disputed, 0.5)))
        return min(1.0, 2 * float(binom.cdf(min(self.only_first, self.only_second), disputed, 0.5)))


def paired(first: Result, second: Result) -> Paired:
    """Compare two results on the images that both were measured on.

    Both follow the same order of images, so these are the images of the shorter result. Raises IntrafusionError if the
    results were measured on different images.
    """
    right, also, count = _common(first, second)
    only_first, only_second = (int(np.bitwise_count(bits).sum()) for bits in (right & ~also, also & ~right))
    if count == first.total:
        interval = matched_wald(only_first, only_second, count)
    else:
        interval = _sequential(right.tobytes(), also.tobytes(), count, first.total)
    return Paired((only_first - only_second) / count, interval, only_first, only_second, count, first.total)


def is_decided(first: Result, second: Result) -> bool:
    """Return whether the first images of two results tell which is better on all images: `sequential_interval` excludes zero.

    Raises IntrafusionError if the results were measured on different images.
    """
    right, also, count = _common(first, second)
    return _excludes_zero(right.tobytes(), also.tobytes(), count, first.total)


def sequential_interval(signs: np.ndarray, total: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `total` signs after the first n of them; it may be looked at after every sign.

    signs: int (n,), each -1, 0 or 1. With a probability of 95 % all intervals, from the first sign to the last, contain the
    mean at once, so that a study may stop as soon as one of them excludes zero. The signs are fixed, and what is random is
    their order: every order is as probable as any other. The mean describes these `total` images and no others.

    A gambler bets on the sign of the next image, at odds that are fair if the mean of all signs is m, and so that of the signs
    left is known: m is rejected once the gambler's capital has reached 2 / 5 %, for either direction of the bets, which happens
    with a probability of at most 5 % if m is true (Ville's inequality). This is the betting confidence sequence for sampling
    without replacement of Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", Journal of the
    Royal Statistical Society B 86, 2024. The capital is split evenly over bets of several sizes, which grow as fewer signs are
    left.

    `accuracy.stratified` mixes the images only within their classes and takes the classes in turn. The means of the classes
    that take turns average to that of all signs left, and a product of bets at odds that vary around the fair ones is worth no
    more than one at fair odds, so errors are no more frequent; a simulation in the tests confirms it.
    """
    ends = _least(signs, total) / total, -_least(-signs, total) / total
    return min(ends), max(ends)  # they cross in the rare case that every mean is rejected


def _least(signs: np.ndarray, total: int) -> int:
    """Return the smallest sum of all signs that bets on a larger one do not reject. It rises with time."""
    left = total - len(signs)
    low, high = int(signs.sum()) - left, int(signs.sum()) + left  # the possible sums
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _rejects(signs, total, middle / total) else (low, middle)
    return low


def _rejects(signs: np.ndarray, total: int, mean: float = 0.0) -> np.ndarray:
    """Return whether bets that the mean is larger than `mean` have succeeded at any time: bool (...) for signs (..., n).

    Also true once the signs left cannot bring the mean down to `mean`.
    """
    beyond = signs.sum(-1) - (total - signs.shape[-1]) > total * mean + 0.5  # sums are integers
    return beyond | (_log_capital(signs, total, mean).max(-1, initial=0) >= math.log(2 / _ERROR))


def _log_capital(signs: np.ndarray, total: int, mean: float) -> np.ndarray:
    """Return the logarithm of the capital after each bet that the mean of all signs is larger than `mean`.

    It starts at 0, and its expectation does not grow if the mean is `mean` or less. float64 (..., n) for signs (..., n).
    """
    left = total - np.arange(signs.shape[-1])
    expected = np.maximum((total * mean - (signs.cumsum(-1) - signs)) / left, -1)  # mean of the signs left
    with np.errstate(divide="ignore"):
        most = _MOST / (1 + expected)
    surprise, capital = signs - expected, np.full(signs.shape, -np.inf)
    for bet in _BETS:
        capital = np.logaddexp(capital, np.log1p(np.minimum(bet * total / left, most) * surprise).cumsum(-1))
    return capital - math.log(len(_BETS))


@lru_cache(maxsize=1 << 12)
def _sequential(first: bytes, second: bytes, count: int, total: int) -> tuple[float, float]:
    return sequential_interval(_signs(first, second, count), total)


@lru_cache(maxsize=1 << 12)
def _excludes_zero(first: bytes, second: bytes, count: int, total: int) -> bool:
    signs = _signs(first, second, count)
    return bool(_rejects(signs, total) or _rejects(-signs, total))


def _signs(first: bytes, second: bytes, count: int) -> np.ndarray:
    """Return 1 where only the first is right, -1 where only the second is, else 0: int64 (count,)."""
    right, also = (np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(np.int64) for bits in (first, second))
    return right - also


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


def _common(first: Result, second: Result) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the answers of both on the images that both were measured on, see `_answers`, and the number of these images.

    Raises IntrafusionError if they were measured on different images.
    """
    for name in ("dataset", "data_path", "limit", "seed"):
        ours, theirs = getattr(first.spec, name), getattr(second.spec, name)
        if ours != theirs:
            raise IntrafusionError(f"cannot compare results on different images: {name} is {ours} and {theirs}")
    if first.total != second.total:
        raise IntrafusionError(f"cannot compare results on different images: {first.total:,} and {second.total:,} of them")
    count = min(first.count, second.count)
    return _answers(first, count), _answers(second, count), count


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
