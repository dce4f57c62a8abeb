"""Loss landscape: accuracy on the plane through three networks, along a path between two, and sharp directions."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError, shown
from intrafusion.pruning.groups.feature_maps import normalised
from intrafusion.runtime.cancellation import checkpoint
from intrafusion.runtime.devices import CPU, device_of, doubled

_MEMORY = 1 << 28  # bytes of weights of networks that are run in one pass
_BASIS = 1 << 31  # most bytes of the vectors that Lanczos keeps


def flatten_weights(model: nn.Module) -> Tensor:
    """Concatenate all parameters in order: float64 (D,), on the `float64_device` of the network."""
    return doubled(torch.cat([p.detach().flatten() for p in model.parameters()]))


def unflatten(model: nn.Module, vectors: Tensor) -> dict[str, Tensor]:
    """Return the parameters by name for vectors (..., D): (..., *shape) each, in the model's precision."""
    sizes = [p.numel() for p in model.parameters()]
    parts = vectors.split(sizes, -1)
    return {
        name: part.reshape(*vectors.shape[:-1], *p.shape).to(p)
        for (name, p), part in zip(model.named_parameters(), parts, strict=True)
    }


@dataclass(frozen=True, eq=False)
class Plane:
    """The plane through three networks of one shape. origin, u, v: float64 (D,), u and v orthonormal.

    at: coordinates of the networks on it, (3, 2): the first one at the origin, the second on the first axis.
    """

    model: nn.Module
    origin: Tensor
    u: Tensor
    v: Tensor
    at: Tensor

    def vectors(self, points: Tensor) -> Tensor:
        """Return the networks at points (g, 2): (g, D)."""
        return self.origin + points.to(self.u) @ torch.stack([self.u, self.v])


def plane_through(first: nn.Module, second: nn.Module, third: nn.Module) -> Plane:
    """Return the plane through three networks of one shape: dense, dropped, fused.

    Raises IntrafusionError if two of them are equal, or if all are on one line.
    """
    points = [flatten_weights(model) for model in (first, second, third)]
    if len({len(point) for point in points}) > 1:
        raise IntrafusionError("a plane needs networks with the same weight shapes; pad pruned networks first")
    one, two = points[1] - points[0], points[2] - points[0]
    u = one / one.norm().clamp(min=1e-30)
    rest = two - (two @ u) * u
    if one.norm() < 1e-9 or rest.norm() < 1e-9 * two.norm().clamp(min=1e-9):
        raise IntrafusionError("these three networks are collinear and span no plane; choose other networks")
    v = rest / rest.norm()
    at = torch.tensor([[0.0, 0.0], [float(one.norm()), 0.0], [float(two @ u), float(two @ v)]]).double()
    return Plane(first, points[0], u, v, at)


@dataclass(frozen=True, eq=False)
class Surface:
    """Loss (nats) and accuracy (a fraction) on a grid: x (a,), y (b,), loss and accuracy (b, a); nan if not yet measured."""

    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray

    @property
    def share(self) -> float:
        """The fraction of the grid that is measured."""
        return float(np.isfinite(self.accuracy).mean())

    @property
    def finest(self) -> "Surface | None":
        """The finest fully measured subgrid of every n-th row and column; None if not even the coarsest is measured."""
        for stride in range(1, len(self.x)):
            every = slice(None, None, stride)
            if (len(self.x) - 1) % stride == 0 and np.isfinite(self.accuracy[every, every]).all():
                return Surface(self.x[every], self.y[every], self.loss[every, every], self.accuracy[every, every])
        return None


