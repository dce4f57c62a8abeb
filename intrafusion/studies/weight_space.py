"""Dense, dropped and fused networks as points of one weight space, and views of the loss around and between them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.evaluation.accuracy import logits, wilson
from intrafusion.evaluation.loss_landscape import (
    Plane,
    Surface,
    flatten_weights,
    lanczos,
    plane_grid,
    plane_through,
    share_within,
    surface,
)
from intrafusion.models.hub import load_model
from intrafusion.pruning.groups.feature_maps import normalised, private
from intrafusion.pruning.groups.surgery import pad
from intrafusion.runtime.cache import Cache
from intrafusion.spec import PruneSpec
from intrafusion.studies.measurement import check_spec
from intrafusion.studies.session import Session, merged
from intrafusion.training.batchnorm import norms_of
from intrafusion.training.mode_connectivity import Path, connect

MERGED = {"dropped": "drop", "fused": "fusion", "calibrated": "calibrated", "refit": "refit"}
THREE = ("dense", "dropped", "fused")
CONTROLS = 20  # random directions with which displacements are compared
_PIXELS = 1 << 18  # of all images whose loss is differentiated twice


@dataclass(frozen=True, eq=False)
class Solutions:
    """The networks that a spec's pruning produces from a session's network with each merge, made once and cached.

    Names: "dense" and those of MERGED. BatchNorm is folded into the weights of all of them. The spec's merge is ignored.
    Raises IntrafusionError for a spec that cannot run.
    """

    spec: PruneSpec
    session: Session
    _known: Cache = field(default_factory=Cache, repr=False)

    def __post_init__(self) -> None:
        check_spec(self.spec, self.session)

    @property
    def images(self) -> ImageData:
        """The evaluation images that the spec selects."""
        return self.session.images().subset(self.spec.limit, self.spec.seed)

    def small(self, name: str) -> nn.Module:
        """Return the network in its own shape, without the removed channels. It must not be modified."""
        return self._both(name)[0]

    def whole(self, name: str) -> nn.Module:
        """Return the network in the dense shape, with zeros for removed channels. It must not be modified.

        It computes the same function as `small`.
        """
        return self._both(name)[1]

    def _both(self, name: str) -> tuple[nn.Module, nn.Module]:
        if name == "dense":
            return self.session.folded, self.session.folded

        def make() -> tuple[nn.Module, nn.Module]:
            made = merged(self.spec.but(merge=MERGED[name], recovery="none"), self.session)
            if not made.merged:
                raise IntrafusionError(
                    f"nothing was pruned: at sparsity {self.spec.sparsity:.0%} these groups lose no channel; choose a larger "
                    "sparsity"
                )
            return made.small, pad(made.small, self.session.folded, {one.group: one.kept for one in made.merged})

        return self._known.get(("networks", name), make)

    def logits(self, name: str) -> Tensor:
        """Return the network's logits for the evaluation images: float (N, classes), on the CPU."""
        return self._known.get(("logits", name), lambda: logits(self.small(name), self.images).cpu())

    def plane(self) -> Plane:
        """Return the plane through the dense, dropped and fused weights.

        Raises IntrafusionError if there is none, because nothing was pruned, or because some norms cannot be folded and so
        keep statistics that belong to one network.
        """
        if norms_of(self.session.folded):
            raise IntrafusionError(
                "some norms of this network cannot be folded into a layer; their statistics belong to one network, so there is "
                "no plane of weights"
            )
        return plane_through(*map(self.whole, THREE))


def networks_between(
    solutions: Solutions, ends: tuple[str, str], epochs: float, rate: float | None, training: int | None
) -> Iterator[Path]:
    """Measure the straight line between two networks and train a path between them; see `connect`.

    ends: each is one of the solutions' names, or a name for `load_model`. epochs, rate: see `connect`. training: number of
    training images for the path, None for all.
    """
    own = ("dense", *MERGED)
    device = str(solutions.session.device)
    first, last = (solutions.whole(name) if name in own else load_model(name, device=device) for name in ends)
    learned = solutions.session.training(solutions.spec.but(training=training))
    return connect(first, last, learned, solutions.images, epochs, rate, solutions.spec.seed)


