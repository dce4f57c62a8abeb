"""A `torch.export` program (.pt2) as a network that can be pruned. Nothing in the file is run but allowed operators."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.evaluate import size
from intrafusion.program.archive import read_archive
from intrafusion.program.lift import lifted
from intrafusion.program.network import Program

_ACTIVATION = 1 << 28  # numbers that one step may make of _MANY images
_MANY, _CLASSES = 3, 100_000
_MACS = 2e12  # multiply-accumulates of one image
_DYNAMIC = 'export it with dynamic_shapes=({0: torch.export.Dim("batch")},)'


def read_program(path: Path) -> tuple[Program, tuple[int, int, int], int]:
    """The network of a .pt2 file, the size (C, H, W) of its images, and the number of its classes.

    Its logits are the program's. Convolutions, linear layers and batch norms are layers under the names of their weights.
    Raises IntrafusionError for a file that is none, that could run code, or that is no classifier of images.
    """
    written = read_archive(path)
    try:
        program, sizes = lifted(written)
        if len(sizes) != 4 or any(type(one) is not int or one < 1 for one in sizes[1:]):
            raise IntrafusionError(
                f"it takes {str(sizes)[:60]}, where images are (batch, channels, height, width) of a fixed size"
            )
        image = (sizes[1], sizes[2], sizes[3])
        classes = _tried_without_numbers(program, image)
        _tried(program, image)
        return program, image, classes
    except IntrafusionError as error:
        raise IntrafusionError(f"{path} is no program that can be used: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise IntrafusionError(f"{path} is no program of torch.export.save: {one_line(error)} in its graph") from error


def _tried_without_numbers(program: Program, image: tuple[int, int, int]) -> int:
    """The number of classes, from shapes alone, so that nothing large is computed before it is known to be bounded."""
    shapes = copy.deepcopy(program).to("meta")
    try:
        with torch.no_grad(), _Bounds():
            for batch in (_MANY, 2):
                logits = shapes(torch.empty(batch, *image, device="meta"))
                if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != batch:
                    raise IntrafusionError(
                        f"it gives {tuple(logits.shape)} for {batch} images, not ({batch}, classes): {_DYNAMIC}"
                    )
            if size(shapes, torch.empty(1, *image, device="meta")).macs > _MACS:
                raise IntrafusionError(f"it takes more than {_MACS:.0e} multiply-accumulates an image")
    except (RuntimeError, NotImplementedError, AssertionError, OverflowError, MemoryError) as error:
        raise IntrafusionError(f"it does not take 1, 2 and 3 images at once ({one_line(error)}): {_DYNAMIC}") from error
    if not 1 <= logits.shape[1] <= _CLASSES:
        raise IntrafusionError(f"it has {logits.shape[1]:,} classes, where 1 to {_CLASSES:,} are taken")
    return int(logits.shape[1])


def _tried(program: Program, image: tuple[int, int, int]) -> None:
    """Run two images, together and alone."""
    noise = torch.rand(2, *image, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            both, one = program(noise), program(noise[:1])
    except RuntimeError as error:
        raise IntrafusionError(f"it does not run: {one_line(error)}") from error
    if not torch.isfinite(both).all():
        raise IntrafusionError("it gives NaN or infinite logits")
    if not torch.allclose(both[:1], one, rtol=1e-3, atol=1e-3 * float(both.abs().max())):
        raise IntrafusionError(f"it gives an image other logits alone than beside another: {_DYNAMIC}")


class _Bounds(TorchDispatchMode):
    """Within it no operator may make more numbers than it should."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(isinstance(one, torch.Tensor) and one.numel() > _ACTIVATION for one in tree_leaves(made)):
            raise IntrafusionError(f"one of its steps makes more than {_ACTIVATION:,} numbers of {_MANY} images")
        return made
