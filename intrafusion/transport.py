"""The transport plan of one group: cost between channels, marginals, solver, and the matrix that is applied.

Theus et al., "Towards Meta-Pruning via Optimal Transport", ICLR 2024. Names follow POT: M cost, a and b marginals, G
coupling.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from intrafusion.channels import Group
from intrafusion.errors import IntrafusionError, check_choice
from intrafusion.registry import SOLVERS
from intrafusion.vectors import whole_vectors

MARGINALS = ("uniform", "importance", "softmax")
NORMALISATIONS = ("source", "target", "none")
ANCHORS = ("important", "kmeans", "gmm")
_SLICE = 64  # coordinates of a channel vector compared at once


@dataclass(frozen=True, eq=False)
class TransportPlan:
    """How n channels move onto k targets; all tensors float64 on the CPU but `kept`.

    coupling: (n, k), mass from source to target, marginals `source` (n,) and `target` (k,). matrix: (k, n), what
    multiplies the channels. kept: int64 (k,), sorted: the channel in whose place each target stands. cost: (n, k),
    infinite between channels that no layer couples. reduced: whether the exact reduction was used.
    """

    coupling: Tensor
    matrix: Tensor
    kept: Tensor
    cost: Tensor
    source: Tensor
    target: Tensor
    reduced: bool

    @property
    def total_cost(self) -> float:
        """Sum of cost times mass; the optimum of the transport problem."""
        moved = self.coupling > 0
        return float((self.cost[moved] * self.coupling[moved]).sum())


def kept_count(size: int, sparsity: float) -> int:
    """Channels that stay of `size` at a neuron sparsity in [0, 1): int(n (1 - s)), at least one."""
    if not 0 <= sparsity < 1:
        raise IntrafusionError(f"sparsity must be at least 0 and less than 1, not {sparsity}")
    return max(1, int(size * (1 - sparsity)))


def plan(
    model: nn.Module,
    group: Group,
    scores: Tensor,
    sparsity: float = 0.5,
    *,
    p: float = 1,
    source: str = "uniform",
    target: str = "uniform",
    anchors: str = "important",
    solver: str = "exact",
    normalise: str = "source",
    bias: bool = False,
    seed: int = 0,
) -> TransportPlan:
    """The optimal transport of a group's n channels onto the k that stay.

    scores: (n,), larger stays. p: of the p-norm distance between unit channel vectors. source, target: marginals, each
    "uniform", "importance" (share of the scores) or "softmax". anchors: targets are the most "important" channels, or
    "kmeans" or "gmm" centroids. normalise: columns of the matrix sum to one ("source", the paper's), rows do
    ("target"), or the plain transposed coupling ("none"). bias: biases are part of the channel vectors.
    Raises IntrafusionError for a group that cannot be pruned, scores of another length, or an unknown choice.
    """
    if group.reason:
        raise IntrafusionError(f"group {group.name} cannot be pruned: {group.reason}")
    if scores.shape != (group.size,) or not torch.isfinite(scores).all():
        raise IntrafusionError(f"scores must be {group.size} finite numbers, one a channel, not {tuple(scores.shape)}")
    if not p >= 1:
        raise IntrafusionError(f"p must be at least 1 for the cost to be a metric, not {p}")
    check_choice("source marginal", source, MARGINALS)
    check_choice("target marginal", target, MARGINALS)
    check_choice("anchors", anchors, ANCHORS)
    check_choice("normalise", normalise, NORMALISATIONS)
    solve = SOLVERS[solver]
    scores = scores.detach().double().cpu()
    vectors = unit_vectors(whole_vectors(model, group, bias))
    n, counts = group.size, group_counts(group, sparsity)
    k = sum(counts)
    coupling, cost = torch.zeros(n, k, dtype=torch.float64), torch.full((n, k), torch.inf, dtype=torch.float64)
    kept, a, b = (
        torch.zeros(k, dtype=torch.int64),
        torch.zeros(n, dtype=torch.float64),
        torch.zeros(k, dtype=torch.float64),
    )
    reduced, column = True, 0
    for block, count in enumerate(counts):
        rows = (group.block == block).nonzero()[:, 0]
        points, local = choose_anchors(vectors[rows], scores[rows], count, anchors, seed)
        columns = torch.arange(column, column + count)
        column += count
        share = len(rows) / n
        a_block = share * marginal(scores[rows], source)
        b_block = share * marginal(target_scores(vectors[rows], points, scores[rows], local, anchors), target)
        M = cost_matrix(vectors[rows], points, p)
        G, used = solve(a_block.numpy(), b_block.numpy(), M.numpy(), local.numpy() if anchors == "important" else None)
        coupling[rows[:, None], columns] = torch.from_numpy(G)
        cost[rows[:, None], columns] = M
        kept[columns], a[rows], b[columns], reduced = rows[local], a_block, b_block, reduced and used
    order = kept.argsort()
    coupling, cost, kept, b = coupling[:, order], cost[:, order], kept[order], b[order]
    return TransportPlan(coupling, applied_matrix(coupling, a, b, normalise), kept, cost, a, b, reduced)


def block_counts(block: Tensor, k: int) -> list[int]:
    """How many of the k kept channels each block gets: its proportional share, by largest remainder, at least one.

    block: int64 (n,). With more blocks than k, each still keeps one.
    """
    sizes = block.bincount().double()
    ideal = sizes * k / sizes.sum()
    counts = ideal.floor().clamp(min=1)
    for index in (ideal - counts).argsort(descending=True, stable=True):
        if counts.sum() < k:
            counts[index] += 1
    while counts.sum() > k and (counts > 1).any():
        counts[(counts - ideal).where(counts > 1, torch.tensor(-torch.inf)).argmax()] -= 1
    return [int(c) for c in counts]


def group_counts(group: Group, sparsity: float) -> list[int]:
    """How many channels of each of the group's blocks stay at this sparsity."""
    return block_counts(group.block, kept_count(group.size, sparsity))


def unit_vectors(vectors: Tensor) -> Tensor:
    """Rows divided by their L2 norm; a dead channel (all zero) stays zero."""
    norms = vectors.norm(dim=1, keepdim=True)
    return (vectors / norms.where(norms > 0, torch.ones_like(norms))).cpu()


def cost_matrix(vectors: Tensor, points: Tensor, p: float = 1) -> Tensor:
    """p-norm distances between rows: (n, d), (k, d) -> (n, k). Summed over slices of d that stay in the caches."""
    total = vectors.new_zeros(len(vectors), len(points))
    for some, others in zip(vectors.split(_SLICE, 1), points.split(_SLICE, 1), strict=True):
        distances = torch.cdist(some.contiguous(), others.contiguous(), p, "donot_use_mm_for_euclid_dist")
        total += distances if p == 1 else distances.pow(p)
    return total if p == 1 else total.pow(1 / p)


def marginal(scores: Tensor, kind: str) -> Tensor:
    """A probability vector (n,) from importance scores (n,): "uniform", "importance" (share) or "softmax"."""
    if kind == "softmax":
        return scores.softmax(0)
    if kind == "importance" and (scores < 0).any():
        raise IntrafusionError("importance marginals need scores that are not negative: choose softmax or uniform")
    if kind == "uniform" or not scores.any():
        return torch.full_like(scores, 1 / len(scores))
    return scores / scores.sum()


def choose_anchors(vectors: Tensor, scores: Tensor, k: int, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """The k targets: their vectors (k, d), and int64 (k,) the channels in whose places they stand, sorted."""
    if kind == "important" or k == len(scores):
        kept = scores.argsort(descending=True, stable=True)[:k].sort().values
        return vectors[kept], kept
    from scipy.optimize import linear_sum_assignment

    centroids = torch.from_numpy(_centroids(vectors.numpy(), k, kind, seed))
    places = torch.from_numpy(linear_sum_assignment(cost_matrix(centroids, vectors, 2).numpy())[1])
    order = places.argsort()
    return centroids[order], places[order]


def _centroids(vectors: np.ndarray, k: int, kind: str, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # duplicated channels leave fewer distinct clusters than k
        if kind == "kmeans":
            return KMeans(k, n_init=10, random_state=seed).fit(vectors).cluster_centers_
        return GaussianMixture(k, covariance_type="spherical", random_state=seed).fit(vectors).means_


def target_scores(vectors: Tensor, points: Tensor, scores: Tensor, places: Tensor, kind: str) -> Tensor:
    """Importance of each target: the kept channel's own, or the mean of the channels nearest to a centroid; (k,)."""
    if kind == "important":
        return scores[places]
    nearest = cost_matrix(vectors, points, 2).argmin(1)
    sums = torch.zeros(len(points), dtype=scores.dtype).index_add_(0, nearest, scores)
    counts = nearest.bincount(minlength=len(points))
    return torch.where(counts > 0, sums / counts.clamp(min=1), scores[places])


def applied_matrix(coupling: Tensor, a: Tensor, b: Tensor, normalise: str) -> Tensor:
    """T (k, n) from the coupling (n, k): columns sum to one ("source"), rows do ("target"), or as it is ("none")."""
    if normalise == "source":
        return (coupling / a.where(a > 0, torch.ones_like(a))[:, None]).T.contiguous()
    if normalise == "target":
        return (coupling / b.where(b > 0, torch.ones_like(b))).T.contiguous()
    return coupling.T.contiguous()


@SOLVERS.register(
    "exact", "the optimal plan (network simplex); solved on the dropped channels alone where that is exact", "POT"
)
def exact(a: np.ndarray, b: np.ndarray, M: np.ndarray, kept: np.ndarray | None) -> tuple[np.ndarray, bool]:
    """Optimal coupling (n, k) for marginals a (n,), b (k,), cost M (n, k), and whether the problem was reduced.

    The targets are channels `kept` (k,) themselves and the cost is a metric, so some optimal plan leaves each kept
    channel's mass where it is: what remains is to send the n - k others into the residual target mass b - a[kept]. Any
    detour through a kept channel costs no less, by the triangle inequality. Needs every residual to be non-negative;
    otherwise, and for centroids (kept None), the full problem is solved.
    """
    if kept is None:
        return _emd(a, b, M), False
    residual = b - a[kept]
    if residual.min() < -1e-15:
        return _emd(a, b, M), False
    G = np.zeros_like(M)
    G[kept, np.arange(len(kept))] = a[kept]
    dropped = np.ones(len(a), bool)
    dropped[kept] = False
    if a[dropped].sum() > 0:
        G[dropped] = _emd(a[dropped], np.maximum(residual, 0), M[dropped])
    return G, True


def _emd(a: np.ndarray, b: np.ndarray, M: np.ndarray) -> np.ndarray:
    import ot  # a second of imports that a first page view need not pay

    return ot.emd(a, b * (a.sum() / b.sum()), np.ascontiguousarray(M), numItermax=1_000_000)
