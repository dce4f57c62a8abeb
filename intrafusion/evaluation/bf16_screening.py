"""fp32 predictions at little more than bf16's cost: run all images in bf16, and uncertain ones again in fp32.

A bf16 prediction is accepted if its margin over every other class exceeds, with room to spare, the largest error of any margin
seen so far on the same part of the same network. Each fp32 run reveals further errors.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Values = tuple[Tensor, ...]
Logits = Callable[[Values], Tensor]
_ROOM = 1.25  # a margin must exceed the largest error seen by this factor
_TRUST = 256  # images whose errors must be known before any margin is trusted
_ALWAYS = 8  # images of every network that are run again: its errors may exceed all earlier ones


class Screen:
    """Known bf16 errors on one part of a network. error: the largest, in units of the logits' spread."""

    def __init__(self) -> None:
        self.error, self.seen = 0.0, 0

    def predictions(
        self,
        batches: Iterable[tuple[Values, Values]],
        low: Logits,
        exact: Logits,
        again: Callable[[Tensor], Values],
        size: int,
    ) -> Tensor:
        """Return the classes that `exact` predicts: int64 (N,).

        batches: pairs of values, float (B, ...): those from which `low` computes logits (B, classes), and those from which
        `exact` does. again: returns the latter for the images with these indices, int64 (R,). size: images per batch of
        `exact`.
        """
        guesses, kept, owed = [], [], max(_ALWAYS, _TRUST - self.seen)
        for cheap, values in batches:
            guesses.append(low(cheap).float())
            rows = self._doubted(_margins(guesses[-1]), owed).nonzero()[:, 0]
            owed = max(0, owed - len(rows))
            kept.append((rows + sum(map(len, guesses[:-1])), tuple(value[rows] for value in values)))
        guess = torch.cat(guesses)
        best, margin = guess.argmax(1), _margins(guess)
        looked = torch.zeros(len(guess), dtype=torch.bool)
        rows, values = torch.cat([rows for rows, _ in kept]), _cat([values for _, values in kept])
        while len(rows):
            parts = zip(rows.split(size), *(value.split(size) for value in values), strict=True)
            for some, *of_some in parts:
                logits = exact(tuple(of_some))
                self._learn(guess[some], logits)
                best[some], looked[some] = logits.argmax(1), True
            rows = (self._doubted(margin, 0) & ~looked).nonzero()[:, 0]
            values = again(rows) if len(rows) else ()
        return best

    def _doubted(self, margin: Tensor, owed: int) -> Tensor:
        """Return which predictions are uncertain: bool (N,). The first `owed` ones are, while too few errors are known."""
        doubted = margin <= _ROOM * self.error
        doubted[:owed] = True
        return doubted

    def _learn(self, guess: Tensor, exact: Tensor) -> None:
        error = guess - exact
        error = (error.gather(1, guess.argmax(1, keepdim=True)) - error).abs().max() / _spread(guess)
        self.error, self.seen = max(self.error, float(error)), self.seen + len(guess)


def _margins(logits: Tensor) -> Tensor:
    """Return the lead of the best class, in units of the logits' spread: (N,)."""
    two = logits.topk(2, 1).values
    return (two[:, 0] - two[:, 1]) / _spread(logits)


def _spread(logits: Tensor) -> Tensor:
    return logits.std().clamp(min=1e-12)


def _cat(values: list[Values]) -> Values:
    return tuple(torch.cat(parts) for parts in zip(*values, strict=True))
