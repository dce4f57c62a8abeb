"""Transport plan of one group: marginals, solver, and the matrix that is applied to the channels.

Theus et al., "Towards Meta-Pruning via Optimal Transport", ICLR 2024. Names follow POT: M cost, a and b marginals, G
coupling.
"""

from dataclasses import dataclass
from numbers import Real
from typing import Unpack

import torch
from torch import Tensor, nn

from intrafusion._registry import SOLVERS
from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError, shown
from intrafusion.models.fx.sharing import check_finite, with_plain_weights
from intrafusion.options import TransportKeywords, TransportOptions
from intrafusion.pruning.groups.group import Group
from intrafusion.pruning.transport.cost import Geometry, choose_anchors, compare_channels, distances_between, most_important
from intrafusion.pruning.transport.solvers import Problem, has_room

_LEAST = 1e-290  # smallest mass: smaller numbers lose digits, and their quotients are noise


@dataclass(frozen=True, eq=False)
class TransportPlan:
    """Transport of n channels onto k targets. All tensors are float64 on the CPU, except `kept`.

    coupling: (n, k), mass from source to target. matrix: (k, n), multiplies the channels. kept: int64 (k,), sorted,
    the channel whose place each target takes. cost: (n, k), infinite between channels of different blocks. source (n,) and
    target (k,): the requested marginals; the solvers "exact" and "sinkhorn" meet them. reduced: whether the exact reduction was
    used.
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
        """Sum of cost times mass: <G, M>."""
        moved = self.coupling > 0
        return float((self.cost[moved] * self.coupling[moved]).sum())

    @property
    def entropy(self) -> float:
        """-sum G log G of the coupling, in nats: 0 if one entry holds all mass, log(n k) if all entries are equal."""
        G = self.coupling[self.coupling > 0]
        return float(-(G * G.log()).sum()) + 0.0

    @property
    def stays(self) -> Tensor:
        """The mass that each kept channel leaves in its own place: (k,)."""
        return self.coupling[self.kept, torch.arange(len(self.kept))]

    @property
    def share_moved(self) -> float:
        """Mass that moves to another channel's place, as a share of all transported mass."""
        total = float(self.coupling.sum())
        return 1 - float(self.stays.sum()) / total if total > 0 else 0.0

    def spread(self) -> Tensor:
        """Return the applied matrix in the dense shape (n, n); the rows of channels that are not kept are zero."""
        dense = self.matrix.new_zeros(self.matrix.shape[1], self.matrix.shape[1])
        dense[self.kept] = self.matrix
        return dense


def kept_count(size: int, sparsity: float) -> int:
    """Return how many of `size` channels are kept at a neuron sparsity in [0, 1): n (1 - s) rounded down, at least one.

    If n (1 - s) is a whole number, rounding errors of floats must not make it smaller: 160 channels at 0.8 keep 32, although
    160 * (1 - 0.8) < 32. Raises IntrafusionError for another sparsity.
    """
    if not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise IntrafusionError(f"sparsity must be a number of at least 0 and less than 1, not {shown(sparsity)}")
    return max(1, int(size * (1 - sparsity) + 1e-9))


def plan(
    model: nn.Module,
    group: Group,
    scores: Tensor,
    sparsity: float = 0.5,
    *,
    round_to: int = 1,
    seed: int = 0,
    data: ImageData | None = None,
    calibration: int | None = 512,
    **options: Unpack[TransportKeywords],
) -> TransportPlan:
    """Plan the transport of a group's n channels onto the k kept ones.

    Parameters
    ----------
    model : nn.Module
        The network that the group was found in.
    group : Group
        One of `find_groups` that can be pruned.
    scores : Tensor
        (n,), from `score`; the channels with the largest scores are kept.
    sparsity : float
        Share of the channels to remove, in [0, 1); k is `kept_count`.
    round_to : int
        k is rounded to a multiple of this, see `block_counts`.
    seed : int
        Seed for the choice of images and for clustered targets.
    data : ImageData, optional
        Calibration images, needed if channels are compared by activations.
    calibration : int, optional
        Maximum number of images to use; None for all.
    **options : TransportOptions
        cost, distance, p and bias: how channels are compared. source, target: marginals, "uniform", "importance" (share of the
        scores) or "softmax". anchors: the targets, which are the most "important" channels, or "kmeans" or "gmm" centroids.
        solver: one of `registry("solver")`. reg, reg_m: strength of the entropy ("sinkhorn") and of the marginals
        ("unbalanced"), in units of the mean cost. mass: the share of the mass that "partial" moves. normalise: divide the
        coupling by the source's marginal ("source", as in the paper), by the target's ("target"), or not at all ("none").

    Returns
    -------
    TransportPlan
        The coupling (n, k), the matrix (k, n) that is applied, and the kept channels.

    Raises
    ------
    IntrafusionError
        For a group that cannot be pruned, scores of another length, an unknown choice, choices that do not fit together, or NaN
        or infinite weights.

    Examples
    --------
    >>> import intrafusion as itf
    >>> model = itf.load_model("digits-mlp")
    >>> group = itf.find_groups(model, model.card.example())[0]
    >>> plan = itf.plan(model, group, itf.score(model, group), sparsity=0.5)
    >>> tuple(plan.coupling.shape), tuple(plan.matrix.shape), round(float(plan.coupling.sum()), 6)
    ((128, 64), (64, 128), 1.0)
    """
    group.check_prunable()
    model = with_plain_weights(model)
    check_finite((layer.name, model.get_submodule(layer.name)) for layer in group.layers)
    geometry = compare_channels(model, group, data=data, calibration=calibration, seed=seed, **options)
    return solve(geometry, scores, sparsity, round_to=round_to, seed=seed, **options)


