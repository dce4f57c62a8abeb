"""fp32 predictions at little more than bf16's cost: run all images in bf16, and uncertain ones again in fp32.

A bf16 prediction is accepted if its margin over every other class exceeds, with room to spare, the largest error of any margin
seen so far on the same part of the same network. Each fp32 run reveals further errors.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from intrafusion.runtime.devices import CPU

Values = tuple[Tensor, ...]
Logits = Callable[[Values], Tensor]
_ROOM = 1.25  # a margin must exceed the largest error seen by this factor
_TRUST = 256  # images whose errors must be known before any margin is trusted
_ALWAYS = 8  # images of every network that are run again: its errors may exceed all earlier ones


class Screen:
    """Known bf16 errors on one part of a network. error: the largest, in units of the logits' spread; a tensor on a GPU."""

    def __init__(self) -> None:
        self.error: float | Tensor = 0.0
        self.seen = 0

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
        `exact` does. again: returns the latter for the images with these indices, int64 (R,) on the CPU. size: images per batch
        of `exact`. A GPU is waited for once per round, not per batch.
        """
        guesses, kept, owed = [], [], max(_ALWAYS, _TRUST - self.seen)
        for cheap, values in batches:
            guesses.append(low(cheap).float())
            if guesses[-1].device == CPU:  # `values` may not be kept: take those of doubted images while they are here
                rows = self._doubted(_margins(guesses[-1]), owed).nonzero()[:, 0]
                owed = max(0, owed - len(rows))
                kept.append((rows + sum(map(len, guesses[:-1])), tuple(value[rows] for value in values)))
        guess = torch.cat(guesses)
        best, margin = guess.argmax(1), _margins(guess)
        looked = torch.zeros(len(guess), dtype=torch.bool)
        if kept:
            rows, values = torch.cat([rows for rows, _ in kept]), _cat([values for _, values in kept])
        else:
            rows = self._doubted(margin, owed).cpu().nonzero()[:, 0]
            values = again(rows)
        while len(rows):
            looked[rows] = True
            parts = zip(rows.to(guess.device).split(size), *(value.split(size) for value in values), strict=True)
            for some, *of_some in parts:
                logits = exact(tuple(of_some))
                self._learn(guess[some], logits)
                best[some] = logits.argmax(1)
            rows = (self._doubted(margin, 0).cpu() & ~looked).nonzero()[:, 0]
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
        self.error = max(self.error, float(error)) if error.device == CPU else error.clamp(min=self.error)
        self.seen += len(guess)


def _margins(logits: Tensor) -> Tensor:
    """Return the lead of the best class, in units of the logits' spread: (N,)."""
    two = logits.topk(2, 1).values
    return (two[:, 0] - two[:, 1]) / _spread(logits)


def _spread(logits: Tensor) -> Tensor:
    return logits.std().clamp(min=1e-12)


def _cat(values: list[Values]) -> Values:
    return tuple(torch.cat(parts) for parts in zip(*values, strict=True))
