"""Distances between the channels of one group: the part of a transport plan that does not depend on sparsity or criterion."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError, check_choice
from intrafusion.options import TransportKeywords, TransportOptions
from intrafusion.pruning.groups.channel_vectors import whole_vectors
from intrafusion.pruning.groups.feature_maps import feature_maps
from intrafusion.pruning.groups.group import Group
from intrafusion.runtime.cancellation import beside, checkpoint
from intrafusion.runtime.devices import CPU
from intrafusion.runtime.log import event

_SLICE, _ROWS = 64, 128  # coordinates and channels compared at once, so that they stay in the caches
_MANY = 1 << 27  # fewer differences than this take the CPU less time than the way to a device and back
_DEVICE_BYTES = 1 << 28  # of distances that a device computes at once
_SAMPLE, _SAME = 64, 1e-4  # distances that are also computed in float64, and the relative tolerance
_COORDINATES = 8192  # maximum number of activations of a channel to compare, for each consumer


@dataclass(frozen=True, eq=False)
class Geometry:
    """The channels of a group as points. All tensors are float64 on the CPU, except `block`.

    vectors: (n, d), of length one, or zero for dead channels. distances: (n, n), infinite between channels of different
    blocks. block: int64 (n,), the group's. distance, p: the kind of distance, as in `compare_channels`.
    """

    vectors: Tensor
    distances: Tensor
    block: Tensor
    distance: str
    p: float

    @property
    def metric(self) -> bool:
        """Whether the triangle inequality holds: it does for norms, not for the cosine distance, which is a squared one."""
        return self.distance == "lp"

    def costs(self, rows: Tensor, kept: Tensor, stays: bool) -> Tensor:
        """Return the distances of the channels `rows` (n,) from those of them at `kept` (k,): (n, k).

        stays: whether the kept channels themselves will not move.
        """
        return self.distances[rows[:, None], rows[kept]]

    def members(self, block: int) -> Tensor:
        """Return the channels of one block: int64, sorted."""
        return (self.block == block).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class UnmeasuredGeometry(Geometry):
    """A geometry for one plan, which measures no other distances than that plan needs. `distances` is empty."""

    device: torch.device = CPU

    def costs(self, rows: Tensor, kept: Tensor, stays: bool) -> Tensor:
        """Return what `Geometry.costs` does; infinity between a kept channel that stays and the other kept ones."""
        M = torch.full((len(rows), len(kept)), torch.inf, dtype=torch.float64)
        M[kept, torch.arange(len(kept))] = 0
        moves = torch.ones(len(rows), dtype=torch.bool)
        moves[kept] = not stays
        at, to = rows[moves], rows[kept]
        found = _on_device(self.vectors, self.distance, self.p, self.device, at, to)
        if found is None:
            parts = ((part[at], part[to]) for part in self.vectors.split(_SLICE, 1))
            found = _finish(_summed(parts, len(at), len(to), _power(self.distance, self.p)), self.distance, self.p)
        M[moves] = found
        return M


def compare_channels(
    model: nn.Module,
    group: Group,
    *,
    data: ImageData | None = None,
    calibration: int | None = 512,
    seed: int = 0,
    device: torch.device = CPU,
    measured: bool = True,
    **options: Unpack[TransportKeywords],
) -> Geometry:
    """Compare the channels of `group` with each other.

    options: those of `TransportOptions`; only cost, distance, p and bias matter here. cost: compare the "weights" that write
    and read a channel (BN folded; `bias` appends the biases), or the "activations" that its consumers read on at most
    `calibration` images of `data`. distance: between vectors of length one, "lp" (the p-norm of the difference) or "cosine"
    (one minus the cosine). device: where many distances are computed. measured: False to leave the distances to the plan, which
    may need few of them. Raises IntrafusionError for an unknown choice, missing images, or options that do not fit together.
    """
    chosen = TransportOptions(**options)
    chosen.check_together()
    if chosen.cost == "weights":
        vectors = whole_vectors(model, group, chosen.bias)
    elif data is None:
        raise IntrafusionError("cost activations needs images; pass data=")
    else:
        vectors = activation_vectors(model, group, data.subset(calibration, seed), seed)
    vectors = unit_vectors(vectors)
    if not measured:
        return UnmeasuredGeometry(vectors, vectors.new_empty(0, 0), group.block, chosen.distance, chosen.p, device)
    distances = torch.full((group.size, group.size), torch.inf, dtype=torch.float64)
    for block in range(int(group.block.max()) + 1):
        rows = (group.block == block).nonzero()[:, 0]
        distances[rows[:, None], rows] = pairwise(vectors[rows], chosen.distance, chosen.p, device)
    return Geometry(vectors, distances, group.block, chosen.distance, chosen.p)


def activation_vectors(model: nn.Module, group: Group, data: ImageData, seed: int = 0) -> Tensor:
    """Return the values of each channel that the consumers read on these images: float64 (n, d).

    If a map has many positions, a random sample of them is used, drawn by `seed` and the same for every channel of an image.
    """
    generator = torch.Generator().manual_seed(seed)
    a_image = max(1, _COORDINATES // len(data))
    parts = []
    for batch in feature_maps(model, group, data):
        for _, maps in batch:
            flat = maps.flatten(2)  # (B, n, h w)
            if flat.shape[2] > a_image:
                chosen = torch.rand(len(flat), flat.shape[2], generator=generator).argsort(1)[:, :a_image]
                flat = flat.gather(2, chosen.to(flat.device)[:, None].expand(-1, flat.shape[1], -1))
            parts.append(flat.transpose(0, 1).flatten(1).cpu().double())
    return torch.cat(parts, 1)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Divide each row by its L2 norm; a dead channel (all zero) stays zero. Returned on the CPU."""
    norms = vectors.norm(dim=1, keepdim=True)
    return (vectors / norms.where(norms > 0, torch.ones_like(norms))).cpu()