@dataclass(frozen=True)
class Mark:
    """One of the three networks on the plane: its position (x, y), and its own loss and accuracy on `count` images.

    loss: in nats. accuracy: as in `evaluate`, with Wilson's 95 % interval. distance: L2 distance from the dense weights.
    """

    name: str
    x: float
    y: float
    loss: float
    accuracy: float
    interval: tuple[float, float]
    count: int
    distance: float


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice of weight space through the dense, dropped and fused weights, with the three networks marked on it."""

    surface: Surface
    marks: tuple[Mark, ...]

    @property
    def share(self) -> float:
        """The share of the grid that is measured."""
        return self.surface.share

    def rows(self) -> list[dict[str, Any]]:
        """Return JSON-serialisable rows: each mark, then each measured grid point. A loss that is not finite is None."""
        places = [("mark", m.name, m.x, m.y, m.loss, m.accuracy) for m in self.marks]
        on = self.surface
        for row, column in np.argwhere(np.isfinite(on.accuracy)).tolist():
            values = float(on.loss[row, column]), float(on.accuracy[row, column])
            places.append(("point", "", float(on.x[column]), float(on.y[row]), *values))
        return [
            {
                "kind": kind,
                "name": name,
                "x": x,
                "y": y,
                "loss": loss if math.isfinite(loss) else None,
                "accuracy": accuracy,
            }
            for kind, name, x, y, loss, accuracy in places
        ]


def slices(solutions: Solutions, size: int = 17, margin: float = 0.3) -> Iterator[Slice]:
    """Measure the slice on successively finer grids of up to `size` points a side; yields the marks alone first.

    margin: see `loss_landscape.plane_grid`.
    """
    made, data = solutions.plane(), solutions.images
    found = Slice(plane_grid(made, size, margin), tuple(_mark(solutions, made, place) for place in range(len(THREE))))
    yield found
    for measured in surface(made, data, size, margin, stride=1 << max(0, (size - 1).bit_length() - 2)):
        found = replace(found, surface=measured)
        yield found


def _mark(solutions: Solutions, made: Plane, place: int) -> Mark:
    answers, labels = solutions.logits(THREE[place]), solutions.images.labels.cpu()
    hits, count = int((answers.argmax(1) == labels).sum()), len(labels)
    x, y = made.at[place].tolist()
    loss = float(F.cross_entropy(answers.cpu().double(), labels))
    return Mark(THREE[place], x, y, loss, hits / count, wilson(hits, count), count, float(made.at[place].norm()))


@dataclass(frozen=True, eq=False)
class Sharpness:
    """The sharpest directions of the training loss around the dense weights, and the share of each displacement in them.

    values: the Hessian's largest eigenvalues (k,). residuals: the error of each eigenpair (k,). Both are in nats per squared
    distance. shares: by name, the share of the displacement's squared length; empty until `step` is the last of `steps`.
    images: number of training images in the loss. dimensions: D, the number of weights.
    """

    values: Tensor
    residuals: Tensor
    step: int
    steps: int
    shares: dict[str, float]
    images: int
    dimensions: int

    @property
    def share(self) -> float:
        """The share of the work that is done, in [0, 1]."""
        return self.step / self.steps

    def rows(self) -> list[dict[str, Any]]:
        """Return JSON-serialisable rows: each eigenvalue, then each share."""
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        values = [
            {"kind": "eigenvalue", "name": str(rank), "value": value, "residual": residual}
            for rank, (value, residual) in enumerate(pairs, start=1)
        ]
        return values + [{"kind": "share", "name": n, "value": v, "residual": None} for n, v in self.shares.items()]


def sharpness(solutions: Solutions, images: int = 256, count: int = 10, steps: int = 40) -> Iterator[Sharpness]:
    """Find the `count` sharpest directions by the Lanczos method; yields the estimate after every step.

    images: number of labelled training images; fewer are used if they are large. The shares of the displacements from dense
    to dropped and fused are compared with means over CONTROLS random directions: among all weights, and among the weights
    that pruning changes.
    """
    session, spec = solutions.session, solutions.spec
    pixels = session.card.input_size[-1] * session.card.input_size[-2]
    data = session.training(spec.but(training=min(images, max(8, _PIXELS // pixels))))
    network = private(session.folded).requires_grad_(True)
    batches = list(normalised(network, data))
    inputs, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    origin = flatten_weights(session.folded)
    moved = {name: (flatten_weights(solutions.whole(name)) - origin).cpu() for name in THREE[1:]}
    for found in lanczos(lambda model: F.cross_entropy(model(inputs), labels), network, count, steps, spec.seed):
        shares = _shares(moved, found.vectors, spec.seed) if found.step == found.steps else {}
        yield Sharpness(found.values, found.residuals, found.step, found.steps, shares, len(data), len(origin))


def _shares(moved: dict[str, Tensor], directions: Tensor, seed: int) -> dict[str, float]:
    shares = {name: share_within(displacement, directions) for name, displacement in moved.items()}
    changed = sum(displacement.abs() for displacement in moved.values()) != 0
    generator = torch.Generator().manual_seed(seed)
    random = torch.zeros(2, dtype=torch.float64)
    for _ in range(CONTROLS):
        noise = torch.randn(len(directions), generator=generator, dtype=torch.float64)
        random += torch.tensor([share_within(one, directions) for one in (noise, noise * changed)])
    return shares | dict(zip(("random", "random, changed weights"), (random / CONTROLS).tolist(), strict=True))