def plane_grid(plane: Plane, size: int = 17, margin: float = 0.3) -> Surface:
    """Return an unmeasured grid around the plane's three networks.

    size: points per side. margin: distance beyond the networks on every side, as a share of their larger extent. Raises
    IntrafusionError for fewer than 2 points or more than 1,001, and for a margin below 0 or above 100.
    """
    if not 2 <= size <= 1001 or not 0 <= margin <= 100:
        raise IntrafusionError(
            f"size must be 2 to 1,001 points per side and margin from 0 to 100, not {shown(size)} and {margin}"
        )
    low, high = plane.at.min(0).values, plane.at.max(0).values
    room = margin * float((high - low).max())
    x, y = (np.linspace(float(low[i]) - room, float(high[i]) + room, size) for i in (0, 1))
    return Surface(x, y, np.full((size, size), np.nan), np.full((size, size), np.nan))


def surface(
    plane: Plane, data: ImageData, size: int = 17, margin: float = 0.3, stride: int = 4, patience: float = 0.5
) -> Iterator[Surface]:
    """Measure loss and accuracy on `plane_grid(plane, size, margin)`, from coarse to fine, yielding each intermediate state.

    stride: of the first, coarsest grid; halved until it is 1. patience: seconds after which to yield an unfinished grid.
    """
    empty = plane_grid(plane, size, margin)
    x, y, loss, accuracy = empty.x, empty.y, empty.loss, empty.accuracy
    batches = list(normalised(plane.model, data))
    together = _together(plane.model)
    while stride >= 1:
        places = np.stack(np.meshgrid(np.arange(0, size, stride), np.arange(0, size, stride), indexing="ij"), -1)
        rows, columns = places.reshape(-1, 2)[np.isnan(accuracy[::stride, ::stride]).ravel()].T
        told = time.monotonic()
        for start in range(0, len(rows), together):
            some = slice(start, start + together)
            points = torch.from_numpy(np.stack([x[columns[some]], y[rows[some]]], 1))
            losses, right = losses_at(plane.model, plane.vectors, points, batches, together)
            loss[rows[some], columns[some]], accuracy[rows[some], columns[some]] = losses.numpy(), right.numpy()
            if start + together >= len(rows) or time.monotonic() - told > patience:
                yield Surface(x, y, loss.copy(), accuracy.copy())
                told = time.monotonic()
        stride //= 2


