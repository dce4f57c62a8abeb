"""One training loop: SGD with Nesterov momentum, a one-cycle learning rate, and augmentation on the device."""

import json
import logging
import math
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from intrafusion.data.datasets import ImageData, normalise
from intrafusion.errors import IntrafusionError, check_choice
from intrafusion.models.batching import batches_for
from intrafusion.models.precision import PRECISIONS, has_bf16, inputs_for
from intrafusion.runtime.cancellation import checkpoint, clock, stoppable
from intrafusion.runtime.devices import CPU, deterministic, device_name, device_of
from intrafusion.runtime.shutdown import finishing
from intrafusion.training.checkpoint import load, save

_log = logging.getLogger(__name__)


def _one_cycle(position: float, warmup: float) -> float:
    """Rise linearly from 0.1 to 1 during the warm-up, then fall to 0 as a cosine."""
    if position < warmup:
        return 0.1 + 0.9 * position / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (position - warmup) / (1 - warmup))))


def _flat(position: float, warmup: float) -> float:
    """Stay at 1 for half of the steps, fall linearly to 0.01 at nine tenths, and stay there (as directional pruning)."""
    return min(1.0, max(0.01, 1 - 0.99 * (position - 0.5) / 0.4))


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "one-cycle": _one_cycle,
    "flat": _flat,
    "constant": lambda position, warmup: 1.0,
}
Augment = Callable[[Tensor, torch.Generator], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits, labels, inputs) -> scalar


class Diverged(IntrafusionError):
    """Error for a loss that is NaN or infinite."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run.

    lr: the peak learning rate. schedule: how the learning rate changes, one of SCHEDULES. warmup: share of the steps after
    which "one-cycle" reaches the peak. patience: number of evaluations on held-out images without a smaller loss that training
    tolerates before it ends; None: it does not end early. precision: "exact" (fp32), "fast" (bf16 autocast), or "auto": fast on
    a GPU with bf16, else exact.
    """

    epochs: float
    augment: Augment
    lr: float = 0.2
    weight_decay: float = 5e-4
    batch: int = 128
    warmup: float = 0.25
    smoothing: float = 0.0
    seed: int = 0
    patience: int | None = None
    schedule: str = "one-cycle"
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, tuple(SCHEDULES))
        check_choice("precision", self.precision, ("auto", *PRECISIONS))

    def steps(self, count: int) -> int:
        """Return the number of optimiser steps on `count` images."""
        return max(1, round(self.epochs * math.ceil(count / self.batch)))

    def in_bf16(self, device: torch.device) -> bool:
        """Return whether training on this device runs in bf16."""
        return has_bf16(device) and (self.precision == "fast" or (self.precision == "auto" and device != CPU))

    def where(self, device: torch.device) -> str:
        """Return the precision and the device of training as text, such as "fp32 on cpu"."""
        return f"{'bf16' if self.in_bf16(device) else 'fp32'} on {device_name(device)}"

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold, with the name of the augmentation."""
        return asdict(self) | {"augment": self.augment.__name__}


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of training since the previous moment.

    step: steps so far, of `steps`. epoch: passes over the images so far. seconds: training time so far. loss: mean loss, in
    nats for the cross-entropy. accuracy: fraction correct of the training images, as augmented. held_loss, held: cross-entropy
    in nats and accuracy on held-out images; None without any.
    """

    step: int
    steps: int
    epoch: float
    seconds: float = field(compare=False)
    loss: float
    accuracy: float
    held_loss: float | None = None
    held: float | None = None

    def __str__(self) -> str:
        told = f"epoch {self.epoch:.1f}, step {self.step} of {self.steps}: loss {self.loss:.3f}, {self.accuracy:.1%}"
        return told if self.held is None else f"{told}; held out {self.held_loss:.3f}, {self.held:.1%}"


