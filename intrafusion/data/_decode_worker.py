"""Pictures become pixels: in this process, or in workers that run this file alone and so start without PyTorch.

A worker reads JSON lines: first {"images": an .npy file, "mode": "RGB" or "L", "crop": one of CROPS}, then [row, file] for
each picture. It writes the pixels to their rows of that file, and answers [row, null], or [row, what was wrong]; where the
file cannot be written, [-1, why], and ends.
"""

import io
import json
import os
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

if __name__ == "__main__":  # the package's modules without each __init__, which imports PyTorch
    _here = os.path.dirname(os.path.abspath(__file__))
    for _name, _folder in (("intrafusion", os.path.dirname(_here)), ("intrafusion.data", _here)):
        sys.modules[_name] = types.ModuleType(_name)
        sys.modules[_name].__path__ = [_folder]

from intrafusion.data import image_headers

CROPS = ("none", "always", "other")  # other: pictures of the wanted size are taken as they are
_BAND = 1 << 20  # pixels of 16 bits that are converted at once


def decode(file: Path, shape: tuple[int, int], mode: str, crop: str) -> np.ndarray:
    """A picture's pixels: uint8 (H, W, 3), or (H, W, 1) for mode "L".

    shape: (H, W). crop: whether the picture is resized to cover 8/7 of it, and its middle cut out; without, it must have that
    size. Raises ValueError, in a few words, for one that cannot be read.
    """
    with _opened(file) as picture:
        whole = _eight_bits(picture)
        pixels = np.asarray(_cut(whole if whole.mode == mode else whole.convert(mode), shape, crop))
    return pixels.reshape(*shape, -1)


def count(file: Path) -> int:
    """How many pixels a picture has, as its header says. Raises ValueError as `decode` does."""
    with _opened(file) as picture:
        return picture.size[0] * picture.size[1]


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """A picture within the bounds. Raises ValueError, in a few words, for whatever goes wrong with it, in the block as well."""
    try:
        with file.open("rb") as opened:
            kind, content = image_headers.first(opened.read(image_headers.FILE + 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=(kind,)) as picture:
                if picture.size[0] * picture.size[1] > image_headers.PIXELS:
                    raise ValueError(f"it has {picture.size[0]}x{picture.size[1]} pixels")
                yield picture
    except MemoryError:
        raise
    except Exception as error:  # damaged pictures fail in many ways, in as many decoders
        raise ValueError(str(error).split("\n")[0][:300] or type(error).__name__) from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The picture where 8 bits a channel are all that is there; Pillow cuts off what is more. Of an animation, the first."""
    if picture.mode.startswith("I;16"):
        return _bytes(picture)
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels are of 32 bits: save it with 8 or 16 bits a channel")
    return picture.convert("RGBA") if picture.mode == "P" and "transparency" in picture.info else picture


def _bytes(picture: Image.Image) -> Image.Image:
    """A picture of 16 bits with 8, some rows at a time."""
    (width, height), rows = picture.size, max(1, _BAND // picture.size[0])
    made = np.empty((height, width), np.uint8)
    for top in range(0, height, rows):
        made[top : top + rows] = np.asarray(picture.crop((0, top, width, min(top + rows, height)))) // 257
    return Image.fromarray(made)


def _cut(picture: Image.Image, shape: tuple[int, int], crop: str) -> Image.Image:
    height, width = shape
    if crop == "none" and picture.size != (width, height):
        raise ValueError(f"it is {picture.size[0]}x{picture.size[1]}, not {width}x{height} pixels")
    if crop == "none" or (crop == "other" and picture.size == (width, height)):
        return picture
    least = round(width * 8 / 7), round(height * 8 / 7)
    scale = max(want / side for want, side in zip(least, picture.size, strict=True))
    if scale != 1:
        size = [max(want, round(side * scale)) for want, side in zip(least, picture.size, strict=True)]
        picture = picture.resize((size[0], size[1]), Image.Resampling.BILINEAR)
    left, top = (picture.size[0] - width) // 2, (picture.size[1] - height) // 2
    return picture.crop((left, top, left + width, top + height))


class Rows:
    """An .npy file of images, written row by row: into a map of it, a full disk would end the process."""

    def __init__(self, path: Path | str):
        whole = np.load(path, mmap_mode="r")
        self.shape, self._start, self._bytes = whole.shape[1:3], whole.offset, whole[0].nbytes
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, row: int, pixels: np.ndarray) -> None:
        """Raises OSError where the disk is full."""
        self._file.seek(self._start + row * self._bytes)
        left = memoryview(pixels.tobytes())
        while left:  # a disk that is about to be full takes a part
            left = left[self._file.write(left) :]


def main() -> None:
    """Decode what stdin asks for."""
    about = json.loads(sys.stdin.readline())
    with Rows(about["images"]) as images:
        for line in sys.stdin:
            row, file = json.loads(line)
            try:
                images.write(row, decode(Path(file), images.shape, about["mode"], about["crop"]))
                answer = None
            except ValueError as error:
                answer = str(error)
            except OSError as error:
                print(json.dumps([-1, error.strerror]), flush=True)
                return
            print(json.dumps([row, answer]), flush=True)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the process that asked is gone
        os._exit(1)
