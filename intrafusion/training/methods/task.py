"""Input and output of a trainer of the lab: its phases, each of which reports its progress and can be resumed."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.models.card import ModelCard
from intrafusion.models.hub import architecture_of, load_model
from intrafusion.pruning.groups.feature_maps import normalised
from intrafusion.runtime.atomic_write import atomic_path, remove_path
from intrafusion.runtime.shutdown import finishing
from intrafusion.training.augment import augment_for
from intrafusion.training.batchnorm import measure_norms
from intrafusion.training.checkpoint import load, save
from intrafusion.training.loop import Loss, Recipe, TrainingProgress, judged, train
from intrafusion.training.methods.spec import TrainSpec

_log = logging.getLogger(__name__)
_LOOKS = 25  # moments of a phase
_BINS = 24
MEASURED = 512  # images on which norms are measured


@dataclass(frozen=True)
class Look:
    """State of a network during training.

    zero: share of zero or masked weights in each layer, by name. of: what the histogram counts, as text. edges (b + 1,), counts
    (b,): the histogram. mark: a value to mark in the histogram, such as a threshold. sampled: accuracy on the held-out images
    with randomly drawn masks, a fraction.
    """

    zero: dict[str, float]
    of: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    mark: float | None = None
    sampled: float | None = None


@dataclass(frozen=True)
class PhaseProgress:
    """A moment of one phase of a run."""

    phase: str
    moment: TrainingProgress
    look: Look

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold; `from_dict` restores the same step."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "PhaseProgress":
        look: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in raw["look"].items()}
        return cls(raw["phase"], TrainingProgress(**raw["moment"]), Look(**look))


@dataclass(frozen=True, eq=False)
class Task:
    """A run of the lab: its spec and card, the images to train on (`learned`), and held-out images (`held`).

    folder: for the phases of a stopped run. seconds: training time so far, by phase. run: starts another run of the lab, as
    `runs.run_training` does.
    """

    spec: TrainSpec
    card: ModelCard
    learned: ImageData
    held: ImageData
    folder: Path
    seconds: dict[str, float]
    run: Callable[[TrainSpec, torch.device], Iterator[Any]]

    @property
    def device(self) -> torch.device:
        return self.learned.labels.device

    @property
    def example(self) -> Tensor:
        """A zero input, float (1, C, H, W)."""
        return self.card.example().to(self.device)

    def network(self, weights: str | None = "random") -> nn.Module:
        """Load the architecture with random weights, drawn by the seed, or with its own weights if `weights` is None."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.spec.seed)
            return load_model(architecture_of(self.spec.model), weights, self.device)

    def recipe(self, lr: float = 0.1, batch: int = 128, epochs: float | None = None, schedule: str = "one-cycle") -> Recipe:
        """Return a recipe with the run's settings, or the method's own (the arguments) where the run leaves them open."""
        spec, own = self.spec, min(batch, 64) if self.learned.name == "digits" else batch
        return Recipe(
            epochs or spec.epochs,
            augment_for(self.learned.name),
            lr=spec.lr or lr,
            batch=spec.batch or own,
            seed=spec.seed,
            schedule=schedule,
        )

    def teach(
        self,
        phase: str,
        model: nn.Module,
        recipe: Recipe,
        optimiser: torch.optim.Optimizer | None = None,
        loss: Loss | None = None,
        look: Callable[[nn.Module], Look] | None = None,
        settle: Callable[[nn.Module], object] | None = None,
    ) -> Iterator[PhaseProgress]:
        """Train a network in place and yield its steps. A finished phase is not trained again, and a stopped one resumes."""
        name = phase.replace(" ", "-")
        done, run, looks = (self.folder / f"{name}.{kind}" for kind in ("done", "run", "looks"))
        steps: list[PhaseProgress] = []
        for kept in (done, run):
            _drop_damaged(kept)
        if done.exists():
            state = load(done)
            model.load_state_dict(state["model"])
            steps = [PhaseProgress.from_dict(raw) for raw in json.loads(state["steps"])]
            yield from steps
            self.seconds[phase] = steps[-1].moment.seconds
            return
        seen = _steps_in(looks) if run.exists() else []
        moments = train(
            model,
            self.learned,
            recipe,
            self.card.mean,
            self.card.std,
            optimiser=optimiser,
            loss=loss,
            held=self.held,
            choose=False,
            settle=settle,
            looks=_LOOKS,
            keep=run,
        )
        try:
            for moment in moments:
                past = next((step.look for step in seen if step.moment.step == moment.step), None)
                found = past or (look or filters)(model)
                steps.append(PhaseProgress(phase, moment, found))
                self.seconds[phase] = moment.seconds
                yield steps[-1]
        finally:
            with finishing():
                known = {step.moment.step: step.to_dict() for step in (*seen, *steps)}
                with suppress(IntrafusionError), atomic_path(looks) as part:  # write these before the state that they belong to
                    part.write_text(json.dumps([*known.values()]))
                moments.close()  # saves the state of a stopped run
        with suppress(IntrafusionError):  # otherwise the phase would just be trained again
            save({"model": model.state_dict(), "steps": json.dumps([step.to_dict() for step in steps])}, done)

    def measure_norms(self, model: nn.Module) -> None:
        """Measure the statistics of every BatchNorm again, in place, on training images."""
        measure_norms(model, (images for images, _ in normalised(model, self.learned.subset(MEASURED, self.spec.seed))))

    def untaught(self, phase: str, model: nn.Module) -> PhaseProgress:
        """Return a step for a network before more training; its held-out loss and accuracy also stand for the training ones."""
        loss, right = judged(model, self.held, self.card.mean, self.card.std)
        return PhaseProgress(phase, TrainingProgress(0, 0, 0.0, 0.0, loss, right, loss, right), filters(model))


def _drop_damaged(path: Path) -> None:
    """Remove a state that cannot be read; its phase is then trained again."""
    try:
        if path.exists():
            load(path)
    except IntrafusionError as error:
        _log.warning("%s", error)
        remove_path(path)


def _steps_in(path: Path) -> list[PhaseProgress]:
    """Return the steps in a file; an empty list if it is missing or damaged."""
    try:
        return [PhaseProgress.from_dict(raw) for raw in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def histogram(values: Tensor, of: str, most: float | None = None) -> dict[str, Any]:
    """Return a histogram of values, from zero to `most` or their maximum, as fields of `Look`."""
    top = max(float(values.max()) if most is None and values.numel() else most or 0.0, 1e-12)
    counts = torch.histc(values.cpu().double(), _BINS, 0.0, top)
    return {
        "of": of,
        "edges": tuple(top * i / _BINS for i in range(_BINS + 1)),
        "counts": tuple(map(int, counts.tolist())),
    }


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of each convolution and linear layer, by dotted name."""
    return {name: layer.weight.detach() for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}


def filters(model: nn.Module) -> Look:
    """Return the shares of zero weights, and a histogram of the norms of the filters (rows) of all layers."""
    weights = layer_weights(model)
    norms = torch.cat([weight.flatten(1).norm(dim=1).cpu() for weight in weights.values()])
    return Look(zeros(weights), **histogram(norms, "norm of a filter"))


def zeros(weights: dict[str, Tensor]) -> dict[str, float]:
    """Return the share of each layer's weights that are exactly zero."""
    return {name: float((weight == 0).float().mean()) for name, weight in weights.items()}
