"""Pretrained classifiers by name: embedded models, CIFAR releases, torchvision, timm, kept models and local files.

A model is a plain nn.Module in eval mode (normalised NCHW float -> logits) with its ModelCard as `model.card`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafusion.errors import IntrafusionError
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
from intrafusion.runtime.cancellation import OnProgress
from intrafusion.runtime.devices import choose_device
from intrafusion.runtime.download import stream

__all__ = [
    "ARCHITECTURES", "architecture_of", "dataset_of", "describe", "is_local", "keep", "kept_names", "kept_told", "kept_when",
    "load_model", "load_saved", "model_names", "names_weights", "runs_code", "stream_weights", "weight_bytes",
]  # fmt: skip


def model_names(imagenet: bool = True) -> list[str]:
    """Return every name that `load_model` accepts, kept and embedded models first.

    imagenet: whether to include the classifiers of torchvision and timm.
    """
    return user.names() + builtin.names() + (_classifiers() if imagenet else [])


def _classifiers() -> list[str]:
    return imagenet.names() + timm.names()


def architecture_of(name: str) -> str:
    """Return the name of a model's architecture.

    For a kept network this is the architecture that it was made from; for any other model it is the name itself.
    """
    return user.architecture(name) if name.startswith(user.PREFIX) else name


def dataset_of(name: str) -> str:
    """Return the dataset that a model was trained on. The error for an unknown name lists the known models."""
    return source_of(name).dataset(name)


def is_local(name: str, weights: str | None = None) -> bool:
    """Return whether `load_model` finds everything on this machine, without a download."""
    return bool(weights) or source_of(name).is_local(name)


def names_weights(name: str, weights: str) -> bool:
    """Return whether `weights` is a name rather than a path.

    Names are "random" and the members of a torchvision weights enum that are already downloaded.
    """
    if weights == "random":
        return True
    return source_of(name) is imagenet and imagenet.is_member(name, weights) and imagenet.published(name, weights)[1].exists()


def stream_weights(name: str) -> Iterator[tuple[int, int]]:
    """Download the published weights of `name` to where `load_model` looks, yielding (bytes done, total bytes)."""
    yield from stream(*source_of(name).published(name))


def describe(name: str) -> dict[str, Any]:
    """Return one row of the model list: what the model is, its weights source, and its published or measured accuracy."""
    return {"name": name} | source_of(name).describe(name)


def weight_bytes(name: str) -> int:
    """Return the size in bytes of a torchvision classifier's published weights.

    Return 0 for other models, which are small or whose size is bounded by their files.
    """
    return 4 * imagenet.member(name, None).meta["num_params"] if source_of(name) is imagenet else 0


def load_model(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: OnProgress | None = None,
    weights_key: str | None = None,
) -> nn.Module:
    """Load a pretrained classifier in eval mode, with its card in `.card`.

    Parameters
    ----------
    name : str
        One of `model_names`, or "package.module:factory". A factory's code is run and must return an nn.Module. The card is
        then the network's `.card`, or is built from CARD in "package.module" (a dict of card fields) and guesses.
    weights : str or Path, optional
        None for the embedded weights, or else the published ones (downloaded); "random" for the architecture alone; a
        torchvision weights enum ("IMAGENET1K_V1"); or a local file as written by training scripts (.safetensors, .pt, .pth,
        .th, .ckpt, .bin, .tar). A file is read without running code. It may hold a state dict that is wrapped ("state_dict",
        "model", "ema", ...), has key prefixes ("module.", "model.", "_orig_mod.", ...), or has a head with another number of
        classes. Whatever was chosen or left out is logged. If `FILE.json` exists beside the file, it is read as the card.
    device : str or torch.device
        "cpu", "cuda", "xpu", "mps", or "auto" for the first accelerator that works, or else the CPU.
    progress : callable, optional
        Called with (bytes done, total bytes) during a download.
    weights_key : str, optional
        Which state dict of the file to load, such as "model_ema" or "model.state_dict". `weights` of the form "FILE#KEY"
        selects it as well.

    Returns
    -------
    nn.Module
        Maps normalised images, float (B, C, H, W), to logits (B, classes).

    Raises
    ------
    IntrafusionError
        With a one-line message, if the name, file, device or download fails.

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
    return _ready(model, replace(card, name=name)).to(choose_device(device))


def load_saved(path: Path, architecture: str) -> nn.Module:
    """Load a network of `architecture` from a file written by `serialization.save_network`, with its card.

    The result is like that of `load_model`. Use this only for files written by this package. Raises IntrafusionError if the
    file is damaged.
    """
    return _ready(*user.open_saved(path, architecture))


def _ready(model: nn.Module, card: ModelCard) -> nn.Module:
    model.card = card  # type: ignore[assignment]
    check_finite(model.named_modules())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model.eval()