def pairwise(vectors: Tensor, distance: str = "lp", p: float = 1, device: torch.device = CPU) -> Tensor:
    """Compute the distances between all rows: (n, d) -> (n, n), symmetric, zero on the diagonal. Each pair is compared once.

    device: where to compute them if they are many.
    """
    if (found := _on_device(vectors, distance, p, device)) is not None:
        return found.triu(1) + found.triu(1).T
    power = _power(distance, p)
    total = vectors.new_zeros(len(vectors), len(vectors))
    for part in vectors.split(_SLICE, 1):
        checkpoint()
        part = part.contiguous()
        for start in range(0, len(part), _ROWS):
            total[start : start + _ROWS, start:] += _powers(part[start : start + _ROWS], part[start:], power)
    upper = _finish(total, distance, p).triu(1)
    return upper + upper.T


def distances_between(vectors: Tensor, points: Tensor, distance: str = "lp", p: float = 1) -> Tensor:
    """Compute the distances from each row to each point: (n, d), (k, d) -> (n, k)."""
    parts = zip(vectors.split(_SLICE, 1), points.split(_SLICE, 1), strict=True)
    return _finish(_summed(parts, len(vectors), len(points), _power(distance, p)), distance, p)


def _summed(parts: Iterable[tuple[Tensor, Tensor]], n: int, k: int, power: float) -> Tensor:
    """Add up the powers of differences over slices of coordinates, (n, m) and (k, m) each: float64 (n, k)."""
    total = torch.zeros(n, k, dtype=torch.float64)
    for some, others in parts:
        checkpoint()
        some, others = some.contiguous(), others.contiguous()
        for start in range(0, n, _ROWS):
            total[start : start + _ROWS] += _powers(some[start : start + _ROWS], others, power)
    return total


