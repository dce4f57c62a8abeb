"""Recipes of the embedded models: `python -m intrafusion train NAME` runs a recipe and writes weights and card."""

import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.evaluation.accuracy import evaluate
from intrafusion.models.card import ModelCard
from intrafusion.models.hub import load_model
from intrafusion.models.precision import check_bf16
from intrafusion.runtime.atomic_write import atomic_path
from intrafusion.runtime.paths import ASSETS
from intrafusion.training.augment import shift_and_flip, wobble
from intrafusion.training.loop import Recipe, TrainingProgress, train

RECIPES = {
    "digits-mlp": Recipe(epochs=120, augment=wobble, lr=0.1, batch=64),
    "digits-vgg": Recipe(epochs=40, augment=wobble, lr=0.1, batch=64),
    "digits-resnet": Recipe(epochs=60, augment=wobble, lr=0.1, batch=64),
    "cifar10-resnet20": Recipe(epochs=30, augment=shift_and_flip),
    "cifar10-vgg-slim": Recipe(epochs=40, augment=shift_and_flip),
}


def make(
    name: str,
    train_data: ImageData,
    test_data: ImageData,
    command: str,
    out: Path = ASSETS,
    report: Callable[[TrainingProgress], None] = lambda moment: None,
    **changes: float | str,
) -> ModelCard:
    """Train `name` by its recipe, with `changes` to it, and write NAME.safetensors and NAME.json into `out`; return the card.

    The test images do not influence training: the last epoch is kept, and they are used once, to measure accuracy.
    Raises IntrafusionError for an unknown name, for epochs or seed out of range, for precision "fast" on a device that lacks
    bf16, and if `out` cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if name not in RECIPES:
        raise IntrafusionError(f"no recipe for {name!r}; choose one of {', '.join(RECIPES)}")
    recipe = replace(RECIPES[name], **changes)  # type: ignore[arg-type]
    if recipe.epochs < 1 or not 0 <= recipe.seed < 2**63:
        raise IntrafusionError(f"epochs must be at least 1 and seed at least 0, not {recipe.epochs} and {recipe.seed}")
    if recipe.precision == "fast":
        check_bf16(train_data.labels.device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IntrafusionError(f"cannot write {name} to {out}: {error}") from error
    torch.manual_seed(recipe.seed)
    model: nn.Module = load_model(name, weights="random")
    card: ModelCard = model.card  # type: ignore[assignment]
    for epoch in train(model, train_data, recipe, card.mean, card.std):
        report(epoch)
    result = evaluate(model, test_data, limit=None)
    card = replace(
        card,
        source="trained by this project",
        accuracy=result.accuracy,
        licence="MIT",
        details={
            "command": command,
            "parameters": sum(p.numel() for p in model.parameters()),
            "test_images": result.count,
            "interval": result.interval,
            "seed": recipe.seed,
            "recipe": recipe.to_dict(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        },
    )
    try:
        with atomic_path(out / f"{name}.safetensors") as weights, atomic_path(out / f"{name}.json") as told:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights)
            told.write_text(json.dumps(card.to_dict(), indent=2) + "\n")
    except (IntrafusionError, SafetensorError) as error:
        raise IntrafusionError(f"cannot write {name} to {out}: {error}") from error
    return card
