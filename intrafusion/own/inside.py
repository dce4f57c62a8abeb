"""What a child process does with a person's file (see `confined`): read it, try it, and leave in `made` what is to be kept.

Each is called as task(folder, tell, ...) in the folder of the given files, which it names as the person does, and gives JSON.
"""

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafusion import compat as _compat  # noqa: F401  (before anything imports torchvision)
from intrafusion.archives import opened
from intrafusion.arrays import Reading
from intrafusion.cards import card_of
from intrafusion.checkpoints import SUFFIXES
from intrafusion.errors import IntrafusionError, one_line
from intrafusion.groups import find_groups
from intrafusion.own import images as of_images
from intrafusion.program import read_program
from intrafusion.saved import layers_of
from intrafusion.zoo import load_model, sources

Tell = Callable[[int, int], None]


def program(folder: Path, tell: Tell, files: Sequence[str]) -> dict[str, Any]:
    """Read a program, and try it: {"size": [C, H, W], "classes": how many}."""
    model, size, classes = read_program(Path(files[0]))
    _check_groups(model, size)
    return {"size": size, "classes": classes}


def _check_groups(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Refuse a network whose channels nothing here can follow."""
    try:
        find_groups(model, torch.zeros(1, *size))
    except IntrafusionError:
        raise
    except Exception as error:  # a graph of any kind
        raise IntrafusionError(f"its channel groups cannot be traced: {one_line(error)}") from error


def weights(folder: Path, tell: Tell, files: Sequence[str], architecture: str, key: str | None) -> None:
    """Read weights into their architecture; leave them as weights.safetensors, float32, with a card as weights.json."""
    from safetensors.torch import save_file

    file = Path(files[0])
    if file.suffix.lower() not in SUFFIXES:
        raise IntrafusionError(f"{file} is no weights file: it must end in {', '.join(SUFFIXES)}")
    if zipfile.is_zipfile(file):
        with opened(file):
            pass
    model = load_model(architecture, file, weights_key=key)
    base, _ = sources.of(architecture).blank(architecture, model.state_dict())
    card = card_of(model)
    details = {**card.details, "architecture": architecture, "layers": layers_of(model, base)}
    card = replace(card, source=card.source.replace(str(file), f"weights {file.name}"), details=details)
    del base
    made = folder / "made"
    made.mkdir()
    save_file(_alone(model), made / "weights.safetensors")
    (made / "weights.json").write_text(json.dumps(card.to_dict()))


def _alone(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors, none of which shares its memory with another."""
    state, seen = {}, set()
    for name, value in model.state_dict().items():
        place = value.untyped_storage().data_ptr()
        state[name] = value.detach().clone() if place in seen else value.detach().contiguous()
        seen.add(place)
    return state


def images(
    folder: Path, tell: Tell, files: Sequence[str], layout: str | None, span: Sequence[float] | None
) -> list[str]:
    """Read arrays, or each picture of an archive; leave them in `made` as they are kept. What was passed over or converted."""
    reading = Reading(layout, None if span is None else (span[0], span[1]))
    return of_images.read(folder / "made", [Path(file) for file in files], tell, reading)
