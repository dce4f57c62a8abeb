"""What tells one network, or one choice of images, from another, wherever its file lies."""

import hashlib

from torch import nn

from intrafusion.data.datasets import ImageData
from intrafusion.models.card import card_of
from intrafusion.runtime.canonical import described

_PART = 1024  # images at once, as a large data set lies in a mapped file


def of_model(model: nn.Module) -> str:
    """SHA-256 (hex) of all that tells what a network computes, as `canonical.described` has it, and of its input's
    normalisation.

    Raises IntrafusionError for a network without a card.
    """
    card = card_of(model)
    return of_text(described(model), str(card.mean), str(card.std))


def of_text(*parts: str) -> str:
    """SHA-256 (hex) of some texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def of_images(*choices: ImageData) -> str:
    """SHA-256 (hex) of all pixels and labels, in their order."""
    digest = hashlib.sha256()
    for data in choices:
        digest.update(f"{tuple(data.images.shape)}".encode())
        for part in (*data.images.split(_PART), data.labels):
            digest.update(part.cpu().contiguous().numpy().data)
    return digest.hexdigest()
