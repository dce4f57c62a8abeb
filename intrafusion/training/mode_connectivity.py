"""Low-loss paths between two networks: a Bezier curve with trained bends and fixed ends.

Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS 2018. The parameters of a network on a
path were not trained together, so its BatchNorm statistics are measured again at each place.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.evaluation.loss_landscape import bezier, flatten_weights, losses_at, unflatten
from intrafusion.models.card import card_of
from intrafusion.pruning.groups.feature_maps import normalised, private
from intrafusion.runtime.devices import device_of, doubled
from intrafusion.training.augment import augment_for
from intrafusion.training.batchnorm import measure_norms, norms_of
from intrafusion.training.loop import Diverged, Recipe, TrainingProgress, train
from intrafusion.training.lr_search import RATES, best_rate

POINTS = 61
_BATCH = 64
_LOOKS = 40  # moments of a run
_MEASURED = 512  # images on which norms are measured again
_PROBE, _JUDGED, _PLACES = 24, 256, 7  # test of a rate: steps, images to evaluate on, places on the path


class Curve(nn.Module):
    """Networks along a Bezier curve between two of one shape. Its parameters are the bends, float32 (bends, D).

    The bends start on the straight line. In train mode every pass runs the network at a new random place t ~ U(0, 1), drawn by
    `seed`, and BatchNorm uses the batch's statistics. In eval mode every pass runs the network in the middle.
    Raises IntrafusionError if the two networks have different layers or shapes, or are the same.
    """

    def __init__(self, first: nn.Module, last: nn.Module, bends: int = 3, seed: int = 0):
        super().__init__()
        shapes = [{name: tuple(value.shape) for name, value in one.named_parameters()} for one in (first, last)]
        if shapes[0] != shapes[1] or len(norms_of(first)) != len(norms_of(last)):
            raise IntrafusionError("a path needs two networks of the same shape; these differ in layers, widths or norms")
        self.network = private(first)
        ends = torch.stack([flatten_weights(first), flatten_weights(last)])
        if torch.equal(ends[0], ends[1]):
            raise IntrafusionError("both ends of this path are the same network; choose another end")
        inside = torch.arange(1, bends + 1, device=ends.device).double()[:, None] / (bends + 1)
        self.register_buffer("ends", ends, persistent=False)
        self.bends = nn.Parameter((ends[0] + inside * (ends[1] - ends[0])).float().to(device_of(first)))
        self._generator = torch.Generator().manual_seed(seed)

    def vectors(self, t: Tensor) -> Tensor:
        """Return the networks at places t (g,) of the curve: (g, D), exact at the ends."""
        return bezier(self.ends, doubled(self.bends), t)  # type: ignore[arg-type]

    def straight(self, t: Tensor) -> Tensor:
        """Return the networks at places t (g,) of the straight line between the ends: (g, D)."""
        first, last = self.ends  # type: ignore[misc]
        return first + t.to(first)[:, None] * (last - first)

    def forward(self, images: Tensor) -> Tensor:
        t = torch.rand(1, generator=self._generator) if self.training else torch.tensor([0.5])
        return functional_call(self.network, unflatten(self.network, self.vectors(t)[0]), images)

    def get_extra_state(self) -> Tensor:
        """Return the state of the random numbers for t, so that stopped training resumes with the same ones."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self._generator.set_state(state.cpu())


@dataclass(frozen=True, eq=False)
class Walk:
    """Results of networks along a path: t, loss (nats) and accuracy (a fraction), (points,) each; nan if not yet measured."""

    t: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray

    @property
    def share(self) -> float:
        """Share of the places that are measured, in [0, 1]."""
        return float(np.isfinite(self.accuracy).mean())

    @property
    def barrier(self) -> float:
        """Rise of the loss above that of the worse end, in nats: 0 if there is none. nan until the first end is measured."""
        return float(np.nanmax(self.loss) - max(self.loss[0], self.loss[-1]))


def nothing(points: int = POINTS) -> Walk:
    """Return a walk without any measurements yet."""
    return Walk(np.linspace(0, 1, points), np.full(points, np.nan), np.full(points, np.nan))


def walk(
    curve: Curve, data: ImageData, seen: ImageData | None = None, straight: bool = False, points: int = POINTS
) -> Iterator[Walk]:
    """Measure loss and accuracy on `data` at `points` places from end to end, coarse to fine; yield after each place.

    seen: images on which the BatchNorm statistics are measured again at every place, including the ends; required if the
    network has BatchNorm. straight: walk the line between the ends instead of the curve. Raises IntrafusionError for BatchNorm
    without `seen`.
    """
    network, found = curve.network, nothing(points)
    batches, again = list(normalised(network, data)), [] if seen is None else list(normalised(network, seen))
    if norms_of(network) and not again:
        raise IntrafusionError("a path of networks with BatchNorm needs images for its statistics")
    loss, accuracy = found.loss, found.accuracy
    for place in _coarse_first(points):
        t = torch.tensor([found.t[place]])
        vectors = (curve.straight if straight else curve.vectors)(t).detach()
        measure_norms(network, (images for images, _ in again), unflatten(network, vectors[0]))
        losses, right = losses_at(network, lambda _: vectors, t, batches)  # noqa: B023
        loss[place], accuracy[place] = float(losses[0]), float(right[0])
        yield replace(found, loss=loss.copy(), accuracy=accuracy.copy())