def _together(model: nn.Module) -> int:
    """Return how many networks to run in one pass: as many as fit on a GPU; one on a CPU, where that is faster."""
    size = sum(p.numel() for p in model.parameters())
    return max(1, _MEMORY // (8 * max(size, 1))) if device_of(model) != CPU else 1


def losses_at(
    model: nn.Module,
    vectors: Callable[[Tensor], Tensor],
    points: Tensor,
    batches: Sequence[tuple[Tensor, Tensor]],
    together: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss and accuracy of the networks at points (g, ...): float64 (g,) each. Several run in one pass.

    vectors: maps points to networks (g, D). batches: inputs and labels. together: networks in one pass; None for what suits the
    device. Buffers are the model's. If a network's loss is nan, its accuracy is still that of its predictions.
    """
    losses, right = [], []
    for chunk in points.split(together or _together(model)):
        checkpoint()
        parameters = unflatten(model, vectors(chunk))
        sums = []
        for images, labels in batches:
            logits = _answers(model, parameters, images)
            expected = labels.expand(len(chunk), -1)
            lost = F.cross_entropy(logits.transpose(1, 2), expected, reduction="none").sum(1)
            sums.append(torch.stack([lost, (logits.argmax(2) == expected).sum(1).to(lost)]))
        total = torch.stack(sums).cpu().double().sum(0)  # waits for a GPU once
        losses.append(total[0])
        right.append(total[1])
    count = sum(len(labels) for _, labels in batches)
    return torch.cat(losses) / count, torch.cat(right) / count


def _answers(model: nn.Module, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return the logits of several networks on the same images: (g, b, classes)."""
    with torch.inference_mode():
        if len(next(iter(parameters.values()))) == 1:
            return functional_call(model, {name: value[0] for name, value in parameters.items()}, images)[None]
        return vmap(lambda own: functional_call(model, own, images))(dict(parameters))


@dataclass(frozen=True, eq=False)
class Ritz:
    """Lanczos estimates for a symmetric matrix H after some steps: values (k,), largest first, and the number of steps.

    residuals: ||H v - value v|| of each (k,), 0 for an eigenvalue. float64.
    """

    values: Tensor
    residuals: Tensor
    step: int
    steps: int
    _basis: Tensor
    _small: Tensor

    @property
    def vectors(self) -> Tensor:
        """Ritz vectors of the values: orthonormal (D, k)."""
        return self._basis[: self.step].T @ self._small


def lanczos(
    loss: Callable[[nn.Module], Tensor], model: nn.Module, count: int = 10, steps: int = 30, seed: int = 0
) -> Iterator[Ritz]:
    """Estimate the largest eigenvalues of the loss's Hessian, yielding a better estimate after each Hessian-vector product.

    loss: of the model, a scalar; twice differentiable where its parameters require gradients. steps: with full
    reorthogonalisation; at least `count`, and otherwise no more than fit into memory.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        slopes = torch.autograd.grad(loss(model), parameters, create_graph=True)

    def times(vector: Tensor) -> Tensor:
        parts = vector.to(slopes[0]).split([p.numel() for p in parameters])
        with torch.enable_grad():
            inner = sum((g * part.view_as(g)).sum() for g, part in zip(slopes, parts, strict=True))
        found = torch.autograd.grad(inner, parameters, retain_graph=True)
        return torch.cat([g.detach().flatten() for g in found]).cpu().double()

    size = sum(p.numel() for p in parameters)
    steps = min(max(min(steps, _BASIS // (8 * size)), count), size)
    basis = torch.zeros(steps, size, dtype=torch.float64)
    basis[0] = _unit(torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    T = torch.zeros(steps, steps, dtype=torch.float64)
    for k in range(1, steps + 1):
        checkpoint()
        w = times(basis[k - 1])
        T[k - 1, k - 1] = w @ basis[k - 1]
        for _ in range(2):
            w = w - basis[:k].T @ (basis[:k] @ w)
        beta = float(w.norm())
        if beta < 1e-10 * max(1.0, abs(float(T[0, 0]))):
            beta, steps = 0.0, k  # the Krylov space is invariant under H
        elif k < steps:
            T[k - 1, k] = T[k, k - 1] = beta
            basis[k] = w / beta
        values, small = torch.linalg.eigh(T[:k, :k])
        order = values.argsort(descending=True)[:count]
        yield Ritz(values[order], (beta * small[-1, order]).abs(), k, steps, basis, small[:, order])
        if k == steps:
            return


def sharpest(
    loss: Callable[[nn.Module], Tensor], model: nn.Module, count: int = 10, steps: int = 30, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the loss Hessian's largest eigenvalues (count,) and eigenvectors (D, count): the last step of `lanczos`."""
    *_, last = lanczos(loss, model, count, steps, seed)
    return last.values, last.vectors


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def share_within(displacement: Tensor, directions: Tensor) -> float:
    """Return sum_i <v_i, d>^2 / ||d||^2: the share of a displacement (D,) within orthonormal directions (D, k)."""
    return float((directions.T @ displacement).square().sum() / displacement.square().sum().clamp(min=1e-300))


def bezier(ends: Tensor, bends: Tensor, t: Tensor) -> Tensor:
    """Return points of the Bezier curve at t (g,) in [0, 1]: (g, D). ends: (2, D), bends: (m, D) between them."""
    points = torch.cat([ends[:1], bends, ends[1:]])
    degree = len(points) - 1
    k, t = torch.arange(degree + 1, dtype=torch.float64), t.double().cpu()[:, None]
    choose = torch.tensor([math.comb(degree, i) for i in range(degree + 1)], dtype=torch.float64)
    weights = choose * t**k * (1 - t) ** (degree - k)
    return weights.to(points) @ points
