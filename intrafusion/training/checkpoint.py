"""The state of training in a file: tensors and plain values, written whole or not at all, and read without running code."""

from pathlib import Path
from typing import Any

import torch

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.runtime.atomic_write import whole


def save(state: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values to a file, whole or not at all. Raises IntrafusionError where that fails."""
    with whole(path) as part:
        torch.save(state, part)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote; nothing in it is run. Raises IntrafusionError where the file cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise IntrafusionError(f"could not read {path} ({one_line(error)}): remove it and run again") from error
    if not isinstance(state, dict):
        raise IntrafusionError(f"{path} holds no training state: remove it and run again")
    return state


def stopped_rate(keep: Path | None) -> float | None:
    """The learning rate of the run whose state is in a file; None where there is none."""
    return load(keep)["lr"] if keep is not None and keep.exists() else None