def stay(group: Group, scores: Tensor, sparsity: float, round_to: int = 1) -> TransportPlan:
    """Return the plan of a merge that moves nothing: the most important channels are kept, the others lose their mass.

    No channels are compared and no transport problem is solved. The cost is zero where a channel stays and infinite elsewhere.
    """
    counts, chosen = group_counts(group, sparsity, round_to), scores.detach().cpu().double()
    kept = []
    for block, count in enumerate(counts):
        rows = (group.block == block).nonzero()[:, 0]
        kept.append(rows[most_important(chosen[rows], count)])
    places = torch.cat(kept).sort().values
    matrix, n = selection(places, group.size), group.size
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    cost = torch.zeros_like(matrix.T).masked_fill(matrix.T == 0, torch.inf)
    return TransportPlan(matrix.T / n, matrix, places, cost, uniform, uniform[places], True)


def selection(kept: Tensor, size: int) -> Tensor:
    """Return the matrix (k, n), float64, that selects the channels `kept` unchanged."""
    matrix = torch.zeros(len(kept), size, dtype=torch.float64)
    matrix[torch.arange(len(kept)), kept] = 1
    return matrix


def solve(
    geometry: Geometry,
    scores: Tensor,
    sparsity: float = 0.5,
    *,
    round_to: int = 1,
    seed: int = 0,
    **options: Unpack[TransportKeywords],
) -> TransportPlan:
    """Plan as `plan` does, on a measured geometry, which does not depend on sparsity, criterion, marginals or solver."""
    n = len(geometry.block)
    if scores.shape != (n,) or not torch.isfinite(scores).all():
        given = tuple(scores.shape) if scores.shape != (n,) else "NaN or infinite values"
        raise IntrafusionError(f"scores must be {n} finite numbers, one per channel, not {given}")
    chosen = TransportOptions(**options)
    solver_function = SOLVERS[chosen.solver]
    scores = scores.detach().cpu().double()
    counts = block_counts(geometry.block, kept_count(n, sparsity), round_to)
    coupling, cost = torch.zeros(n, sum(counts)).double(), torch.full((n, sum(counts)), torch.inf).double()
    a, b = torch.zeros(n).double(), torch.zeros(sum(counts)).double()
    kept, reduced, column = torch.zeros(sum(counts), dtype=torch.int64), True, 0
    for block, count in enumerate(counts):
        rows, columns = geometry.members(block), torch.arange(column, column + count)
        column += count
        ours = scores[rows]
        points, local = choose_anchors(geometry.vectors[rows], ours, count, chosen.anchors, seed)
        importance = ours[local] if points is None else nearest_mean(geometry.vectors[rows], points, ours, local)
        share = len(rows) / n
        a[rows], b[columns] = share * marginal(ours, chosen.source), share * marginal(importance, chosen.target)
        if points is None:
            stays = (
                chosen.solver == "exact" and geometry.metric and has_room(a.numpy(), b[columns].numpy(), rows[local].numpy())
            )
            M = geometry.costs(rows, local, stays)
        else:
            M = distances_between(geometry.vectors[rows], points, geometry.distance, geometry.p)
        problem = Problem(
            a[rows].numpy(),
            b[columns].numpy(),
            M.numpy(),
            None if points is not None else local.numpy(),
            geometry.metric,
            chosen.reg,
            chosen.reg_m,
            chosen.mass,
        )
        coupling[rows[:, None], columns] = torch.from_numpy(solver_function(problem))
        cost[rows[:, None], columns], kept[columns] = M, rows[local]
        reduced = reduced and chosen.solver == "exact" and problem.reducible
    order = kept.argsort()
    coupling, cost, kept, b = coupling[:, order], cost[:, order], kept[order], b[order]
    return TransportPlan(coupling, applied_matrix(coupling, a, b, chosen.normalise), kept, cost, a, b, reduced)


