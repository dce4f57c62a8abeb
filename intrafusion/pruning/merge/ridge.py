"""Statistics accumulated batch by batch: means and deviations, and ridge regression with a strength chosen on held-out data."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from intrafusion.runtime.cancellation import checkpoint
from intrafusion.runtime.devices import doubled

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # in units of the features' mean second moment
_EVERY = 4  # every fourth batch is held out to choose among RIDGES


@dataclass
class _Sums:
    """Sums xx (p, p), xy (p, q) and yy (q,), float64; the last feature in xx is the constant 1."""

    xx: Tensor | None = None
    xy: Tensor | None = None
    yy: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        xx, xy, yy = doubled(x.T @ x), doubled(x.T @ y), doubled(y).square().sum(0)
        self.xx = xx if self.xx is None else self.xx + xx
        self.xy = xy if self.xy is None else self.xy + xy
        self.yy = yy if self.yy is None else self.yy + yy


@dataclass
class Moments:
    """Mean and standard deviation of each of q values, over batches (N, q)."""

    count: int = 0
    sums: Tensor | None = None  # sums of the values and of their squares: float64 (2, q)

    def add(self, values: Tensor) -> None:
        values = doubled(values)
        sums = torch.stack([values.sum(0), values.square().sum(0)])
        self.count, self.sums = self.count + len(values), sums if self.sums is None else self.sums + sums

    def mean(self) -> Tensor:
        assert self.sums is not None
        return self.sums[0] / self.count

    def std(self) -> Tensor:
        assert self.sums is not None
        return (self.sums[1] / self.count - self.mean().square()).clamp(min=0).sqrt()


@dataclass
class Regression:
    """Least-squares regression of y (q values) on x (p values and a constant).

    Each batch is summed in its own precision, in float32 at least; the sums of batches are added in float64. best: the ridge
    chosen last.
    """

    fit: _Sums = field(default_factory=_Sums)
    held: _Sums = field(default_factory=_Sums)
    batches: int = 0
    best: float = RIDGES[1]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add one batch: x (N, p) and y (N, q); rows are samples."""
        x, y = (values.to(torch.promote_types(values.dtype, torch.float32)) for values in (x, y))
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        (self.held if self.batches % _EVERY == _EVERY - 1 else self.fit).add(x, y)
        self.batches += 1

    def solve(self, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights (p, q) and intercept (q,), float64, regularised towards `start` (p + 1, q; zero if None).

        The intercept is practically not regularised. The ridge is the one of RIDGES that predicts the held-out batches best;
        without held-out batches it is `best`.
        """
        xx, xy = self.fit.xx, self.fit.xy
        assert xx is not None
        assert xy is not None
        if self.held.xx is not None and self.held.xy is not None:
            errors = {ridge: self._error(_ridge(xx, xy, start, ridge)) for ridge in RIDGES}
            self.best = min(errors, key=errors.__getitem__)
            xx, xy = xx + self.held.xx, xy + self.held.xy
        found = _ridge(xx, xy, start, self.best)
        return found[:-1], found[-1]

    def explained(self, weights: Tensor, intercept: Tensor) -> Tensor:
        """Return the share of each value's variance that a solution predicts: (q,), at most 1; 1 if the value does not vary."""
        known = [sums for sums in (self.fit, self.held) if sums.xx is not None]
        xx, xy, yy = (sum(getattr(sums, name) for sums in known) for name in ("xx", "xy", "yy"))  # type: Tensor, Tensor, Tensor
        both = torch.cat([weights, intercept[None]])
        left = yy - 2 * (both * xy).sum(0) + (both * (xx @ both)).sum(0)
        total = yy - xy[-1].square() / xx[-1, -1]
        return torch.where(total > 1e-9 * (1 + yy), 1 - left / total.clamp(min=1e-30), 1.0)

    def _error(self, weights: Tensor) -> float:
        """Return the held-out squared error, up to a constant that does not depend on the weights."""
        assert self.held.xx is not None
        assert self.held.xy is not None
        return float((weights * (self.held.xx @ weights - 2 * self.held.xy)).sum())


def _ridge(xx: Tensor, xy: Tensor, start: Tensor | None, ridge: float) -> Tensor:
    """Compute (xx + R)^-1 (xy + R start): (p + 1, q).

    R is diagonal: `ridge` times the mean of the diagonal of xx, and almost zero for the constant.
    """
    strength = ridge * xx.diagonal()[:-1].mean().clamp(min=1e-12)
    penalty = torch.full_like(xx.diagonal(), float(strength))
    penalty[-1] = strength * 1e-6
    right = xy if start is None else xy + penalty[:, None] * start
    checkpoint()
    return torch.linalg.solve(xx + penalty.diag(), right)
