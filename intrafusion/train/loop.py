"""One training loop: SGD with Nesterov momentum, a one-cycle learning rate, and augmentation on the device."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.data import ImageData, normalise

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run. lr: the one-cycle peak, reached after `warmup` of the steps."""

    epochs: int
    augment: Augment
    lr: float = 0.2
    weight_decay: float = 5e-4
    batch: int = 128
    warmup: float = 0.25
    smoothing: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """What happened in one epoch. loss: mean cross-entropy in nats; accuracy: fraction of the training images."""

    number: int
    loss: float
    accuracy: float


def train(
    model: nn.Module, data: ImageData, recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...]
) -> Iterator[Epoch]:
    """Train `model` in place on `data`; yields after each epoch, so the caller can report, evaluate or stop.

    Deterministic for a seed, thread count and machine. The model is left in eval mode.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.SGD(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.lr, momentum=0.9, nesterov=True,
    )  # fmt: skip
    steps = recipe.epochs * math.ceil(len(data) / recipe.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _one_cycle(step / steps, recipe.warmup))
    model.requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for number in range(1, recipe.epochs + 1):
        model.train()
        loss_sum = correct = torch.zeros((), device=data.labels.device)
        order = torch.randperm(len(data), generator=generator).to(data.labels.device)
        for rows in order.split(recipe.batch):
            images, labels = recipe.augment(data.images[rows], generator), data.labels[rows]
            logits = model(normalise(images, mean, std).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.smoothing)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            loss_sum = loss_sum + loss.detach() * len(rows)
            correct = correct + (logits.detach().argmax(1) == labels).sum()
        model.eval()
        yield Epoch(number, float(loss_sum) / len(data), float(correct) / len(data))
    model.requires_grad_(False)


def _one_cycle(position: float, warmup: float) -> float:
    """Linear rise from a tenth to one during the warm-up, then a cosine fall to zero."""
    if position < warmup:
        return 0.1 + 0.9 * position / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (position - warmup) / (1 - warmup))))


def shift_and_flip(images: Tensor, generator: torch.Generator, pixels: int = 4) -> Tensor:
    """Crop each image at an own random offset of up to `pixels` from a zero-padded copy, and mirror half of them."""
    count, _channels, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4)
    top, left = (torch.randint(0, 2 * pixels + 1, (count, 1), generator=generator) for _ in range(2))
    columns = left + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows = top + torch.arange(height)
    rows, columns = rows.to(images.device), columns.to(images.device)
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def wobble(
    images: Tensor, generator: torch.Generator, degrees: float = 12, stretch: float = 0.12, shift: float = 0.12
) -> Tensor:
    """Rotate, scale and shift each image a little, by bilinear sampling; for digits, which must not be mirrored."""
    count = len(images)
    angle = (torch.rand(count, generator=generator) * 2 - 1) * math.radians(degrees)
    scale = 1 + (torch.rand(count, generator=generator) * 2 - 1) * stretch
    offset = (torch.rand(count, 2, generator=generator) * 2 - 1) * shift
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack((torch.stack((cos, -sin, offset[:, 0]), 1), torch.stack((sin, cos, offset[:, 1]), 1)), 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images.device)
    return F.grid_sample(images.float(), grid, align_corners=False)
