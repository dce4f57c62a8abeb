"""Finding a learning rate: short runs at rates of a ladder."""

import math
from collections.abc import Callable

RATES = tuple(10 ** (-k / 2) for k in range(9, -1, -1))  # from 3e-5 to 1
_FIRST = 6  # the place among these where the test begins


def best_rate(probe: Callable[[float], float]) -> float | None:
    """The rate, of a ladder with two steps to each power of ten, after which a short run is best; None where none learns.

    probe: the loss after a short run at a rate, inf where it went too far. From the middle it goes up or down for as long as
    that helps.
    """
    losses: dict[int, float] = {}
    best = _FIRST
    while True:
        for rung in (best, best - 1, best + 1):
            if 0 <= rung < len(RATES) and rung not in losses:
                losses[rung] = probe(RATES[rung])
        better = min(losses, key=losses.__getitem__)
        if better == best:
            return RATES[best] if math.isfinite(losses[best]) else None
        best = better