def _coarse_first(count: int) -> list[int]:
    """Return all of range(count): both ends first, then every 16th, every 8th and so on."""
    return list(dict.fromkeys([0, count - 1, *(i for stride in (16, 8, 4, 2, 1) for i in range(0, count, stride))]))


@dataclass(frozen=True, eq=False)
class Path:
    """A path between two networks.

    line: the walk straight from end to end. curve: the walk along the Bezier curve, once it is trained. rate: peak learning
    rate of the curve's training, None until it is known. moments: progress of that training. norms: number of BatchNorms whose
    statistics are measured again at each place, on `seen` images. count: number of images for loss and accuracy.
    """

    line: Walk
    curve: Walk
    rate: float | None
    moments: tuple[TrainingProgress, ...]
    norms: int
    seen: int
    count: int

    @property
    def share(self) -> float:
        """Share of the work that is done, in [0, 1]; training counts as half of the work."""
        trained = self.moments[-1].step / self.moments[-1].steps if self.moments else 0.0
        return (self.line.share + 2 * trained + self.curve.share) / 4

    def rows(self) -> list[dict[str, float]]:
        """Return a row for each place: t, and loss and accuracy on the line and on the curve; nan if not measured."""
        line, curve = self.line, self.curve
        columns = zip(line.t, line.loss, line.accuracy, curve.loss, curve.accuracy, strict=True)
        names = "t", "line_loss", "line_accuracy", "curve_loss", "curve_accuracy"
        return [dict(zip(names, map(float, row), strict=True)) for row in columns]


def connect(
    first: nn.Module,
    last: nn.Module,
    train_data: ImageData,
    data: ImageData,
    epochs: float = 6.0,
    rate: float | None = None,
    seed: int = 0,
    bends: int = 3,
    points: int = POINTS,
) -> Iterator[Path]:
    """Walk the straight line between two networks, train a curve between them, and walk the curve; yield after each step.

    train_data: images to train the curve on, for `epochs` epochs; BatchNorms are measured again on 512 of them. data: images on
    which both walks are measured. rate: peak learning rate; None: find it by short runs, and lower it if the long run diverges.
    Raises IntrafusionError as `Curve` does, and if no learning rate gives a finite loss.
    """
    lesson = _Lesson(first, last, bends, train_data, Recipe(epochs, augment_for(train_data.name), 0.0, 0.0, _BATCH, seed=seed))
    curve, again = lesson.curve(), lesson.again
    found = Path(nothing(points), nothing(points), rate, (), len(norms_of(first)), len(again) if again else 0, len(data))
    for line in walk(curve, data, again, straight=True, points=points):
        found = replace(found, line=line)
        yield found
    trying = rate or lesson.rate()
    while not found.moments or found.moments[-1].step < found.moments[-1].steps:
        curve, found = lesson.curve(), replace(found, rate=trying, moments=())
        try:
            for moment in lesson.teach(curve, trying, lesson.recipe.epochs, _LOOKS):
                found = replace(found, moments=(*found.moments, moment))
                yield found
        except Diverged:  # a rate that suits a short run may be too high for a long one: retry with a lower rate
            if rate is not None or trying <= RATES[0]:
                raise
            trying, found = trying / 10**0.5, replace(found, moments=())
    for walked in walk(curve, data, again, points=points):
        found = replace(found, curve=walked)
        yield found


@dataclass(frozen=True, eq=False)
class _Lesson:
    """The settings that all training runs of one path share."""

    first: nn.Module
    last: nn.Module
    bends: int
    data: ImageData
    recipe: Recipe

    def curve(self) -> Curve:
        return Curve(self.first, self.last, self.bends, self.recipe.seed)

    @property
    def again(self) -> ImageData | None:
        """The images on which norms are measured; None for a network without norms."""
        return self.data.subset(_MEASURED, self.recipe.seed) if norms_of(self.first) else None

    def teach(self, curve: Curve, rate: float, epochs: float, looks: int) -> Iterator[TrainingProgress]:
        card, recipe = card_of(self.first), replace(self.recipe, lr=rate, epochs=epochs)
        steps = recipe.steps(len(self.data))
        return train(curve, self.data, recipe, card.mean, card.std, parameters=[curve.bends], looks=min(looks, steps))

    def rate(self) -> float:
        """Find the peak learning rate with the best short run. Raises IntrafusionError if no rate gives a finite loss."""
        found = best_rate(self._probe)
        if found is None:
            raise IntrafusionError("no learning rate gives a finite loss on the path between these networks; choose other ends")
        return found

    def _probe(self, rate: float) -> float:
        """Return the mean loss between the ends, on training images, after a short run; inf if it diverges."""
        curve = self.curve()
        try:
            for _ in self.teach(curve, rate, _PROBE / math.ceil(len(self.data) / self.recipe.batch), 1):
                pass
        except Diverged:
            return math.inf
        *_, walked = walk(curve, self.data.subset(_JUDGED, self.recipe.seed), self.again, points=_PLACES)
        loss = float(walked.loss[1:-1].mean())
        return loss if math.isfinite(loss) else math.inf
