"""Random augmentation of training images, on the device, with random numbers from a generator."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_and_flip(images: Tensor, generator: torch.Generator, pixels: int = 4) -> Tensor:
    """Crop each image from a zero-padded copy at its own random offset of up to `pixels`, and mirror about half of them."""
    count, _channels, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4)
    top, left = (torch.randint(0, 2 * pixels + 1, (count, 1), generator=generator) for _ in range(2))
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    top, left, mirrored = torch.cat([top, left, mirrored], 1).to(images.device).split(1, 1)  # one upload
    columns = left + torch.arange(width, device=images.device)
    columns = torch.where(mirrored > 0, columns.flip(1), columns)
    rows = top + torch.arange(height, device=images.device)
    index = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def wobble(
    images: Tensor, generator: torch.Generator, degrees: float = 12, stretch: float = 0.12, shift: float = 0.12
) -> Tensor:
    """Rotate, scale and shift each image slightly, by bilinear sampling; for digits, which must not be mirrored."""
    count = len(images)
    angle = (torch.rand(count, generator=generator) * 2 - 1) * math.radians(degrees)
    scale = 1 + (torch.rand(count, generator=generator) * 2 - 1) * stretch
    offset = (torch.rand(count, 2, generator=generator) * 2 - 1) * shift
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack((torch.stack((cos, -sin, offset[:, 0]), 1), torch.stack((sin, cos, offset[:, 1]), 1)), 1)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


def augment_for(dataset: str) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Return the augmentation for a data set by name; digits are not mirrored."""
    return wobble if dataset == "digits" else shift_and_flip
