"""timm's classifiers, named "timm/NAME" (optional extra).

Weights are local files, or are downloaded from timm's hub.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.models.card import ModelCard, unnamed
from intrafusion.models.sources.files import open_file
from intrafusion.models.state_dict import located
from intrafusion.runtime.cancellation import OnProgress
from intrafusion.runtime.download import fetch
from intrafusion.runtime.paths import home

PREFIX = "timm/"
_HUB = "https://huggingface.co"


def names() -> list[str]:
    """Return the names of models with pretrained weights, or an empty list if timm is not installed."""
    try:
        return [f"{PREFIX}{name}" for name in _timm().list_models(pretrained=True)]
    except IntrafusionError:
        return []


def dataset(name: str) -> str:
    return "imagenet"


def blank(name: str, state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelCard]:
    """Return the architecture with random weights, and its card."""
    try:
        model = _timm().create_model(_short(name), pretrained=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise IntrafusionError(f"timm cannot create {_short(name)!r}: {one_line(error)}") from error
    card = _card(name, model.pretrained_cfg)
    return model, replace(card, source="random initialisation")


def published(name: str) -> tuple[str, Path, str]:
    """Return the URL of the published weights, their local path, and "", because the hub's names hold no checksum."""
    model = _timm().get_pretrained_cfg(_short(name))
    if model is None or not model.hf_hub_id:
        raise IntrafusionError(f"{name} has no published weights; pass a file as weights= (--weights), or weights='random'")
    path = home() / "weights" / f"{model.hf_hub_id.replace('/', '--')}.safetensors"
    return f"{_HUB}/{model.hf_hub_id}/resolve/main/model.safetensors", path, ""


def open_model(name: str, weights: str | Path | None, progress: OnProgress | None) -> tuple[nn.Module, ModelCard]:
    """Load the model and its card. weights: a file, or None for the weights that timm publishes."""
    if weights is None:
        path, key = fetch(*published(name), progress), None
        source = f"timm {path.stem}"
    else:
        path, key = located(weights)
        source = str(path)

    def make(state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelCard]:
        model, card = blank(name, state)
        return model, replace(card, source=source)

    return open_file(path, make, key, heads=True)


def is_local(name: str) -> bool:
    return published(name)[1].exists()


def describe(name: str) -> dict[str, Any]:
    return {"dataset": "imagenet", "weights": "download", "accuracy": None, "summary": "timm classifier"}


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise IntrafusionError("timm is not installed; run pip install 'intrafusion[timm]'") from error
    return timm


def _short(name: str) -> str:
    short = name.removeprefix(PREFIX)
    if not _timm().is_model(short.partition(".")[0]):
        raise IntrafusionError(f"unknown timm model {short!r}; https://huggingface.co/timm lists them")
    return short


def _card(name: str, about: Mapping[str, Any]) -> ModelCard:
    """Build a timm model's card from its own configuration."""
    classes = int(about["num_classes"])
    data = "imagenet" if classes == 1000 else unnamed(classes)
    return ModelCard(
        name,
        tuple(about["mean"]),
        tuple(about["std"]),
        tuple(about["input_size"]),
        classes,
        data,
        licence=str(about.get("license") or ""),
    )
