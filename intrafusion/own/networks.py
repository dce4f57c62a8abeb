"""A person's networks: weights for an architecture that is known here, and programs of torch.export."""

import json
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from intrafusion.cards import ModelCard, check_card
from intrafusion.confined import Step, drained
from intrafusion.data import DATASETS, KEPT, OWN, kept_data
from intrafusion.errors import IntrafusionError, shown
from intrafusion.own.place import NETWORKS, Workshop, checked, free_path, given
from intrafusion.weights import cifar, plain
from intrafusion.zoo import keep, ours, sources
from intrafusion.zoo.architectures import ARCHITECTURES
from intrafusion.zoo.files import open_file

_MOST = 1 << 20  # of any size of images, and classes
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_log = logging.getLogger(__name__)


def take_weights(file: Path, architecture: str, name: str, key: str | None = None) -> str:
    """Keep a weights file of a known architecture; the name that opens it, as "kept/NAME". key: `weights_key` of `load_model`.

    A child process reads it (see `confined`). Raises IntrafusionError, and keeps nothing, for a file that is damaged, too
    large, could run code, holds NaN, or does not fit the architecture.
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
    """`take_weights` in steps, of the first file that was given."""
    if not sources.is_safe(architecture):
        raise IntrafusionError(f"{architecture!r} is no architecture that files may ask for: choose one of `models`")
    free_path(NETWORKS, name)
    asked = {"architecture": architecture, "key": key}
    yield from checked("weights", workshop, workshop.given[:1], asked, tell)

    def make(state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelCard]:
        return sources.of(architecture).blank(architecture, state)

    spelling = cifar if sources.of(architecture) is ours else plain
    model: Any
    model, card = open_file(workshop.made / "weights.safetensors", make, None, spelling, heads=True)
    model.card = replace(card, name=architecture, details={**card.details, "architecture": architecture})
    return keep(model.eval(), name)


def take_program(
    file: Path, name: str, dataset: str = OWN, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> str:
    """Keep a program (.pt2); the name that opens it, as "kept/NAME".

    dataset: what it was trained on, of `DATASETS` or `kept_data()`. mean, std: of its normalisation, one number a channel, on
    pixels from 0 to 1; None for what is usual with that data, and for own data none (0 and 1). A child process reads and tries
    the file (see `confined`). Raises IntrafusionError, and keeps nothing, for one that `read_program` refuses, or for a card
    that makes no sense.
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
    """`take_program` in steps, of the file that was given."""
    (file,), target = workshop.given, free_path(NETWORKS, name)
    if dataset not in DATASETS and dataset not in kept_data():
        raise IntrafusionError(f"unknown dataset {dataset!r}: choose one of {', '.join([*DATASETS, *kept_data()])}")
    told = yield from checked("program", workshop, [file], {}, tell)
    card = _card(told, file.name, name, dataset, mean, std)
    (workshop.folder / f"{target.name}.json").write_text(json.dumps(card.to_dict(), indent=2) + "\n")
    file.rename(workshop.folder / f"{target.name}.pt2")
    target.parent.mkdir(parents=True, exist_ok=True)
    for end in (".json", ".pt2"):  # a network is there once its second file is
        (workshop.folder / f"{target.name}{end}").replace(target.with_name(f"{target.name}{end}"))
    return f"{KEPT}{name}"


def _card(
    told: Any, file: str, name: str, dataset: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> ModelCard:
    """The card of a program of which a child told size (C, H, W) and number of classes."""
    try:
        (channels, height, width), classes = told["size"], told["classes"]
        if not all(type(one) is int and 1 <= one <= _MOST for one in (channels, height, width, classes)):
            raise ValueError(f"it has images of {shown(told['size'])[:60]} and {shown(classes)[:20]} classes")
        usual = _usual(dataset, channels)
        stats = [tuple(own if own is not None else known) for own, known in zip((mean, std), usual, strict=True)]
        size = channels, height, width
        card = ModelCard(f"{KEPT}{name}", stats[0], stats[1], size, classes, dataset, source=f"program {file}")
        check_card(card)
        return card
    except (ValueError, TypeError, KeyError) as error:
        raise IntrafusionError(f"no card for {file}: {error}") from error


def _usual(dataset: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that networks of this data are usually trained with."""
    known = next((entry.card for entry in ARCHITECTURES.values() if entry.card.dataset == dataset), None)
    if known is not None and len(known.mean) == channels:
        return known.mean, known.std
    if dataset.startswith("imagenet") and channels == 3:
        return _IMAGENET
    return (0.0,) * channels, (1.0,) * channels