def block_counts(block: Tensor, k: int, round_to: int = 1) -> list[int]:
    """Return how many channels each block keeps: its proportional share of k, by largest remainder, at least one.

    block: int64 (n,). With more blocks than k, each still keeps one channel. round_to: the count of each block that loses
    channels is rounded to the nearest multiple of this, but at least to `round_to` itself and at most to the size of the block.
    So a block with no more than `round_to` channels keeps all. Raises IntrafusionError for `round_to` below 1.
    """
    sizes = block.bincount().double()
    ideal = sizes * k / sizes.sum()
    counts = ideal.floor().clamp(min=1)
    for index in (ideal - counts).argsort(descending=True, stable=True):
        if counts.sum() < k:
            counts[index] += 1
    while counts.sum() > k and (counts > 1).any():
        counts[(counts - ideal).where(counts > 1, torch.tensor(-torch.inf)).argmax()] -= 1
    return [_rounded(int(c), int(size), round_to) for c, size in zip(counts, sizes, strict=True)]


def _rounded(count: int, size: int, multiple: int) -> int:
    if multiple < 1:
        raise IntrafusionError(f"round_to must be a whole number of at least 1, not {multiple}")
    if count == size:
        return size
    return min(size, max(1, (count + multiple // 2) // multiple) * multiple)


def group_counts(group: Group, sparsity: float, round_to: int = 1) -> list[int]:
    """Return how many channels each of the group's blocks keeps at this sparsity."""
    return block_counts(group.block, kept_count(group.size, sparsity), round_to)


def marginal(scores: Tensor, kind: str) -> Tensor:
    """Return a probability vector (n,) from importance scores (n,): "uniform", "importance" (share) or "softmax".

    Only an importance of zero gives zero mass, however far apart the scores are. Raises IntrafusionError for "importance" with
    negative scores.
    """
    if kind == "softmax":
        return scores.softmax(0).clamp(min=_LEAST)
    if kind == "importance" and (scores < 0).any():
        raise IntrafusionError("importance marginals need non-negative scores; choose softmax or uniform")
    if kind == "uniform" or not scores.any():
        return torch.full_like(scores, 1 / len(scores))
    share = scores / scores.max()  # divide first: the sum may overflow or be subnormal
    return (share / share.sum()).clamp(min=_LEAST).where(scores > 0, 0.0)


def nearest_mean(vectors: Tensor, points: Tensor, scores: Tensor, places: Tensor) -> Tensor:
    """Return the importance of each centroid (k,): the mean of its nearest channels, or of the channel replaced if none."""
    nearest = distances_between(vectors, points, p=2).argmin(1)
    sums = torch.zeros(len(points), dtype=scores.dtype).index_add_(0, nearest, scores)
    counts = nearest.bincount(minlength=len(points))
    return torch.where(counts > 0, sums / counts.clamp(min=1), scores[places])


def applied_matrix(coupling: Tensor, a: Tensor, b: Tensor, normalise: str) -> Tensor:
    """Return T (k, n) from the coupling (n, k), divided by the source's marginal, by the target's, or unchanged.

    If a plan meets its marginals, columns sum to one ("source"), or rows do ("target").
    """
    if normalise == "source":
        return (coupling / a.where(a > 0, torch.ones_like(a))[:, None]).T.contiguous()
    if normalise == "target":
        return (coupling / b.where(b > 0, torch.ones_like(b))).T.contiguous()
    return coupling.T.contiguous()


def shared_mass(first: TransportPlan, second: TransportPlan) -> float:
    """Return the share of mass that two plans of one group move to the same places, from 0 (none) to 1 (all)."""
    places = []
    for made in (first, second):
        dense = made.coupling.new_zeros(len(made.source), len(made.source))
        dense[:, made.kept] = made.coupling
        places.append(dense)
    return float(torch.minimum(*places).sum() / max(place.sum() for place in places))
