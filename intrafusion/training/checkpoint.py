"""Training state in files: tensors and plain values, written atomically and read without running code."""

from pathlib import Path
from typing import Any

import torch

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.runtime.atomic_write import atomic_path


def save(state: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values to a file, completely or not at all. Raises IntrafusionError if that fails."""
    with atomic_path(path) as part:
        torch.save(state, part)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, without running any code in it. Raises IntrafusionError if the file cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise IntrafusionError(f"cannot read {path}: {one_line(error)}; remove it and run again") from error
    if not isinstance(state, dict):
        raise IntrafusionError(f"{path} is not a training state; remove it and run again")
    return state


def stopped_rate(keep: Path | None) -> float | None:
    """Return the learning rate of the stopped run whose state is in a file; None without a file."""
    return load(keep)["lr"] if keep is not None and keep.exists() else None
