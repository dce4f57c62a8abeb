"""Fingerprints of networks and image sets that do not depend on where their files are stored."""

import hashlib

from torch import nn

from intrafusion.data.datasets import ImageData
from intrafusion.models.card import card_of
from intrafusion.runtime.canonical import described

_PART = 1024  # images hashed at a time, because a large data set is a memory-mapped file


def of_model(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of everything that determines what a network computes, and of its input normalisation.

    The network is described by `canonical.described`. Raises IntrafusionError for a network without a card.
    """
    card = card_of(model)
    return of_text(described(model), str(card.mean), str(card.std))


def of_text(*parts: str) -> str:
    """Return the SHA-256 (hex) of the given strings."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def of_images(*choices: ImageData) -> str:
    """Return the SHA-256 (hex) of all pixels and labels, in order."""
    digest = hashlib.sha256()
    for data in choices:
        digest.update(f"{tuple(data.images.shape)}".encode())
        for part in (*data.images.split(_PART), data.labels):
            digest.update(part.cpu().contiguous().numpy().data)
    return digest.hexdigest()
