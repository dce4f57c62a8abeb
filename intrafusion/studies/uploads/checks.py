"""Tasks of the child process that checks an uploaded file (see `sandbox`): read it, try it, write the results to `made`.

Each is called as task(folder, tell, ...) in the folder of the given files, names files as the user does, and returns
JSON-serialisable values.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from intrafusion import _torch_compat as _compat  # noqa: F401  (before anything imports torchvision)
from intrafusion.data import upload as of_images
from intrafusion.data.arrays import Reading
from intrafusion.errors import IntrafusionError, one_line
from intrafusion.models.card import card_of
from intrafusion.models.exported_program import describe_program, read_program, tensors_of
from intrafusion.models.hub import load_model
from intrafusion.models.serialization import save_network
from intrafusion.models.sources.user import source_of
from intrafusion.models.weights_file import SUFFIXES
from intrafusion.pruning.groups.find import find_groups
from intrafusion.runtime.cancellation import OnProgress
from intrafusion.runtime.safe_zip import open_zip


def program(folder: Path, tell: OnProgress, files: Sequence[str]) -> None:
    """Read and try a program; write its description to program.json and its tensors to program.safetensors."""
    model, size, _ = read_program(Path(files[0]))
    _check_groups(model, size)
    made = folder / "made"
    made.mkdir()
    (made / "program.json").write_text(json.dumps(describe_program(model)))
    save_file(_alone(tensors_of(model)), made / "program.safetensors")


def _check_groups(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Raise IntrafusionError for a network whose channel groups cannot be traced."""
    try:
        find_groups(model, torch.zeros(1, *size))
    except IntrafusionError:
        raise
    except Exception as error:  # an arbitrary graph may raise anything
        raise IntrafusionError(f"cannot find its channel groups: {one_line(error)}") from error


def weights(folder: Path, tell: OnProgress, files: Sequence[str], architecture: str, key: str | None) -> None:
    """Read weights into their architecture; write them to weights.safetensors, in float32, with their card."""
    file = Path(files[0])
    if file.suffix.lower() not in SUFFIXES:
        raise IntrafusionError(f"{file} is not a weights file: it must end in {', '.join(SUFFIXES)}")
    if zipfile.is_zipfile(file):
        with open_zip(file):
            pass
    model = load_model(architecture, file, weights_key=key)
    base, _ = source_of(architecture).blank(architecture, model.state_dict())
    card = card_of(model)
    card = replace(card, name=architecture, source=card.source.replace(str(file), f"weights {file.name}"))
    save_network(model, base, card, folder / "made" / "weights")


def _alone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with those cloned that share memory with an earlier one."""
    state, seen = {}, set()
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        state[name] = value.detach().clone() if place in seen else value.detach().contiguous()
        seen.add(place)
    return state


def images(folder: Path, tell: OnProgress, files: Sequence[str], layout: str | None, span: Sequence[float] | None) -> list[str]:
    """Read arrays, or each picture of an archive, and write them to `made` in the format in which they are kept.

    Returns notes on what was skipped or converted.
    """
    reading = Reading(layout, None if span is None else (span[0], span[1]))
    return of_images.read(folder / "made", [Path(file) for file in files], tell, reading)
