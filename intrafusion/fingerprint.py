"""What tells one network, or one choice of images, from another, wherever its file lies."""

import hashlib

from torch import nn

from intrafusion.cards import card_of
from intrafusion.data import ImageData

_PART = 1024  # images at once, as a large data set lies in a mapped file


def of_model(model: nn.Module) -> str:
    """SHA-256 (hex) of a network's layers, their numbers, the normalisation of its input, and `model.code` where it has one."""
    card = card_of(model)
    digest = hashlib.sha256(f"{model}{card.mean}{card.std}{getattr(model, 'code', '')}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def of_text(*parts: str) -> str:
    """SHA-256 (hex) of some texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def code_version() -> str:
    """The package's version: results of another one are never reused."""
    from intrafusion import __version__  # when called: the package imports this module

    return __version__


def of_images(*choices: ImageData) -> str:
    """SHA-256 (hex) of all pixels and labels, in their order."""
    digest = hashlib.sha256()
    for data in choices:
        digest.update(f"{tuple(data.images.shape)}".encode())
        for part in (*data.images.split(_PART), data.labels):
            digest.update(part.cpu().contiguous().numpy().data)
    return digest.hexdigest()
