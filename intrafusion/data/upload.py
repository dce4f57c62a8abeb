"""A person's images: .npz files, or a zip of one folder of pictures a class, read as `load_data` reads what lies on a disk."""

import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from intrafusion.data._decode_worker import count, decode
from intrafusion.data.arrays import MEMBERS, Arrays, Reading, header, read_arrays, role_of, splits_of
from intrafusion.data.datasets import KEPT, OWN, read_kept
from intrafusion.data.folder_layout import SUFFIXES, in_archive, is_junk, is_picture, layout_of
from intrafusion.data.image_folder import Listing, listed
from intrafusion.errors import IntrafusionError
from intrafusion.runtime.atomic_write import plain_errors, put
from intrafusion.runtime.cancellation import checkpoint
from intrafusion.runtime.paths import check_name, home
from intrafusion.runtime.safe_zip import MIB, UNPACKED, opened
from intrafusion.runtime.sandbox import Step, drained
from intrafusion.runtime.staging import IMAGES, Workshop, checked, free_path, given

PICTURES, CLASSES = 100_000, 10_000
PIXELS = 8_000_000_000  # of all pictures of an archive
SPLITS = ("train", "test")
_ARRAYS = tuple(f"{OWN}_{split}.npz" for split in SPLITS)
SIDE = 1024  # pixels, of images in an .npz
_PICTURE = 32 * MIB
_BESIDE = (  # files beside pictures that are passed over; others, as programs and archives, are refused
    "", ".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".log", ".ini", ".db", ".url", ".md5",
)  # fmt: skip
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # pictures done, pictures in all


def take_data(
    files: Sequence[Path],
    name: str,
    progress: Progress | None = None,
    reading: Reading | None = None,
    tell: Callable[[str], None] = _log.warning,
) -> str:
    """Keep images under a name that `load_data` opens, as "kept/NAME".

    files: one .npz, two of them (x_train.npz and x_test.npz), or one .zip of class folders, perhaps below train/ and test/.
    reading: settles arrays that may be read in several ways. tell: gets a line for what was passed over or converted.
    A child process reads and decodes them (see `sandbox`). Raises IntrafusionError, and keeps nothing, for what is damaged,
    too large, unsafe or no labelled images.
    """
    free_path(IMAGES, name)
    with given(*files) as workshop:
        return drained(data_steps(workshop, name, reading, tell), progress)


def data_steps(
    workshop: Workshop, name: str, reading: Reading | None = None, tell: Callable[[str], None] = _log.warning
) -> Generator[Step, None, str]:
    """`take_data` in steps, of the files that were given."""
    target, reading = free_path(IMAGES, name), reading or Reading()
    if not workshop.given:
        raise IntrafusionError("no file was given: an .npz, two of them, or a .zip of class folders")
    asked = {"layout": reading.layout, "span": reading.span}
    notes = yield from checked("images", workshop, workshop.given, asked, tell)
    _check_made(workshop.made)
    if not any((workshop.made / test).exists() for test in ("test", f"{OWN}_test.npz")):
        raise IntrafusionError("there are training images and no test images: add a test split")
    target.parent.mkdir(parents=True, exist_ok=True)
    with plain_errors(target):
        put(workshop.made, target)
    for note in dict.fromkeys(map(str, notes if isinstance(notes, list) else [])):
        tell(note)
    return f"{KEPT}{name}"


def read(made: Path, files: Sequence[Path], progress: Progress, reading: Reading) -> list[str]:
    """Read and decode files, in a child process; leave in `made` what is kept. What was passed over or converted."""
    made.mkdir()
    kinds = [file.suffix.lower() for file in files]
    if kinds == [".zip"]:
        notes = _take_pictures(files[0], made, progress)
    elif set(kinds) == {".npz"}:
        notes = _take_arrays(files, made, reading)
    else:
        raise IntrafusionError(
            f"{', '.join(f.name for f in files)}: give one .npz, two (x_train, x_test), or one .zip of class folders"
        )
    _check_splits(made)
    return notes


