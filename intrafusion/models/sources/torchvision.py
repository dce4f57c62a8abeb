"""torchvision's ImageNet classifiers, named "imagenet/NAME"."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.card import ModelCard
from intrafusion.models.sources.files import open_file
from intrafusion.models.state_dict import located
from intrafusion.runtime.cancellation import OnProgress
from intrafusion.runtime.download import fetch
from intrafusion.runtime.paths import home

PREFIX = "imagenet/"
CLASSES = 1000
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


def names() -> list[str]:
    from torchvision import models

    return [f"{PREFIX}{name}" for name in models.list_models(module=models)]


def dataset(name: str) -> str:
    return "imagenet"


def blank(name: str, state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelCard]:
    """Return the architecture with random weights, without the auxiliary heads used only in training, and its card.

    A vision transformer accepts images of one size: that of the given weights, or else that of torchvision's default weights.
    """
    from torchvision import models

    short, found = _short(name), card(name, member(name, None))
    options: dict[str, Any] = {"init_weights": False} if short in ("googlenet", "inception_v3") else {}
    if short.startswith("vit_"):
        places = state.get("encoder.pos_embedding")
        if places is not None and places.ndim == 3:
            side = int(short.rpartition("_")[2]) * math.isqrt(max(1, places.shape[1] - 1))
            found = replace(found, input_size=(3, side, side))
        options["image_size"] = found.input_size[-1]
    model = models.get_model(short, weights=None, **options)
    if hasattr(model, "aux_logits"):
        model.aux_logits, model.aux1, model.aux2, model.AuxLogits = False, None, None, None
    return model, replace(found, source="random initialisation", accuracy=None)


def published(name: str, weights: str | Path | None = None) -> tuple[str, Path, str]:
    """Return the URL of the published weights, their local path, and the start of their SHA-256."""
    url = member(name, weights).url
    path = home() / "weights" / url.rpartition("/")[2]
    return url, path, path.stem.rpartition("-")[2]


def open_model(name: str, weights: str | Path | None, progress: OnProgress | None) -> tuple[nn.Module, ModelCard]:
    """Load the model and its card. weights: a file, a member of the model's weights enum, or None for torchvision's default."""
    known = weights is None or is_member(name, str(weights))
    path, key = (fetch(*published(name, weights), progress), None) if known else located(str(weights))

    def make(state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelCard]:
        model, drawn = blank(name, state)
        return model, card(name, member(name, weights)) if known else replace(drawn, source=str(path))

    return open_file(path, make, key, unused=_AUXILIARY, heads=True)


def is_local(name: str) -> bool:
    return published(name)[1].exists()


def describe(name: str) -> dict[str, Any]:
    return {"dataset": "imagenet", "weights": "download", "accuracy": None, "summary": "torchvision classifier"}


def _short(name: str) -> str:
    from torchvision import models

    short = name.removeprefix(PREFIX)
    if short not in models.list_models(module=models):
        raise IntrafusionError(f"unknown torchvision classification model {short!r}; `models --imagenet` lists them")
    return short


def is_member(name: str, weights: str) -> bool:
    """Return whether the model's weights enum has a member of this name."""
    from torchvision import models

    return weights in models.get_model_weights(_short(name)).__members__


def member(name: str, weights: str | Path | None) -> Any:
    """Return the named member of the model's weights enum, or torchvision's default (every classifier has one)."""
    from torchvision import models

    enum = models.get_model_weights(_short(name))
    return enum.DEFAULT if weights is None else enum[str(weights)]


def card(name: str, weights: Any) -> ModelCard:
    """Build the card of torchvision weights from their transforms and metadata."""
    preset = weights.transforms()
    crop, accuracy = preset.crop_size[0], weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100
    return ModelCard(
        name,
        tuple(preset.mean),
        tuple(preset.std),
        (3, crop, crop),
        CLASSES,
        "imagenet",
        f"torchvision {weights}",
        accuracy,
        "BSD-3-Clause",
    )
