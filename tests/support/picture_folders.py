"""Folders of small pictures for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

from intrafusion.data._decode_worker import decode

SHAPE = (12, 12)


def scattered(root: Path, count: int, classes: int = 3) -> Path:
    """Noise of various sizes, in class folders named by WordNet id."""
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / ("n01440764", "n01443537", "n01484850")[number % classes]
        folder.mkdir(parents=True, exist_ok=True)
        size = int(rng.integers(10, 30)), int(rng.integers(10, 30)), 3
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number:04}.png")
    return root


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def one_by_one(files: list[Path]) -> np.ndarray:
    return np.stack([decode(file, SHAPE, "RGB", "always") for file in files])
