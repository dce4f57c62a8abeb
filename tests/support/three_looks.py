"""How studies stopped early before they used a confidence sequence: what its simulation and its benchmark compare with."""

from statistics import NormalDist

import numpy as np


def three_looks(signs: np.ndarray, first: int = 100) -> np.ndarray:
    """Return after how many images the rule stops: int64 (r,) for signs (r, n), each -1, 0 or 1.

    It looks after `first` images, after three times as many, and so on, and after all, and stops where the interval of Agresti
    and Min for paired proportions, with Bonferroni's correction for the number of looks, excludes zero.
    """
    total = signs.shape[1]
    sizes = [*[size for size in (first * 3**k for k in range(20)) if size < total], total]
    z = NormalDist().inv_cdf(1 - 0.025 / len(sizes))
    stops = np.full(len(signs), total)
    for size in reversed(sizes):
        seen, n = signs[:, :size], size + 2
        b, c = ((seen == sign).sum(1) + 0.5 for sign in (1, -1))
        stops[np.abs(b - c) / n > z * np.sqrt(b + c - (b - c) ** 2 / n) / n] = size
    return stops
