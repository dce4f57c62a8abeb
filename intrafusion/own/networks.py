"""A person's networks: weights for an architecture that is known here, and programs of torch.export."""

import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafusion.archives import check_size, opened
from intrafusion.cards import ModelCard, card_of, check_card
from intrafusion.data import DATASETS, KEPT, OWN, kept_data
from intrafusion.errors import IntrafusionError, one_line
from intrafusion.groups import find_groups
from intrafusion.own.place import NETWORKS, free_path, workshop
from intrafusion.program import read_program
from intrafusion.zoo import keep, load_model, sources
from intrafusion.zoo.architectures import ARCHITECTURES
from intrafusion.zoo.kept import keep_program

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def take_weights(file: Path, architecture: str, name: str, key: str | None = None) -> str:
    """Keep a weights file of a known architecture; the name that opens it, as "kept/NAME". key: `weights_key` of `load_model`.

    Raises IntrafusionError, and keeps nothing, for a file that is damaged, too large, could run code, holds NaN, or does
    not fit the architecture.
    """
    with workshop(file):
        if not sources.is_safe(architecture):
            raise IntrafusionError(
                f"{architecture!r} is no architecture that files may ask for: choose one of `models`"
            )
        free_path(NETWORKS, name)
        check_size(file)
        if zipfile.is_zipfile(file):
            with opened(file):
                pass
        model: Any = load_model(architecture, file.resolve(), weights_key=key)
        card = card_of(model)
        model.card = replace(card, source=card.source.replace(str(file.resolve()), f"weights {file.name}"))
        return keep(model, name)


def take_program(
    file: Path, name: str, dataset: str = OWN, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> str:
    """Keep a program (.pt2); the name that opens it, as "kept/NAME".

    dataset: what it was trained on, of `DATASETS` or `kept_data()`. mean, std: of its normalisation, one number a channel, on
    pixels from 0 to 1; None for what is usual with that data, and for own data none (0 and 1).
    Raises IntrafusionError, and keeps nothing, for a file that `read_program` refuses, or for a card that makes no sense.
    """
    with workshop(file) as folder:
        free_path(NETWORKS, name)
        if dataset not in DATASETS and dataset not in kept_data():
            raise IntrafusionError(f"unknown dataset {dataset!r}: choose one of {', '.join([*DATASETS, *kept_data()])}")
        copy = folder / "program.pt2"
        check_size(file)
        shutil.copyfile(file, copy)
        try:
            model, size, classes = read_program(copy)
            _check_groups(model, size)
        except IntrafusionError as error:
            raise IntrafusionError(str(error).replace(str(copy), file.name)) from error
        usual = _usual(dataset, size[0])
        stats = [tuple(given if given is not None else known) for given, known in zip((mean, std), usual, strict=True)]
        card = ModelCard(f"{KEPT}{name}", stats[0], stats[1], size, classes, dataset, source=f"program {file.name}")
        try:
            check_card(card)
        except (ValueError, TypeError) as error:
            raise IntrafusionError(f"no card for {file.name}: {error}") from error
        return keep_program(model, card, name)


def _check_groups(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Refuse a network whose channels nothing here can follow."""
    try:
        find_groups(model, torch.zeros(1, *size))
    except IntrafusionError:
        raise
    except Exception as error:  # a graph of any kind
        raise IntrafusionError(f"its channel groups cannot be traced: {one_line(error)}") from error


def _usual(dataset: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that networks of this data are usually trained with."""
    known = next((entry.card for entry in ARCHITECTURES.values() if entry.card.dataset == dataset), None)
    if known is not None and len(known.mean) == channels:
        return known.mean, known.std
    if dataset.startswith("imagenet") and channels == 3:
        return _IMAGENET
    return (0.0,) * channels, (1.0,) * channels