def _check_made(made: Path) -> None:
    """Refuse what no child that did its work would leave: other files than images, too many or too large ones."""
    pictures = total = 0
    for place, folders, names in os.walk(made):
        parts = Path(place).relative_to(made).parts
        for name in (*folders, *names):
            path = Path(place) / name
            size = path.stat().st_size
            total += size
            if path.is_dir():
                fits = name in SPLITS if not parts else len(parts) == 1 and _is_folder_name(name)
            elif not parts:
                fits = name in _ARRAYS and bool(_check_arrays(path))
            else:
                pictures += 1
                fits = len(parts) == 2 and is_picture(name) and size <= _PICTURE
            if not fits or pictures > PICTURES or total > 2 * UNPACKED:
                raise IntrafusionError(f"checking these images left {name[:80]!r}, which is none of them: they are refused")


def _take_arrays(files: Sequence[Path], made: Path, reading: Reading) -> list[str]:
    notes: list[str] = []
    splits = _splits_of(files)
    for split, file in splits:
        kept = made / f"{OWN}_{split}.npz"
        found = read_arrays(file, split, reading=reading)
        if found.notes or len(splits) > len(files):
            _save(kept, found)
        else:
            shutil.copyfile(file, kept)
        try:
            read_kept(split, kept)
        except IntrafusionError as error:
            raise IntrafusionError(str(error).replace(str(kept), file.name)) from error
        notes += found.notes
    return notes


def _splits_of(files: Sequence[Path]) -> list[tuple[str, Path]]:
    """The file of each split: by the names of the arrays in one, of two by their own."""
    keys = {file: _check_arrays(file) for file in files}
    if len(files) == 1:
        return [(split, files[0]) for split in splits_of(keys[files[0]]) or ("test",)]
    named = [("train" if "train" in file.stem.lower() else "test", file) for file in files]
    if sorted(split for split, _ in named) != ["test", "train"]:
        raise IntrafusionError(
            "of two .npz files one is named with train and the other with test, as x_train.npz and x_test.npz"
        )
    return named


def _save(path: Path, found: Arrays) -> None:
    classes = found.classes or (tuple(map(str, range(found.columns))) if found.columns else ())
    arrays = {"images": found.images, "labels": found.labels} | ({"classes": np.array(classes)} if classes else {})
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def _check_arrays(file: Path) -> list[str]:
    """Look at the headers of the arrays, before any of them is read; their names."""
    keys = []
    with opened(file, MEMBERS) as (archive, infos):
        for info in infos:
            key = info.filename.removesuffix(".npy")
            role = role_of(key) if key != info.filename else None
            if role is None:
                raise IntrafusionError(f"{file} holds {info.filename[:80]!r}: images, labels and perhaps classes are taken")
            keys.append(key)
            shape, kind = header(archive, info)
            if kind.hasobject:
                raise IntrafusionError(f"{file} holds {role[0]} as Python objects, a pickle: save plain numbers")
            most = (SIDE, SIDE, SIDE) if len(shape) > 2 else (SIDE * SIDE,)
            fits = len(shape) in (2, 3, 4) and all(size <= side for size, side in zip(shape[1:], most, strict=False))
            if role[0] == "images" and (not fits or kind.kind not in "uifb"):
                raise IntrafusionError(
                    f"{file}: images must be uint8 (N, H, W, C) of at most {SIDE} pixels a side, not {kind} {shape}"
                )
            if role[0] == "classes" and (
                kind.kind != "U" or len(shape) != 1 or len(set(shape) | {CLASSES + 1}) < 2 or shape[0] > CLASSES
            ):
                raise IntrafusionError(f"{file}: classes must be at most {CLASSES:,} names, not {kind} {shape}")
    return keys


def _take_pictures(file: Path, made: Path, progress: Progress) -> list[str]:
    """Write each picture under a name of our own, and read it once; what was passed over."""
    with opened(file) as (archive, infos):
        found = _listed(file, archive, infos)
        total, number, pixels = sum(len(listing.files) for listing in found.values()), 0, 0
        for split, listing in found.items():
            for info, label in zip(listing.files, listing.labels.tolist(), strict=True):
                checkpoint()
                number += 1
                picture = made / split / listing.classes[label] / f"{number:06}{_suffix(info)}"
                picture.parent.mkdir(parents=True, exist_ok=True)
                picture.write_bytes(archive.read(info))
                pixels = _check_picture(file, info, picture, pixels)
                progress(number, total)
    return [note for listing in found.values() for note in listing.notes]


