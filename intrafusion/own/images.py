"""A person's images: .npz files, or a zip of one folder of pictures a class."""

import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from tokenize import TokenError

import numpy as np

from intrafusion.archives import MIB, check_size, opened
from intrafusion.data import KEPT, OWN, load_data
from intrafusion.decode_worker import decode
from intrafusion.errors import IntrafusionError
from intrafusion.own.place import IMAGES, free_path, workshop
from intrafusion.pace import checkpoint
from intrafusion.places import home
from intrafusion.saved import check_name

PICTURES, CLASSES = 100_000, 10_000
SIDE = 1024  # pixels, of images in an .npz
_PICTURE = 32 * MIB
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SPLITS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}
_ARRAYS = {"images.npy": "images", "labels.npy": "labels", "classes.npy": "classes"}

Progress = Callable[[int, int], None]  # pictures done, pictures in all


def take_data(files: Sequence[Path], name: str, progress: Progress | None = None) -> str:
    """Keep images under a name that `load_data` opens, as "kept/NAME".

    files: one .npz, two of them (x_train.npz and x_test.npz), or one .zip of class folders, perhaps below train/ and test/.
    Raises IntrafusionError, and keeps nothing, for what is damaged, too large, unsafe or no labelled images.
    """
    with workshop(*files) as folder:
        target = free_path(IMAGES, name)
        if not files:
            raise IntrafusionError("no file was given: an .npz, two of them, or a .zip of class folders")
        made = folder / "images"
        made.mkdir()
        for file in files:
            check_size(file)
        kinds = [file.suffix.lower() for file in files]
        if kinds == [".zip"]:
            _take_pictures(files[0], made, progress)
        elif set(kinds) == {".npz"}:
            _take_arrays(files, made)
        else:
            raise IntrafusionError(
                f"{', '.join(f.name for f in files)}: give one .npz, two (x_train, x_test), or one .zip of class folders"
            )
        _check_splits(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        made.rename(target)
        return f"{KEPT}{name}"


def _take_arrays(files: Sequence[Path], made: Path) -> None:
    splits = ["train" if "train" in file.stem.lower() else "test" for file in files]
    if len(files) > 1 and sorted(splits) != ["test", "train"]:
        raise IntrafusionError(
            "of two .npz files one is named with train and the other with test, as x_train.npz and x_test.npz"
        )
    for file, split in zip(files, splits, strict=True):
        _check_arrays(file)
        shutil.copyfile(file, made / f"{OWN}_{split if len(files) > 1 else 'test'}.npz")
        try:
            load_data(OWN, split if len(files) > 1 else "test", made)
        except IntrafusionError as error:
            raise IntrafusionError(re.sub(rf"{re.escape(str(made))}/\S+\.npz", file.name, str(error))) from error


def _check_arrays(file: Path) -> None:
    """Look at the headers of the arrays, before any of them is read."""
    with opened(file) as (archive, infos):
        for info in infos:
            if info.filename not in _ARRAYS:
                raise IntrafusionError(
                    f"{file} holds {info.filename[:80]!r}: images, labels and perhaps classes are taken"
                )
            shape, kind = _header(archive, info)
            if kind.hasobject:
                raise IntrafusionError(
                    f"{file} holds {_ARRAYS[info.filename]} as Python objects, a pickle: save plain numbers"
                )
            if info.filename == "images.npy" and (len(shape) != 4 or max(shape[1:]) > SIDE or kind != np.uint8):
                raise IntrafusionError(
                    f"{file}: images must be uint8 (N, H, W, C) of at most {SIDE} pixels a side, not {kind} {shape}"
                )
            if info.filename == "classes.npy" and (
                kind.kind != "U" or len(shape) != 1 or len(set(shape) | {CLASSES + 1}) < 2 or shape[0] > CLASSES
            ):
                raise IntrafusionError(f"{file}: classes must be at most {CLASSES:,} names, not {kind} {shape}")


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in an .npz. Raises ValueError where they do not agree with its size."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, _, kind = read(member)
        except (SyntaxError, TokenError, MemoryError) as error:  # numpy reads the header as Python's literals
            raise ValueError(f"{info.filename} has no header of an array") from error
        if any(size < 0 for size in shape):
            raise ValueError(f"{info.filename} says it has {shape} numbers")
        count = 1
        for size in shape:
            count *= size
        if not kind.hasobject and member.tell() + count * kind.itemsize != info.file_size:
            raise ValueError(f"{info.filename} says it holds {shape} numbers, and its size is another")
    return shape, kind


def _take_pictures(file: Path, made: Path, progress: Progress | None) -> None:
    """Write each picture under a name of our own, and read it once."""
    with opened(file) as (archive, infos):
        found = _sorted(file, infos)
        for _, of_class, _ in found:
            for split in {split for split, _, _ in found}:
                (made / split / of_class).mkdir(parents=True, exist_ok=True)
        for number, (split, of_class, info) in enumerate(found, 1):
            checkpoint()
            picture = made / split / of_class / f"{number:06}{PurePosixPath(info.filename).suffix.lower()}"
            picture.write_bytes(archive.read(info))
            try:
                decode(picture, (8, 8), "L", "always")
            except ValueError as error:
                said = str(error).replace(str(picture), info.filename[:80])
                raise IntrafusionError(
                    f"{file} holds {info.filename[:80]!r}, which is not a readable picture: {said}"
                ) from error
            if progress:
                progress(number, len(found))


def _sorted(file: Path, infos: Sequence[zipfile.ZipInfo]) -> list[tuple[str, str, zipfile.ZipInfo]]:
    """Split and class of each picture, by the folders it lies in."""
    placed = []
    for info in infos:
        parts = PurePosixPath(info.filename).parts
        if (
            any(part.startswith(".") for part in parts)
            or parts[0] == "__MACOSX"
            or parts[-1] in ("Thumbs.db", "desktop.ini")
        ):
            continue
        placed.append((parts, info))
    if not placed:
        raise IntrafusionError(f"{file} holds no pictures: it needs one folder of them a class")
    while len({parts[0] for parts, _ in placed}) == 1 and all(len(parts) > 2 for parts, _ in placed):
        if placed[0][0][0].lower() in _SPLITS:
            break
        placed = [(parts[1:], info) for parts, info in placed]
    if len(placed) > PICTURES:
        raise IntrafusionError(f"{file} holds {len(placed):,} pictures, and at most {PICTURES:,} are taken")
    has_splits = all(parts[0].lower() in _SPLITS for parts, _ in placed)
    found = []
    for parts, info in placed:
        split = _SPLITS[parts[0].lower()] if has_splits else "test"
        rest = parts[1:] if has_splits else parts
        name = info.filename[:80]
        if len(rest) != 2:
            raise IntrafusionError(
                f"{file} holds {name!r}, which lies in no class folder: CLASS/picture, or train/CLASS/picture"
            )
        if len(rest[0].encode()) > 200 or not rest[0].isprintable():  # a file system takes 255 bytes
            raise IntrafusionError(f"{file} has a class folder of an odd name: {rest[0][:80]!r}")
        if PurePosixPath(info.filename).suffix.lower() not in _SUFFIXES:
            raise IntrafusionError(f"{file} holds {name!r}, which is no picture: {', '.join(_SUFFIXES)} are taken")
        if info.file_size > _PICTURE:
            raise IntrafusionError(
                f"{file} holds {name!r} of {info.file_size / MIB:,.0f} MiB, and at most {_PICTURE // MIB} MiB are taken"
            )
        found.append((split, rest[0], info))
    if len({of_class for _, of_class, _ in found}) > CLASSES:
        raise IntrafusionError(f"{file} has more than {CLASSES:,} class folders")
    return found


def _check_splits(made: Path) -> None:
    """Refuse data without test images, or with splits of different shapes or classes."""
    if (made / "train").is_dir() and not (made / "test").is_dir():
        raise IntrafusionError("there are training images and no test images: add a folder test (or val)")
    files = sorted(made.glob("*.npz"))
    if len(files) == 2:
        test, train = (load_data(OWN, split, made) for split in ("test", "train"))
        if test.images.shape[1:] != train.images.shape[1:]:
            raise IntrafusionError(
                f"training images are {tuple(train.images.shape[1:])} and test images {tuple(test.images.shape[1:])}"
            )


def splits(name: str) -> dict[str, int]:
    """How many images each split of kept data ("kept/NAME") holds."""
    folder = home() / IMAGES / check_name(name.removeprefix(KEPT))
    arrays = {split: folder / f"{OWN}_{split}.npz" for split in ("train", "test")}
    found = {split: len(load_data(OWN, split, file)) for split, file in arrays.items() if file.is_file()}
    return found or {
        split: sum(1 for file in (folder / split).rglob("*") if file.is_file())
        for split in ("train", "test")
        if (folder / split).is_dir()
    }
