"""Decoding of pictures to pixels, in this process or in workers that run only this file and so start without PyTorch.

A worker reads JSON lines: first {"images": an .npy file, "mode": "RGB" or "L", "crop": one of CROPS}, then [row, file] for each
picture. It writes the pixels to their rows of that file, and answers [row, null] or [row, error message]. If the file cannot be
written, it answers [-1, error message] and exits.
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
from PIL import Image, UnidentifiedImageError

if __name__ == "__main__":  # import the package's modules without their __init__, which imports PyTorch
    _here = os.path.dirname(os.path.abspath(__file__))
    for _name, _folder in (("intrafusion", os.path.dirname(_here)), ("intrafusion.data", _here)):
        sys.modules[_name] = types.ModuleType(_name)
        sys.modules[_name].__path__ = [_folder]

from intrafusion.data import image_headers

CROPS = ("none", "always", "other")  # other: pictures of the wanted size are not cropped
_BAND = 1 << 20  # 16-bit pixels that are converted at once


def decode(file: Path, shape: tuple[int, int], mode: str, crop: str) -> np.ndarray:
    """Return `pixels_of` of a file's content. Raises ValueError, with a short message, if it cannot be read."""
    try:
        with file.open("rb") as opened:
            content = opened.read(image_headers.FILE + 1)
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from error
    return pixels_of(content, shape, mode, crop)


def pixels_of(content: bytes, shape: tuple[int, int], mode: str, crop: str) -> np.ndarray:
    """Decode a picture: uint8 (H, W, 3), or (H, W, 1) for mode "L".

    shape: (H, W). crop: one of CROPS; a cropped picture is resized to cover 8/7 of the shape, and its centre is cut out.
    Without cropping, it must have that size. Raises ValueError, with a short message, if it cannot be read.
    """
    with _opened(content) as picture:
        whole = _eight_bits(picture)
        pixels = np.asarray(_cut(whole if whole.mode == mode else whole.convert(mode), shape, crop))
    return pixels.reshape(*shape, -1)


def count_pixels(content: bytes) -> int:
    """Return how many pixels a picture has, according to its header. Raises ValueError as `pixels_of` does."""
    with _opened(content) as picture:
        return picture.size[0] * picture.size[1]


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """Yield a picture within the size limits. Raises ValueError, with a short message, for any failure, also in the block."""
    try:
        kind, needed = image_headers.first(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(needed), formats=(kind,)) as picture:
                if picture.size[0] * picture.size[1] > image_headers.PIXELS:
                    raise ValueError(
                        f"it has {picture.size[0]}x{picture.size[1]} pixels; the limit is {image_headers.PIXELS:,}"
                    )
                yield picture
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # its message names one of our objects
        raise ValueError(f"it starts like {kind} but is damaged; save it again") from error
    except Exception as error:  # damaged pictures make decoders fail in many ways
        raise ValueError(str(error).split("\n")[0][:300] or type(error).__name__) from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Return the picture with 8 bits a channel; Pillow itself would clip larger values.

    Only the first frame of an animation is used. Palette pictures keep their transparency. Raises ValueError for 32 bits a
    channel.
    """
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):  # 16 bits stored in 32
        return _bytes(picture)
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits per channel; save it with 8 or 16")
    return picture.convert("RGBA") if picture.mode == "P" and "transparency" in picture.info else picture


def _bytes(picture: Image.Image) -> Image.Image:
    """Convert a 16-bit picture to 8 bits, in bands of rows."""
    (width, height), rows = picture.size, max(1, _BAND // picture.size[0])
    made = np.empty((height, width), np.uint8)
    for top in range(0, height, rows):
        made[top : top + rows] = np.asarray(picture.crop((0, top, width, min(top + rows, height)))) // 257
    return Image.fromarray(made)


def _cut(picture: Image.Image, shape: tuple[int, int], crop: str) -> Image.Image:
    height, width = shape
    if crop == "none" and picture.size != (width, height):
        raise ValueError(f"it has {picture.size[0]}x{picture.size[1]} pixels, not {width}x{height}")
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
    """An .npy file of images, written row by row. It is not memory-mapped, because a full disk would then kill the process."""

    def __init__(self, path: Path | str):
        whole = np.load(path, mmap_mode="r")
        self.shape, self._start, self._bytes = whole.shape[1:3], whole.offset, whole[0].nbytes
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, row: int, pixels: np.ndarray) -> None:
        """Write one row. Raises OSError if the disk is full."""
        self._file.seek(self._start + row * self._bytes)
        left = memoryview(pixels.tobytes())
        while left:  # a disk that is almost full accepts only a part
            left = left[self._file.write(left) :]


def main() -> None:
    """Decode the pictures that are requested on stdin."""
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
    except BrokenPipeError:  # the parent process is gone
        os._exit(1)