def _check_picture(file: Path, info: zipfile.ZipInfo, picture: Path, before: int) -> int:
    """Decode a picture once; the pixels of all so far. before: those of all before it."""
    try:
        if (pixels := before + count(picture)) <= PIXELS:
            decode(picture, (8, 8), "L", "always")
            return pixels
    except ValueError as error:
        said = str(error).replace(str(picture), info.filename[:80])
        raise IntrafusionError(f"{file} holds {info.filename[:80]!r}, which is not a readable picture: {said}") from error
    raise IntrafusionError(f"{file} holds pictures of more than {PIXELS:,} pixels together: make them smaller, or take fewer")


def _listed(file: Path, archive: zipfile.ZipFile, infos: Sequence[zipfile.ZipInfo]) -> dict[str, Listing[zipfile.ZipInfo]]:
    """The pictures of each split."""
    for info in infos:
        _check_member(file, info)
    pictures = sum(is_picture(PurePosixPath(info.filename).name) for info in infos)
    if pictures > PICTURES:
        raise IntrafusionError(f"{file} holds {pictures:,} pictures, and at most {PICTURES:,} are taken")
    tree = in_archive((info.filename, info) for info in infos)
    if not tree.holds:
        raise IntrafusionError(f"{file} holds no pictures: it needs one folder of them a class")
    layout = layout_of(tree)
    layout.at("test", file)
    found = {split: listed(OWN, file, layout, split, archive.read) for split in layout.splits or ("test",)}
    for of_class in next(iter(found.values())).classes:
        if not _is_folder_name(of_class):
            raise IntrafusionError(f"{file} has a class folder of an odd name: {of_class[:80]!r}")
    if any(len(listing.classes) > CLASSES for listing in found.values()):
        raise IntrafusionError(f"{file} has more than {CLASSES:,} class folders")
    return found


def _is_folder_name(of_class: str) -> bool:
    """Whether pictures of a class can be kept in a folder of its name; a file system takes 255 bytes."""
    fits = len(of_class.encode(errors="replace")) <= 200 and of_class.isprintable() and not re.search(r"[/\\]", of_class)
    return fits and bool(of_class) and not is_junk(of_class)


def _check_member(file: Path, info: zipfile.ZipInfo) -> None:
    """Refuse what is neither a picture nor text beside pictures, and pictures that are too large."""
    *folders, last = PurePosixPath(info.filename).parts
    name = info.filename[:80]
    if last.startswith(".") or any(map(is_junk, folders)):
        return
    if not is_picture(last) and _suffix(info) not in _BESIDE:
        raise IntrafusionError(f"{file} holds {name!r}, which is no picture: {', '.join(SUFFIXES)} are taken")
    if info.file_size > _PICTURE:
        raise IntrafusionError(
            f"{file} holds {name!r} of {info.file_size / MIB:,.0f} MiB, and at most {_PICTURE // MIB} MiB are taken"
        )


def _suffix(info: zipfile.ZipInfo) -> str:
    return PurePosixPath(info.filename).suffix.lower()


def _check_splits(made: Path) -> None:
    """Refuse splits of different shapes or classes."""
    files = sorted(made.glob("*.npz"))
    if len(files) == 2:
        test, train = (read_kept(split, made / f"{OWN}_{split}.npz") for split in ("test", "train"))
        if test.images.shape[1:] != train.images.shape[1:]:
            raise IntrafusionError(
                f"training images are {tuple(train.images.shape[1:])} and test images {tuple(test.images.shape[1:])}"
            )


def about(name: str) -> str:
    """What kept data ("kept/NAME") hold, in a few words; what is damaged says so."""
    try:
        found = splits(name)
        if not any(found.values()):
            raise IntrafusionError("there are no images in it")
    except (IntrafusionError, OSError) as error:
        return f"damaged: {error}"
    return ", ".join(f"{count:,} {split}" for split, count in found.items())


def splits(name: str) -> dict[str, int]:
    """How many images each split of kept data ("kept/NAME") holds."""
    folder = home() / IMAGES / check_name(name.removeprefix(KEPT))
    arrays = {split: folder / f"{OWN}_{split}.npz" for split in ("train", "test")}
    found = {split: len(read_kept(split, file)) for split, file in arrays.items() if file.is_file()}
    return found or {
        split: sum(1 for file in (folder / split).rglob("*") if file.is_file())
        for split in ("train", "test")
        if (folder / split).is_dir()
    }
