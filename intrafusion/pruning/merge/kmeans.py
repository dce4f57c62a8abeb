"""k-means on inner products alone: an iteration takes n^2 steps, whatever the length of the vectors, and can be cancelled.

Greedy k-means++ starts (Arthur & Vassilvitskii, SODA 2007) and Lloyd's iterations, with the random numbers and results of
scikit-learn, whose fits of wide layers take minutes and cannot be interrupted. A centre is a mean of vectors, so its inner
products are means of theirs.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from intrafusion.runtime.cancellation import checkpoint

_STEP = 1 << 30  # multiplications between two checkpoints
_NOTHING = 1e-12  # squared distances below this share of the total are rounding


def gram(parts: Iterable[Tensor]) -> Tensor:
    """Compute the inner products (n, n), float64, of vectors given in parts on the CPU: (n, m) each, with any m."""
    products: Tensor | None = None
    for part in parts:
        products = torch.zeros(len(part), len(part), dtype=torch.float64) if products is None else products
        for columns in part.split(max(1, _STEP // len(part) ** 2), 1):
            checkpoint()
            exact = columns.double()
            products += exact @ exact.T
    assert products is not None
    return products


def kmeans(products: Tensor, count: int, starts: int = 10, seed: int = 0, most: int = 300) -> Tensor:
    """Assign each vector to one of `count` clusters, from the inner products (n, n): int64 (n,).

    The best of `starts` starts is returned, each with at most `most` iterations. Clusters are numbered from 0 and none is
    empty; there are fewer than `count` if there are fewer different vectors.
    """
    random = np.random.RandomState(seed)
    found: list[tuple[float, int, Tensor]] = []
    for _ in range(starts):
        labels = _first(products, count, random)
        for _ in range(most):
            checkpoint()
            before, labels = labels, _nearest(products, labels)
            if torch.equal(before, labels):
                break
        found.append((_inertia(products, labels), len(found), labels))
    return min(found)[2]


def _first(products: Tensor, count: int, random: np.random.RandomState) -> Tensor:
    """Draw `count` vectors as first centres, and return the nearest centre of each vector.

    A vector is drawn with its squared distance to the earlier centres as its weight. Of 2 + log(count) draws, the one that
    leaves the smallest distances is taken.
    """
    size = products.diagonal()
    chosen = [int(random.choice(len(size), p=np.full(len(size), 1 / len(size))))]
    nearest, labels = _from(products, chosen)[0], torch.zeros(len(size), dtype=torch.int64)
    smallest = _NOTHING * float(size.sum())
    while len(chosen) < count and (total := float(nearest.sum())) > smallest:
        checkpoint()
        drawn = random.uniform(size=2 + int(math.log(count))) * total
        candidates = torch.searchsorted(nearest.cumsum(0), torch.from_numpy(drawn)).clamp(max=len(size) - 1)
        away = torch.minimum(_from(products, candidates.tolist()), nearest)
        best = int(away.sum(1).argmin())
        closer = away[best] < nearest
        labels[closer], nearest = len(chosen), away[best]
        chosen.append(int(candidates[best]))
    return labels.unique(return_inverse=True)[1]


def _from(products: Tensor, rows: list[int]) -> Tensor:
    """Return the squared distances of all vectors from those in `rows`: (len(rows), n)."""
    size = products.diagonal()
    return (size[rows][:, None] + size - 2 * products[rows]).clamp(min=0)


def _nearest(products: Tensor, labels: Tensor) -> Tensor:
    """Return the cluster with the nearest mean for each vector; empty clusters take the vectors farthest from their means."""
    means = _means(products, labels)
    square = torch.zeros(len(means), dtype=means.dtype).index_add_(0, labels, _of_own(means, labels))
    away = torch.sub((square / labels.bincount())[:, None], means, alpha=2)
    left, labels = away.min(0)
    left += products.diagonal()
    for empty in (labels.bincount(minlength=len(means)) == 0).nonzero()[:, 0].tolist():
        alone = labels.bincount(minlength=len(means))[labels] == 1
        far = int(left.masked_fill(alone, -math.inf).argmax())
        labels[far], left[far] = empty, 0
    return labels


def _means(products: Tensor, labels: Tensor) -> Tensor:
    """Return the inner products of the clusters' means with the vectors: (clusters, n)."""
    counts = labels.bincount()
    return products.new_zeros(len(counts), len(products)).index_add_(0, labels, products) / counts[:, None]


def _of_own(means: Tensor, labels: Tensor) -> Tensor:
    """Return the inner product of each vector with its cluster's mean: (n,)."""
    return means.gather(0, labels[None])[0]


def _inertia(products: Tensor, labels: Tensor) -> float:
    """Return the sum of the squared distances of all vectors from the means of their clusters."""
    return float((products.diagonal() - _of_own(_means(products, labels), labels)).sum())
