"""Distances between the channels of one group: the part of a transport plan that does not depend on sparsity or criterion."""

import math
import warnings
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

_SLICE, _ROWS = 64, 128  # coordinates and channels compared at once, so that they stay in the caches
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

    def members(self, block: int) -> Tensor:
        """Return the channels of one block: int64, sorted."""
        return (self.block == block).nonzero()[:, 0]


def compare_channels(
    model: nn.Module,
    group: Group,
    *,
    data: ImageData | None = None,
    calibration: int | None = 512,
    seed: int = 0,
    **options: Unpack[TransportKeywords],
) -> Geometry:
    """Compare the channels of `group` with each other.

    options: those of `TransportOptions`; only cost, distance, p and bias matter here. cost: compare the "weights" that write
    and read a channel (BN folded; `bias` appends the biases), or the "activations" that its consumers read on at most
    `calibration` images of `data`. distance: between vectors of length one, "lp" (the p-norm of the difference) or "cosine"
    (one minus the cosine). Raises IntrafusionError for an unknown choice, missing images, or options that do not fit together.
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
    distances = torch.full((group.size, group.size), torch.inf, dtype=torch.float64)
    for block in range(int(group.block.max()) + 1):
        rows = (group.block == block).nonzero()[:, 0]
        distances[rows[:, None], rows] = pairwise(vectors[rows], chosen.distance, chosen.p)
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


def pairwise(vectors: Tensor, distance: str = "lp", p: float = 1) -> Tensor:
    """Compute the distances between all rows: (n, d) -> (n, n), symmetric, zero on the diagonal. Each pair is compared once."""
    power = 2 if distance == "cosine" else p
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
    power = 2 if distance == "cosine" else p
    total = vectors.new_zeros(len(vectors), len(points))
    for some, others in zip(vectors.split(_SLICE, 1), points.split(_SLICE, 1), strict=True):
        checkpoint()
        total += _powers(some.contiguous(), others.contiguous(), power)
    return _finish(total, distance, p)


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