def train(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    parameters: list[nn.Parameter] | None = None,
    optimiser: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
    held: ImageData | None = None,
    choose: bool = True,
    settle: Callable[[nn.Module], object] | None = None,
    looks: int | None = None,
    keep: Path | None = None,
) -> Generator[TrainingProgress, None, None]:
    """Train `model` in place on `data`, and yield progress after each stretch of steps; close the generator to stop.

    parameters: the parameters to train; None: all. optimiser: takes the steps instead of SGD on the parameters; the learning
    rate of each of its groups is that group's peak. loss: None for cross-entropy. held: held-out images, evaluated at each
    moment. With `choose`, a complete run leaves the model in its state of smallest held-out loss, else in its last state.
    settle: called on the model before each moment, for training that leaves a model unfit for use. looks: number of moments;
    None: one per epoch. keep: a file that gets the state of a run that is stopped in any way. The same run then resumes from it
    as if it had not been stopped. The file is deleted when the run is complete or has diverged.

    The images are moved to the model's device. Training is deterministic for a seed, thread count and machine; on a GPU, as far
    as torch has deterministic algorithms for the network's operators. The model is left in eval mode.
    Raises Diverged if the loss is NaN or infinite, and IntrafusionError if `keep` cannot be read or belongs to another run.
    """
    optimiser = optimiser or _sgd(list(model.parameters()) if parameters is None else parameters, recipe)
    device = device_of(model)
    data, held = data.to(device), None if held is None else held.to(device)
    run = _Run(model, data, recipe, mean, std, optimiser, loss, held, choose, settle, looks, keep)
    with nullcontext() if keep is None else finishing(), nullcontext() if device == CPU else deterministic():
        try:
            yield from run.moments()
        finally:
            run.end()


class _Run:
    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        recipe: Recipe,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        optimiser: torch.optim.Optimizer,
        loss: Loss | None,
        held: ImageData | None,
        choose: bool,
        settle: Callable[[nn.Module], object] | None,
        looks: int | None,
        keep: Path | None,
    ):
        self.model, self.data, self.recipe, self.mean, self.std = model, data, recipe, mean, std
        self.loss = loss or _cross_entropy(recipe.smoothing)
        self.held, self.keep = held, keep
        self.batches = math.ceil(len(data) / recipe.batch)
        self.steps = recipe.steps(len(data))
        self.every = self.batches if looks is None else max(1, round(self.steps / looks))
        self.optimiser, self.choose, self.settle = optimiser, choose, settle
        self.peaks = [group["lr"] for group in optimiser.param_groups]
        model.requires_grad_(False)
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.step, self.seconds, self.waited = 0, 0.0, 0
        self.low = recipe.in_bf16(data.labels.device)
        self.drops = any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in model.modules())
        self.sums = torch.zeros(3, device=data.labels.device)  # loss, correct answers and images since the last moment
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.past: list[TrainingProgress] = []
        self.is_complete = self.has_diverged = False
        self.is_whole = True  # False in the middle of a step, from which a run cannot resume
        if keep is not None and keep.exists():
            self._resume(keep)

    def moments(self) -> Iterator[TrainingProgress]:
        yield from list(self.past)
        device = self.data.labels.device
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        while self.step < self.steps:
            began = clock()
            with _training(self.model):
                for _ in range(min(self.every - self.step % self.every, self.steps - self.step)):
                    checkpoint()
                    with self._undivided():
                        self._advance(device)
            self.seconds += clock() - began
            with self._undivided(), stoppable(threading.Event()):  # a stop takes effect at the next step
                moment = self._moment()
                self.past.append(moment)
                patience = self.recipe.patience
                self.is_complete = self.step == self.steps or (patience is not None and self.waited > patience)
            yield moment
            if self.is_complete:
                return

    @contextmanager
    def _undivided(self) -> Iterator[None]:
        """Mark the state as not resumable if the block is interrupted, for example by a second Ctrl-C."""
        self.is_whole = False
        yield
        self.is_whole = True

    def _advance(self, device: torch.device) -> None:
        """Take one step of the optimiser."""
        place = self.step % self.batches
        if place == 0:
            self.order = torch.randperm(len(self.data), generator=self.generator).to(device)
        rows = self.order[place * self.recipe.batch : (place + 1) * self.recipe.batch]
        images, labels = self.recipe.augment(self.data.images[rows], self.generator), self.data.labels[rows]
        inputs = normalise(images, self.mean, self.std).contiguous(memory_format=torch.channels_last)
        share = SCHEDULES[self.recipe.schedule](self.step / self.steps, self.recipe.warmup)
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        with (
            _own_chance(self.recipe.seed + self.step, device, self.drops),
            torch.autocast(device.type, torch.bfloat16, enabled=self.low),
        ):
            logits = self.model(inputs).float()
            loss = self.loss(logits, labels, inputs)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        right = (logits.detach().argmax(1) == labels).sum()
        lost = loss.detach().float()
        self.sums += torch.stack([lost * len(rows), right.float(), torch.full_like(lost, len(rows))])
        self.step += 1

    def _moment(self) -> TrainingProgress:
        loss, right, count = self.sums.tolist()
        self.sums.zero_()
        if not math.isfinite(loss):
            self.has_diverged = True
            raise Diverged(
                f"the loss is NaN or infinite after {self.step} steps; choose a learning rate below {self.recipe.lr:g}"
            )
        if self.settle is not None:
            self.settle(self.model)
        held_loss, held = (None, None) if self.held is None else judged(self.model, self.held, self.mean, self.std)
        if held_loss is not None:
            self.waited += 1
            if self.best is None or held_loss < self.best[0]:
                self.waited, self.best = 0, (held_loss, _state(self.model) if self.choose else {})
        epoch = self.step / self.batches
        return TrainingProgress(self.step, self.steps, epoch, self.seconds, loss / count, right / count, held_loss, held)

    def end(self) -> None:
        """Leave the model ready for use; save the state of a stopped run, so that it can resume."""
        self.model.eval()
        if self.keep is not None:
            if self.is_complete or self.has_diverged:
                with suppress(OSError):
                    self.keep.unlink(missing_ok=True)
            elif self.step > 0 and self.is_whole:
                try:
                    self._save(self.keep)
                except IntrafusionError as error:  # report the reason for the stop, not this error
                    _log.warning("%s", error)
        if self.is_complete and self.choose and self.best is not None:
            self.model.load_state_dict(self.best[1])
        self.model.requires_grad_(False)

    def _save(self, path: Path) -> None:
        state = {
            "about": self._about(),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "order": self.order.cpu(),
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "waited": self.waited,
            "best": self.best,
            "past": [asdict(moment) for moment in self.past],
            "lr": self.recipe.lr,
        }
        save(state, path)

    def _resume(self, path: Path) -> None:
        state = load(path)
        if state.get("about") != self._about():
            raise IntrafusionError(f"{path} is the state of another run; remove it, or choose another file")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"].cpu())
        self.order, self.step, self.seconds = state["order"].to(self.sums.device), state["step"], state["seconds"]
        self.sums, self.waited, self.best = state["sums"].to(self.sums.device), state["waited"], state["best"]
        self.past = [TrainingProgress(**moment) for moment in state["past"]]

    def _about(self) -> str:
        shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        return json.dumps([self.recipe.to_dict(), len(self.data), self.every, shapes], sort_keys=True)


