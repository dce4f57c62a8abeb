"""Search for a learning rate by short runs at a ladder of rates."""

import math
from collections.abc import Callable

RATES = tuple(10 ** (-k / 2) for k in range(9, -1, -1))  # from 3e-5 to 1
_FIRST = 6  # index in RATES where the search starts


def best_rate(probe: Callable[[float], float]) -> float | None:
    """Return the rate of the ladder with the smallest loss after a short run; None if no rate gives a finite loss.

    The ladder RATES has two steps per power of ten. The search starts inside the ladder and goes up or down as long as that
    helps. probe: returns the loss after a short run at a rate, inf if the run diverged.
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
