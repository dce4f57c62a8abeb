"""Agreement between importance criteria on one group: ranks, rank correlations and overlap of the kept channels.

Every agreement comes with the level that two random criteria would reach, because most of a large overlap is often chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from intrafusion.pruning.groups.group import Group
from intrafusion.pruning.transport.cost import most_important
from intrafusion.pruning.transport.planning import block_counts, kept_count


@dataclass(frozen=True)
class Chance:
    """Agreement of two random criteria.

    overlap: mean share of the k kept channels that both keep. low, high: its 95 % interval. correlation: the absolute Spearman
    correlation that they stay below in 95 % of cases; nan for three channels or fewer.
    """

    overlap: float
    low: float
    high: float
    correlation: float


@dataclass(frozen=True, eq=False)
class CriteriaComparison:
    """Comparison of c criteria on the n channels of one group.

    scores: float64 (c, n); the channels with the largest scores are kept. ranks: int64 (c, n), 1 for the most important; equal
    scores share a rank. kept: bool (c, n), the channels that each criterion keeps at the sparsity. spearman: (c, c) rank
    correlations, nan for a criterion whose scores are all equal. overlap: (c, c), the share of the k kept channels that two
    criteria have in common. chance: the agreement of two random criteria.
    """

    names: tuple[str, ...]
    scores: np.ndarray
    ranks: np.ndarray
    kept: np.ndarray
    spearman: np.ndarray
    overlap: np.ndarray
    chance: Chance

    @property
    def k(self) -> int:
        """Number of channels that each criterion keeps."""
        return int(self.kept[0].sum())

    @property
    def pruned(self) -> int:
        """Number of channels that are removed."""
        return self.kept.shape[1] - self.k

    def shared(self, a: int, b: int) -> int:
        """Return how many channels the criteria with indices `a` and `b` both keep."""
        return round(float(self.overlap[a, b]) * self.k)


def compare_criteria(scores: Mapping[str, Tensor], group: Group, sparsity: float, round_to: int = 1) -> CriteriaComparison:
    """Compare criteria on one group.

    scores: the scores (n,) of each criterion by name, at least one.
    """
    from scipy.stats import rankdata  # here, because the import takes a second

    values = np.stack([row.double().numpy() for row in scores.values()])
    counts = block_counts(group.block, kept_count(group.size, sparsity), round_to)
    kept = np.stack([stays(row, group.block.numpy(), counts) for row in values])
    ranks = rankdata(-values, "min", axis=1).astype(int)
    luck = chance(group.block.bincount().tolist(), counts)
    return CriteriaComparison(tuple(scores), values, ranks, kept, spearman(values), overlap(kept), luck)


def stays(scores: np.ndarray, block: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Return which channels are kept, bool (n,): in each block the `counts[block]` channels with the largest scores (n,).

    Of equal scores, the first channels are kept.
    """
    kept = np.zeros(len(scores), bool)
    for number, count in enumerate(counts):
        members = (block == number).nonzero()[0]
        kept[members[most_important(torch.from_numpy(scores[members]), count).numpy()]] = True
    return kept


def spearman(scores: np.ndarray) -> np.ndarray:
    """Compute the rank correlations (c, c) of the rows of `scores` (c, n).

    Ties get their average rank. A row whose scores are all equal gives nan.
    """
    from scipy.stats import rankdata

    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(rankdata(scores, axis=1)))


def overlap(kept: np.ndarray) -> np.ndarray:
    """Compute the share (c, c) of kept channels in common, |A and B| / k, for bool (c, n) with k true values in every row."""
    each = kept.astype(float)
    return each @ each.T / each[0].sum()


def chance(sizes: Sequence[int], counts: Sequence[int]) -> Chance:
    """Compute the agreement of two criteria that draw `counts[b]` of the `sizes[b]` channels of each block at random.

    The overlap within a block is hypergeometric; blocks are independent. The correlation is the usual bound by Student's t.
    """
    from scipy.stats import hypergeom, t

    n, k, chances = sum(sizes), sum(counts), np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        chances = np.convolve(chances, hypergeom(size, count, count).pmf(np.arange(count + 1)))
    low, high = np.searchsorted(chances.cumsum(), [0.025, 0.975])
    mean = sum(count * count / size for size, count in zip(sizes, counts, strict=True))
    quantile = t.ppf(0.975, n - 2) if n > 3 else np.nan
    return Chance(mean / k, low / k, high / k, float(quantile / np.sqrt(n - 2 + quantile**2)) if n > 3 else np.nan)