def _sgd(learning: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum; norms and biases have no weight decay."""
    decay, plain = ([p for p in learning if (p.ndim > 1) is many] for many in (True, False))
    return torch.optim.SGD(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.lr,
        momentum=0.9,
        nesterov=True,
    )


def judged(model: nn.Module, data: ImageData, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[float, float]:
    """Return the mean cross-entropy in nats and the accuracy (a fraction) of a network in eval mode."""
    model.eval()
    found = []
    with torch.inference_mode():
        for images, labels in batches_for(model, data.to(device_of(model))):
            logits = model(inputs_for(model, normalise(images, mean, std)))
            right = (logits.argmax(1) == labels).sum()
            found.append(torch.stack([F.cross_entropy(logits, labels, reduction="sum").float(), right.float()]))
    loss, right = torch.stack(found).cpu().double().sum(0).tolist()  # waits for a GPU once
    return loss / len(data), right / len(data)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _cross_entropy(smoothing: float) -> Loss:
    return lambda logits, labels, inputs: F.cross_entropy(logits, labels, label_smoothing=smoothing)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Set training mode and enable gradients, whatever the caller has set; leave the model in eval mode."""
    model.train()
    try:
        with torch.enable_grad():
            yield
    finally:
        model.eval()


@contextmanager
def _own_chance(seed: int, device: torch.device, needed: bool) -> Iterator[None]:
    """Seed the process's random numbers, which dropout uses, and restore their state afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=needed):
        if needed:
            torch.manual_seed(seed)
        yield
