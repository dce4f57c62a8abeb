"""Labelled images in an .npz, as common libraries write them: which array is which, and how it becomes pixels and labels.

Content with only one possible reading is converted, and the conversion is reported. Ambiguous content is refused, with the flag
of `own data` that settles it. Pickles are never read.
"""

import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile, ZipFile, ZipInfo

import numpy as np

from intrafusion.data.folder_layout import SPLITS
from intrafusion.errors import IntrafusionError, check_choice, one_line
from intrafusion.runtime.file_text import CLASSES, NAME, check_classes
from intrafusion.runtime.safe_zip import check_count

LAYOUTS = ("nhwc", "nchw")  # channels last, channels first
CHANNELS = 16  # most channels of an image
MEMBERS = 64  # most arrays of a file
_DIMENSIONS, _HEADER = 8, 10_000  # most dimensions of an array, and most bytes of its header
_SIGN = 4  # bytes of a character in a text array
_DARK = 32  # of 255: images without a brighter pixel probably have another range
_SLACK = 1e-6  # tolerance for rounding, as a share of a range
_FLAT = 8  # least pixels a side of flattened pictures
_CHUNK = 1 << 24  # numbers that are converted at once
_ROLES = {
    "images": ("images", "image", "imgs", "x", "data"),
    "labels": ("labels", "label", "y", "targets", "target"),
    "classes": ("classes", "class_names", "label_names", "target_names"),
}
_ROLE = {word: role for role, words in _ROLES.items() for word in words}
_WORDS = "|".join(sorted((word for words in SPLITS.values() for word in words), key=len, reverse=True))
_KEY = re.compile(rf"(?:({_WORDS})_?)?({'|'.join(_ROLE)})(?:_?({_WORDS}))?", re.IGNORECASE)
_DAMAGED = (  # what numpy and zipfile raise for a file that is no .npz
    OSError, ValueError, BadZipFile, EOFError, zlib.error, TypeError, KeyError, OverflowError, MemoryError, RuntimeError,
    SyntaxError, TokenError,
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """Settings that resolve an ambiguous file. layout: one of `LAYOUTS`. span: the values of black and of full brightness."""

    layout: str | None = None
    span: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.layout is not None:
            check_choice("layout", self.layout, LAYOUTS)
        if self.span is not None and not (np.isfinite(self.span).all() and self.span[0] < self.span[1]):
            raise IntrafusionError(f"range must go from a number to a larger one, not from {self.span[0]} to {self.span[1]}")


@dataclass(frozen=True)
class Arrays:
    """Images and labels read from an .npz.

    images: uint8 (N, H, W, C). labels: int64 (N,), which may be negative. classes: names, () if the file has none. columns:
    number of columns of one-hot labels, 0 for other labels. notes: what was converted.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    columns: int = 0
    notes: tuple[str, ...] = ()


def role_of(key: str) -> tuple[str, str] | None:
    """Return an array's role ("images", "labels" or "classes") and the word for its split, by its name; None if unknown.

    The word is "" for any split. Known are the names of this project (images, labels, classes), Keras (x_train, y_test),
    MedMNIST (train_images, val_labels), scikit-learn (data, target, target_names) and PyTorch (data, targets), in any case.
    """
    found = _KEY.fullmatch(key)
    if found is None or (found[1] and found[3]):
        return None
    return _ROLE[found[2].lower()], (found[1] or found[3] or "").lower()


def splits_of(keys: Iterable[str]) -> dict[str, str]:
    """Return the word that array names use for each split, "train" and "test": the first of `SPLITS` that has images.

    {} if no name of images contains a split.
    """
    words = {role[1] for key in keys if (role := role_of(key)) and role[0] == "images"}
    return {split: known[0] for split, names in SPLITS.items() if (known := [word for word in names if word in words])}


def keys_of(path: Path) -> list[str]:
    """Return the names of the arrays of an .npz. Raises IntrafusionError for any other file."""
    with _opened(path) as file:
        return list(file.files)


def read_arrays(path: Path, split: str, channels: Iterable[int] | None = None, reading: Reading | None = None) -> Arrays:
    """Read the images and labels of a split. channels: allowed numbers of channels; None for 1 to `CHANNELS`.

    Raises IntrafusionError for a damaged file, for one without images and labels of this split, and for invalid arrays.
    """
    images, labels, names = _load(path, split)
    many = tuple(channels or range(1, CHANNELS + 1))
    whole, said_labels, columns = _labels(path, labels, len(images) if images.ndim else 0)
    pixels, said_images = _images(path, images, many, reading or Reading())
    said = [part for part in (said_images, said_labels) if part]
    return Arrays(pixels, whole, names, columns, (f"{path}: {'; '.join(said)}",) if said else ())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as opened:
            if opened.read(6) == b"\x93NUMPY":
                raise ValueError("it is a .npy file, a single array")
            check_count(path, MEMBERS)
            opened.seek(0)
            yield np.load(opened, allow_pickle=False)
    except _DAMAGED as error:
        if isinstance(error, IntrafusionError):
            raise
        raise IntrafusionError(f"{path} is not a readable .npz file: {one_line(error)}") from error


def header(archive: ZipFile, info: ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and dtype of an array in an .npz, without reading its numbers.

    Raises ValueError if they do not match its size, or if it has more than `_DIMENSIONS` dimensions.
    """
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        size = member.read(2 if version == (1, 0) else 4)
        member.seek(-len(size), 1)
        if int.from_bytes(size, "little") > _HEADER:
            raise ValueError(f"{info.filename} has a header of more than {_HEADER:,} bytes")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, _, kind = read(member)
        except (SyntaxError, TokenError, MemoryError) as error:  # numpy parses the header as Python literals
            raise ValueError(f"{info.filename} has no valid array header") from error
        if len(shape) > _DIMENSIONS:
            raise ValueError(f"{info.filename} has {len(shape)} dimensions; the limit is {_DIMENSIONS}")
        if any(size < 0 for size in shape):
            raise ValueError(f"{info.filename} has the invalid shape {shape}")
        if not kind.hasobject and member.tell() + prod(shape) * kind.itemsize != info.file_size:
            raise ValueError(f"the size of {info.filename} does not match its shape {shape}")
    return shape, kind


def _load(path: Path, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    with _opened(path) as file:
        for role, key in (chosen := _chosen(path, split, file.files)).items():
            _, kind = header(file.zip, file.zip.getinfo(f"{key}.npy"))
            if role == "classes" and kind.kind == "U" and kind.itemsize > _SIGN * NAME:
                raise IntrafusionError(
                    f"{path} has class names of up to {kind.itemsize // _SIGN:,} characters; the limit is {NAME}; shorten them"
                )
        arrays = {role: file[key] for role, key in chosen.items()}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("images and labels are not arrays")
        return arrays["images"], arrays["labels"], _names(path, arrays.get("classes"))


def _names(path: Path, classes: np.ndarray | None) -> tuple[str, ...]:
    """Return class names, checked: NumPy accepts any number as a character, and Python fails on some of them later."""
    if classes is None:
        return ()
    if classes.dtype.kind == "U":
        signs = np.ascontiguousarray(classes).view(f"{classes.dtype.byteorder}u4")
        if (signs > sys.maxunicode).any():
            raise IntrafusionError(f"{path} has a class name that is not valid Unicode; save the names with np.array(names)")
    return check_classes((str(name) for name in classes), path)


def _chosen(path: Path, split: str, keys: Iterable[str]) -> dict[str, str]:
    """Return the key of each role for a split."""
    there = splits_of(keys)
    if there and split not in there:
        raise IntrafusionError(f"{path} has {next(iter(there))} images but no {split} images, by the names of its arrays")
    found: dict[str, list[str]] = {"images": [], "labels": [], "classes": []}
    for key in keys:
        role = role_of(key)
        if role is not None and role[1] == ("" if role[0] == "classes" else there.get(split, "")):
            found[role[0]].append(key)
    if {key.lower() for key in found["images"]} == {"data", "images"}:  # scikit-learn's: the same, flat and as pictures
        found["images"] = [key for key in found["images"] if key.lower() == "images"]
    missing = [role for role in ("images", "labels") if not found[role]]
    if missing:
        raise IntrafusionError(f"{path} has no {' and no '.join(missing)}; it needs arrays images and labels (or x and y)")
    several = next((role for role, known in found.items() if len(known) > 1), None)
    if several:
        raise IntrafusionError(
            f"{path} has both {' and '.join(found[several])}, either of which may be its {several}; remove one"
        )
    return {role: known[0] for role, known in found.items() if known}


def _labels(path: Path, labels: np.ndarray, count: int) -> tuple[np.ndarray, str, int]:
    """Return labels as int64 (N,), what was converted, and the number of columns of one-hot labels, else 0."""
    told = f"{path}: labels must be integers ({count},)"
    given = f"{labels.dtype} {labels.shape}"
    if labels.dtype.kind not in "uifb" or labels.ndim not in (1, 2) or len(labels) != count:
        raise IntrafusionError(f"{told}, not {given}")
    if labels.ndim == 2 and labels.shape[1] != 1:
        return _one_hot(told, given, labels)
    flat, said = labels.reshape(-1), []
    if flat.dtype.kind == "b":
        raise IntrafusionError(f"{told}, not {given}")
    if labels.ndim == 2:
        said.append(f"reading labels {labels.shape} as ({count},)")
    if flat.dtype.kind == "f":
        if not (np.isfinite(flat).all() and (flat == np.rint(flat)).all()):
            raise IntrafusionError(f"{told}, not {given} with fractions such as {_odd(flat)}")
        said.append(f"reading labels of {flat.dtype} as integers")
    low, high = (float(flat.min()), float(flat.max())) if count else (0.0, 0.0)
    if low < -CLASSES or high >= CLASSES:
        raise IntrafusionError(
            f"{path}: labels range from {low:g} to {high:g}; the limit is {CLASSES:,} classes; number them from 0"
        )
    return flat.astype(np.int64), ", ".join(said), 0


def _odd(flat: np.ndarray) -> float:
    return float(next(value for value in flat.tolist() if not np.isfinite(value) or value != round(value)))


def _one_hot(told: str, given: str, labels: np.ndarray) -> tuple[np.ndarray, str, int]:
    columns = labels.shape[1]
    if not columns or columns > CLASSES or not (((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()):
        raise IntrafusionError(f"{told} or one-hot with a single 1 in each row, not {given}")
    return labels.argmax(1).astype(np.int64), f"reading one-hot labels {labels.shape} as ({len(labels)},)", columns


def _images(path: Path, images: np.ndarray, channels: tuple[int, ...], reading: Reading) -> tuple[np.ndarray, str]:
    """Return images as uint8 (N, H, W, C), and what was converted."""
    many = "1 to 16" if channels == tuple(range(1, CHANNELS + 1)) else " or ".join(map(str, channels))
    told = f"{path}: images must be uint8 (N, H, W, {many})"
    given = f"{images.dtype} {images.shape}"
    if images.dtype.kind not in "uifb" or images.ndim not in (2, 3, 4):
        raise IntrafusionError(f"{told}, not {given}")
    if not len(images):
        raise IntrafusionError(f"{path} has no images")
    shaped, said_shape = _shaped(path, told, images, channels, reading.layout)
    pixels, said_values = _pixels(path, told, shaped, reading.span)
    return pixels, ", ".join(said for said in (said_shape, said_values) if said)


def _settle(path: Path, flag: str, other: str = "") -> str:
    return f"import them with `python -m intrafusion own data {path} --name NAME {flag}`{other}, and use kept/NAME"


def _shaped(path: Path, told: str, images: np.ndarray, channels: tuple[int, ...], layout: str | None) -> tuple[np.ndarray, str]:
    """Return (N, H, W, C) images from any of: channels last or first, grey images without channels, flattened rows."""
    shape = images.shape
    if images.ndim == 2:
        images, layout = _unflattened(path, told, images, channels, layout)
    if images.ndim == 3:
        images, layout = images[..., None], "nhwc"
    if layout is None:
        layout = _layout(path, told, images.shape[1:], channels, images.dtype)
    if layout == "nchw":
        images = images.transpose(0, 2, 3, 1)
    if images.shape[-1] not in channels or not images.size:
        raise IntrafusionError(f"{told}, not {images.dtype} {shape}{' as ' + layout if layout != 'nhwc' else ''}")
    how = " with channels first" if layout == "nchw" else ""
    return images, f"reading images {shape}{how} as {images.shape}" if how or images.shape != shape else ""


def _unflattened(
    path: Path, told: str, images: np.ndarray, channels: tuple[int, ...], layout: str | None
) -> tuple[np.ndarray, str | None]:
    """Reshape rows of numbers to square pictures: grey, or with three colours whose order must be given."""
    count, numbers = images.shape
    side, coloured = isqrt(numbers), isqrt(numbers // 3)
    if side**2 == numbers and side >= _FLAT and 1 in channels:
        return images.reshape(count, side, side), layout
    if 3 * coloured**2 != numbers or coloured < _FLAT or 3 not in channels:
        raise IntrafusionError(f"{told}, not {images.dtype} {images.shape}, whose rows are not square images; reshape them")
    if layout is None:
        raise IntrafusionError(
            f"{told}; rows of {numbers} may be {coloured}x{coloured} pixels with channels first or last; "
            f"{_settle(path, '--layout nchw', ' (or nhwc)')}"
        )
    shape = (3, coloured, coloured) if layout == "nchw" else (coloured, coloured, 3)
    return images.reshape(count, *shape), layout


def _layout(path: Path, told: str, shape: tuple[int, ...], channels: tuple[int, ...], kind: np.dtype) -> str:
    """Return whether channels are last or first, if the shape of an image is unambiguous."""
    first, middle, last = shape
    fits = [name for name, size in (("nhwc", last), ("nchw", first)) if size in channels]
    square = [name for name, same in (("nhwc", first == middle), ("nchw", middle == last)) if same and name in fits]
    usual = [name for name, size in (("nhwc", last), ("nchw", first)) if size in (1, 3) and name in fits]
    if not fits:
        raise IntrafusionError(f"{told}, not {kind} (N, {first}, {middle}, {last})")
    if fits == ["nhwc"]:
        return "nhwc"
    for likely in (square, usual):  # pictures are usually square, and have 1 or 3 channels
        if len(likely) == 1:
            return likely[0]
    raise IntrafusionError(
        f"{told}; (N, {first}, {middle}, {last}) may have its channels first or last; "
        f"{_settle(path, '--layout nchw', ' (or nhwc)')}"
    )


def _pixels(path: Path, told: str, images: np.ndarray, span: tuple[float, float] | None) -> tuple[np.ndarray, str]:
    """Return uint8 images from values in 0 to 255, in 0 to 1, or in a given span, and what was converted."""
    kind = images.dtype
    if kind == np.uint8 and span is None:
        most = int(images.max())
        return images, _dark(path, most) if 0 < most < _DARK else ""
    if kind.kind == "b":
        return images * np.uint8(255), "reading true and false as 255 and 0"
    low, high = float(images.min()), float(images.max())
    if not np.isfinite([low, high]).all():
        raise IntrafusionError(f"{told}, not {kind} with NaN or infinite values")
    if span is None:
        span = _span(path, told, kind, low, high)
    slack = _SLACK * (span[1] - span[0])
    if low < span[0] - slack or high > span[1] + slack:
        raise IntrafusionError(f"{told} or from {span[0]:g} to {span[1]:g}, not {kind} from {low:g} to {high:g}")
    if span == (0, 255) and kind == np.uint8:
        return images, ""
    return _scaled_to_bytes(images, span), f"reading {kind} images from {span[0]:g} to {span[1]:g} as 0 to 255"


def _dark(path: Path, most: int) -> str:
    keep = f"python -m intrafusion own data {path} --name NAME --range 0 {most}"
    return f"the brightest pixel is {most} of 255; if that is white, import them with `{keep}`, and use kept/NAME"


def _span(path: Path, told: str, kind: np.dtype, low: float, high: float) -> tuple[float, float]:
    """Return the values of black and of full brightness, if the numbers are unambiguous."""
    if low >= -_SLACK and kind.kind == "f" and high <= 1 + _SLACK:
        return 0, 1
    full = 65535 if kind == np.uint16 else 255
    if low >= 0 and full / 2 < high <= full:
        return 0, full
    raise IntrafusionError(
        f"{told}; the range of {kind} values from {low:g} to {high:g} is ambiguous; undo any normalisation by mean and "
        f"standard deviation, or {_settle(path, '--range BLACK WHITE')}"
    )


def _scaled_to_bytes(images: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    low, high = span
    pixels = np.empty(images.shape, np.uint8)
    step = max(1, _CHUNK // max(1, prod(images.shape[1:])))
    for start in range(0, len(images), step):
        part = images[start : start + step].astype(np.float64)
        pixels[start : start + step] = np.rint((part.clip(low, high) - low) * (255 / (high - low)))
    return pixels
