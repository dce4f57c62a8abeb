"""Uploads of networks: weights for a known architecture, and programs of torch.export."""

import json
import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from intrafusion.data.datasets import DATASETS, KEPT, OWN, kept_data
from intrafusion.errors import IntrafusionError, one_line, unknown
from intrafusion.models.card import ModelCard, check_card
from intrafusion.models.exported_program import built
from intrafusion.models.hub import keep
from intrafusion.models.sources.builtin import ARCHITECTURES
from intrafusion.models.sources.user import is_safe, keep_program, open_saved
from intrafusion.models.state_dict import checked_state
from intrafusion.models.weights_file import read_weights_file
from intrafusion.runtime.safe_zip import FILE
from intrafusion.runtime.sandbox import Step, drained
from intrafusion.runtime.staging import NETWORKS, Workshop, free_path, given, run_check

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_log = logging.getLogger(__name__)


def take_weights(file: Path, architecture: str, name: str, key: str | None = None) -> str:
    """Keep a weights file of a known architecture, and return the name "kept/NAME" for `load_model`.

    key: `weights_key` of `load_model`. A child process reads the file (see `sandbox`). Raises IntrafusionError, and keeps
    nothing, for a file that is damaged or too large, could run code, holds NaN, or does not fit the architecture.
    """
    free_path(NETWORKS, name)
    with given(file) as workshop:
        card = file.with_suffix(".json")
        if card.is_file():
            workshop.give(card.name, card)
        return drained(weights_steps(workshop, architecture, name, key))


def weights_steps(
    workshop: Workshop, architecture: str, name: str, key: str | None = None, tell: Callable[[str], None] = _log.warning
) -> Generator[Step, None, str]:
    """Do the work of `take_weights` on the first given file, and yield each step."""
    if not is_safe(architecture):
        raise IntrafusionError(f"unknown architecture {architecture!r}; `models` lists the known ones")
    free_path(NETWORKS, name)
    asked = {"architecture": architecture, "key": key}
    yield from run_check("weights", workshop, workshop.given[:1], asked, tell)
    model: Any
    model, card = open_saved(_made(workshop, "weights.safetensors"), architecture)
    model.card = replace(card, name=architecture, details={**card.details, "architecture": architecture})
    return keep(model.eval(), name)


def take_program(
    file: Path, name: str, dataset: str = OWN, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> str:
    """Keep a program (.pt2), and return the name "kept/NAME" for `load_model`.

    dataset: the training data, one of `DATASETS` or `kept_data()`. mean, std: of its normalisation, one number for each
    channel, on pixels from 0 to 1; None for the usual ones of that dataset, or 0 and 1 (no normalisation) for own data. A
    child process reads and tries the file (see `sandbox`). Raises IntrafusionError, and keeps nothing, for an unknown
    dataset, a file that `read_program` refuses, or an invalid card.
    """
    free_path(NETWORKS, name)
    with given(file) as workshop:
        return drained(program_steps(workshop, name, dataset, mean, std))


def program_steps(
    workshop: Workshop,
    name: str,
    dataset: str = OWN,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    tell: Callable[[str], None] = _log.warning,
) -> Generator[Step, None, str]:
    """Do the work of `take_program` on the given file, and yield each step."""
    (file,) = workshop.given
    free_path(NETWORKS, name)
    if dataset not in DATASETS and dataset not in kept_data():
        raise unknown("dataset", dataset, [*DATASETS, *kept_data()])
    yield from run_check("program", workshop, [file], {}, tell)
    description, tensors = _made(workshop, "program.json"), _made(workshop, "program.safetensors")
    try:
        program = built(json.loads(description.read_text()), checked_state(read_weights_file(tensors), tensors))
    except (ValueError, RecursionError) as error:
        raise IntrafusionError(f"{file.name} is not a supported program: {one_line(error)}") from error
    size, classes = program.plan.image, program.plan.classes
    usual = _usual(dataset, size[0])
    stats = [tuple(own if own is not None else known) for own, known in zip((mean, std), usual, strict=True)]
    card = ModelCard(f"{KEPT}{name}", stats[0], stats[1], size, classes, dataset, source=f"program {file.name}")
    try:
        check_card(card)
    except (ValueError, TypeError) as error:
        raise IntrafusionError(f"invalid settings for {file.name}: {error}") from error
    return keep_program(program, card, name)


def _made(workshop: Workshop, name: str) -> Path:
    """Return the path of a file made by the child process. Raises IntrafusionError if it is missing or too large."""
    path = workshop.made / name
    if not path.is_file() or path.stat().st_size > 2 * FILE:
        raise IntrafusionError(f"rejected {workshop.given[0].name}: checking it produced no valid {name}")
    return path


def _usual(dataset: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation with which networks for this dataset are usually trained."""
    known = next((entry.card for entry in ARCHITECTURES.values() if entry.card.dataset == dataset), None)
    if known is not None and len(known.mean) == channels:
        return known.mean, known.std
    if dataset.startswith("imagenet") and channels == 3:
        return _IMAGENET
    return (0.0,) * channels, (1.0,) * channels
