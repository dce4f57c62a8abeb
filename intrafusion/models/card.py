"""Model cards: the metadata needed to use a set of weights, stored as JSON beside the weights file."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError, one_line, shown
from intrafusion.runtime.file_text import FIELD, check_text, texts_in

if TYPE_CHECKING:
    from intrafusion.data.datasets import ImageData


_MOST, _NUMBERS = 1 << 20, 1 << 26  # limits: sizes on a card and bytes of a card file; numbers in one input


@dataclass(frozen=True)
class ModelCard:
    """Metadata needed to use a model's weights. accuracy: fraction on the dataset's test split, or None."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]  # C, H, W
    classes: int
    dataset: str
    source: str = "random initialisation"
    accuracy: float | None = None
    licence: str = ""
    details: dict[str, Any] = field(default_factory=dict, hash=False)  # for models trained here: command, seed, versions

    def example(self) -> Tensor:
        """Return a zero input, float (1, C, H, W)."""
        return torch.zeros(1, *self.input_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def card_of(model: nn.Module) -> ModelCard:
    """Return the model's card. Raises IntrafusionError if it has none."""
    card = getattr(model, "card", None)
    if not isinstance(card, ModelCard):
        raise IntrafusionError("the model has no card; set model.card to a ModelCard with its mean, std and input_size")
    return card


def card_for(model: nn.Module, data: "ImageData") -> ModelCard:
    """Return the model's card after checking that `data` fits it.

    Raises IntrafusionError if the model has no card, or if the classes or image size of `data` do not match it.
    """
    card = card_of(model)
    other = len(data.classes) > card.classes or (
        card.dataset == unnamed(card.classes) and len(data.classes) != card.classes  # fewer could be any subset
    )
    if other or tuple(data.images.shape[1:]) != tuple(card.input_size):
        advice = (
            f"choose the data the model was trained on ({card.dataset})"
            if card.dataset != data.name
            else "use images of that size with those classes, or correct the model's card"
        )
        raise IntrafusionError(
            f"{card.name} needs {card.classes} classes of {card.input_size} images, but {data.name} has {len(data.classes)} "
            f"of {tuple(data.images.shape[1:])}; {advice}"
        )
    return card


def unnamed(classes: int) -> str:
    """Return the dataset name for a network of which only the number of classes is known."""
    return f"{classes} classes"


def read_card(path: Path, default: ModelCard) -> ModelCard:
    """Read a card from a JSON file and merge it over `default`. Return `default` if there is no file."""
    if not os.path.isfile(path):
        return default
    if path.stat().st_size > _MOST:
        raise IntrafusionError(f"{path} is not a model card: it is larger than {_MOST >> 20} MiB")
    try:
        text = path.read_text()
    except (ValueError, OSError) as error:
        raise IntrafusionError(f"{path} is not a model card: {one_line(error)}") from error
    return card_from(text, default, path)


def card_from(text: str, default: ModelCard, path: Path) -> ModelCard:
    """Parse a card from the JSON text of a file and merge it over `default`.

    Raises IntrafusionError if the text is not a valid card. path: the file, for the message.
    """
    try:
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise TypeError("it is not a JSON object")
        known = {f.name: raw[f.name] for f in fields(ModelCard) if f.name in raw and f.name != "name"}
        for key in ("mean", "std", "input_size"):
            if key in known:
                known[key] = tuple(known[key])
        card = replace(default, **known)
        check_card(card)
        return card
    except (ValueError, TypeError, RecursionError) as error:
        raise IntrafusionError(f"{path} is not a model card: {one_line(error)}") from error


def check_card(card: ModelCard) -> None:
    """Raise ValueError or TypeError if the fields of a card are invalid."""
    texts = card.name, card.dataset, card.source, card.licence
    if not all(isinstance(text, str) for text in texts) or not isinstance(card.details, dict):
        raise TypeError("dataset, source and licence must be strings, and details an object")
    for text in texts_in([*texts, card.details]):
        check_text(text, "the card", "a text", FIELD)
    if len(card.input_size) != 3 or not len(card.mean) == len(card.std) == card.input_size[0]:
        raise ValueError("mean and std must have one number for each channel of input_size (C, H, W)")
    sizes = *card.input_size, card.classes
    if not all(type(size) is int and 1 <= size <= _MOST for size in sizes) or math.prod(card.input_size) > _NUMBERS:
        raise ValueError("input_size and classes must be positive integers of a reasonable size")
    if not all(abs(mean) <= 1e9 and 1e-9 <= std <= 1e9 for mean, std in zip(card.mean, card.std, strict=True)):
        raise ValueError("mean must be finite and std positive, for pixels from 0 to 1")
    if card.accuracy is not None and not 0 <= card.accuracy <= 1:
        raise ValueError(f"accuracy must be in [0, 1], not {shown(card.accuracy)}")