def _on_device(
    vectors: Tensor,
    distance: str,
    p: float,
    device: torch.device,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor | None:
    """Compute the distances between some channels in float32 on a device; float64 (rows, columns), on the CPU.

    rows, columns: the channels to compare; None for all. Return None on the CPU, for few distances, and if those of a sample
    differ from the ones in float64.
    """
    every = torch.arange(len(vectors))
    rows, columns = every if rows is None else rows, every if columns is None else columns
    if device == CPU or len(rows) * len(columns) * vectors.shape[1] < _MANY:
        return None
    power = _power(distance, p)
    at_once = device.type == "cuda"  # which takes the values before it returns; others may read them later
    there = vectors.float().to(device, non_blocking=at_once)
    at, to = torch.cat([rows, columns]).to(device, non_blocking=at_once).split([len(rows), len(columns)])
    parts = at.split(max(1, _DEVICE_BYTES // (4 * len(columns))))
    found = torch.cat([_powers(there[part], there[to], power) for part in parts]).cpu().double()
    at, to = (torch.linspace(0, len(some) - 1, _SAMPLE).long() for some in (rows, columns))
    to = to.flip(0)  # or each channel of a whole group would be compared with itself
    exact = (vectors[rows[at]] - vectors[columns[to]]).abs().pow(power).sum(1)
    if not torch.allclose(found[at, to], exact, _SAME, _SAME):
        event("distances", reason=f"float32 on {device} is not accurate enough; computing on the CPU")
        return None
    return _finish(found, distance, p)


def _power(distance: str, p: float) -> float:
    return 2 if distance == "cosine" else p


def _powers(some: Tensor, others: Tensor, p: float) -> Tensor:
    distances = torch.cdist(some, others, p, "donot_use_mm_for_euclid_dist")
    return distances if p == 1 else distances.pow(p)


def _finish(sums: Tensor, distance: str, p: float) -> Tensor:
    """Convert sums of p-th powers to distances; for unit vectors 1 - cos is half the squared Euclidean distance."""
    if distance == "cosine":
        return sums / 2
    return sums if p == 1 else sums.pow(1 / p)


def most_important(scores: Tensor, k: int) -> Tensor:
    """Return the k channels with the largest scores (n,), the first of equal ones: int64 (k,), sorted."""
    return scores.argsort(descending=True, stable=True)[:k].sort().values


def choose_anchors(vectors: Tensor, scores: Tensor, k: int, kind: str, seed: int) -> tuple[Tensor | None, Tensor]:
    """Choose the k targets.

    Returns their vectors (k, d), or None if the targets are channels, and the channels whose places they take: int64 (k,).
    Centroids take the places of distinct channels near them, by an optimal assignment.
    """
    if kind == "important" or k == len(scores):
        return None, most_important(scores, k)
    from scipy.optimize import linear_sum_assignment

    centroids = torch.from_numpy(_centroids(vectors.numpy(), k, kind, seed))
    places = torch.from_numpy(linear_sum_assignment(distances_between(centroids, vectors, p=2).numpy())[1])
    order = places.argsort()
    return centroids[order], places[order]


def _centroids(vectors: np.ndarray, k: int, kind: str, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # duplicated channels leave fewer distinct clusters than k
        if kind == "kmeans":
            state = np.random.RandomState(seed)  # the random numbers that a single call with ten starts would use
            starts = []
            for _ in range(10):
                checkpoint()
                starts.append(KMeans(k, n_init=1, random_state=state).fit(vectors))
            return min(starts, key=lambda start: start.inertia_).cluster_centers_
        checkpoint()
        with beside():  # takes up to minutes for layers with thousands of channels
            return GaussianMixture(k, covariance_type="spherical", random_state=seed).fit(vectors).means_


def embed(geometry: Geometry, method: str = "pca", seed: int = 0) -> tuple[Tensor, str]:
    """Project the channels onto a plane: return float64 (n, 2) and a text that describes the plane.

    method: "pca" (of the unit vectors) or "tsne" (of the distances; van der Maaten & Hinton 2008).
    """
    check_choice("map", method, ("pca", "tsne"))
    n = len(geometry.vectors)
    if method == "tsne" and n > 3:
        from sklearn.manifold import TSNE

        finite = geometry.distances.isfinite()
        apart = geometry.distances.where(finite, 1.1 * geometry.distances[finite].max()).numpy()  # put other blocks far away
        perplexity = min(30.0, max(2.0, math.sqrt(n)))
        made = TSNE(metric="precomputed", init="random", perplexity=perplexity, random_state=seed).fit_transform(apart)
        return torch.from_numpy(made).double(), f"t-SNE of the distances, perplexity {perplexity:.0f}"
    centred = geometry.vectors - geometry.vectors.mean(0)
    values, axes = torch.linalg.eigh(centred @ centred.T)
    values = values.clamp(min=0)
    share = float(values[-2:].sum() / values.sum()) if values.sum() > 0 else 1.0
    plane = (axes * values.sqrt())[:, -2:].flip(1)
    plane = plane * torch.where(plane.gather(0, plane.abs().argmax(0, keepdim=True)) < 0, -1, 1)  # fix the arbitrary sign
    return plane, f"PCA of the unit vectors; the plane holds {share:.0%} of their variance"
