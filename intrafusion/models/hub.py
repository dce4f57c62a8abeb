"""Pretrained classifiers by name: embedded ones, CIFAR releases, torchvision's and timm's, kept ones, or a local file.

A model is a plain nn.Module in eval mode (normalised NCHW float -> logits) with its ModelCard as `model.card`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.models.card import ModelCard
from intrafusion.models.fx.sharing import check_finite
from intrafusion.models.sources import builtin, timm, user
from intrafusion.models.sources import torchvision as imagenet
from intrafusion.models.sources.builtin import ARCHITECTURES as ARCHITECTURES
from intrafusion.models.sources.lookup import runs_code as runs_code
from intrafusion.models.sources.nearest import nearest
from intrafusion.models.sources.user import keep as keep
from intrafusion.models.sources.user import names as kept_names
from intrafusion.models.sources.user import source_of
from intrafusion.models.sources.user import told as kept_told
from intrafusion.models.sources.user import when as kept_when
from intrafusion.models.state_dict import Misfit, keyed
from intrafusion.runtime.download import Progress, stream

__all__ = [
    "ARCHITECTURES", "architecture_of", "dataset_of", "describe", "is_local", "keep", "kept_names", "kept_told", "kept_when",
    "load_model", "load_saved", "model_names", "names_weights", "runs_code", "stream_weights", "weight_bytes",
]  # fmt: skip


def model_names(imagenet: bool = True) -> list[str]:
    """Every name `load_model` knows, kept and embedded ones first; `imagenet` adds torchvision's and timm's classifiers."""
    return user.names() + builtin.names() + (_classifiers() if imagenet else [])


def _classifiers() -> list[str]:
    return imagenet.names() + timm.names()


def architecture_of(name: str) -> str:
    """The name of a model's architecture: its own, or of a kept network that which it was made from."""
    return user.architecture(name) if name.startswith(user.PREFIX) else name


def dataset_of(name: str) -> str:
    """The dataset that a model was trained on; names the known models when there is no such one."""
    return source_of(name).dataset(name)


def is_local(name: str, weights: str | None = None) -> bool:
    """Whether `load_model` would find everything on this machine, without a download."""
    return bool(weights) or source_of(name).is_local(name)


def names_weights(name: str, weights: str) -> bool:
    """Whether these weights of a model are a name and no path: "random", or published ones that are here already."""
    if weights == "random":
        return True
    return source_of(name) is imagenet and imagenet.is_member(name, weights) and imagenet.published(name, weights)[1].exists()


def stream_weights(name: str) -> Iterator[tuple[int, int]]:
    """Download the published weights of `name` to where `load_model` looks, yielding (bytes done, bytes in all)."""
    yield from stream(*source_of(name).published(name))


def describe(name: str) -> dict[str, Any]:
    """One row of the list of models: what it is, where its weights come from, and its published or measured accuracy."""
    return {"name": name} | source_of(name).describe(name)


def weight_bytes(name: str) -> int:
    """Bytes of a torchvision classifier's weights, as published; 0 for others, which are small or bounded by their files."""
    return 4 * imagenet.member(name, None).meta["num_params"] if source_of(name) is imagenet else 0


def load_model(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    weights_key: str | None = None,
) -> nn.Module:
    """Open a pretrained classifier, in eval mode, with its card in `.card`.

    Parameters
    ----------
    name : str
        One of `model_names`, or "package.module:factory", whose code then runs and gives an nn.Module. Its card is its `.card`,
        or made of the module's CARD (a dict of card fields) and guesses.
    weights : str or Path, optional
        None for the embedded or else the published ones (downloaded), "random" for the architecture alone, a torchvision
        weights enum ("IMAGENET1K_V1"), or a local file as training scripts leave them (.safetensors, .pt, .pth, .th, .ckpt,
        .bin, .tar).
        A file is read without running code: a state dict, perhaps wrapped ("state_dict", "model", "ema", ...), perhaps with
        prefixes ("module.", "model.", "_orig_mod.", ...) or a head of another number of classes. What was chosen or left out is
        logged. `FILE.json` beside the file, when there, is its card.
    device : str or torch.device
        "cpu", "cuda" or "mps".
    progress : callable, optional
        Called with (bytes done, bytes in all) during a download.
    weights_key : str, optional
        Which state dict of the file is meant, as "model_ema" or "model.state_dict"; "FILE#KEY" says it, too.

    Returns
    -------
    nn.Module
        Takes normalised images, float (B, C, H, W), and gives logits (B, classes).

    Raises
    ------
    IntrafusionError
        In one line, when the name, the file, the device or the download does not work.

    Examples
    --------
    >>> import intrafusion as itf
    >>> model = itf.load_model("digits-mlp")
    >>> model.card.dataset, model.card.classes, model.card.input_size
    ('digits', 10, (1, 8, 8))
    """
    weights = keyed(weights, weights_key)
    source = source_of(name)
    if weights == "random":
        model, card = source.blank(name, {})
    else:
        try:
            model, card = source.open_model(name, weights, progress)
        except Misfit as error:
            raise IntrafusionError(f"{error}{nearest(error.table, error.name)}") from error
    return _ready(model, replace(card, name=name)).to(_device(device))


def load_saved(path: Path, architecture: str) -> nn.Module:
    """A network of `architecture` that `serialization.save_network` wrote into a file, with its card, as `load_model` gives
    one.

    Only for files that we wrote ourselves. Raises IntrafusionError where it is damaged.
    """
    return _ready(*user.open_saved(path, architecture))


def _ready(model: nn.Module, card: ModelCard) -> nn.Module:
    model.card = card  # type: ignore[assignment]
    check_finite(model.named_modules())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model.eval()


def _device(name: str | torch.device) -> torch.device:
    try:
        if torch.device(name).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("no such hardware")
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise IntrafusionError(f"device {name!r} is not available here: use cpu ({one_line(error)})") from error
