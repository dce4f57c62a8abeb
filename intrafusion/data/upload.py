"""Users' images: .npz files, or a zip of one folder of pictures per class, read like `load_data` reads files on disk."""

import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from intrafusion.data._decode_worker import count_pixels, pixels_of
from intrafusion.data.arrays import MEMBERS, Arrays, Reading, header, read_arrays, role_of, splits_of
from intrafusion.data.datasets import KEPT, OWN, read_kept
from intrafusion.data.folder_layout import DEPTH, SUFFIXES, in_archive, is_junk, is_picture, layout_of
from intrafusion.data.image_folder import Listing, list_images, listed
from intrafusion.errors import IntrafusionError
from intrafusion.runtime.atomic_write import move_into_place, plain_errors
from intrafusion.runtime.cancellation import OnProgress, checkpoint
from intrafusion.runtime.paths import check_name, home, inside, is_part
from intrafusion.runtime.safe_zip import MIB, UNPACKED, open_zip
from intrafusion.runtime.sandbox import Step, drained
from intrafusion.runtime.staging import IMAGES, Workshop, free_path, given, run_check

PICTURES, CLASSES = 100_000, 10_000
PIXELS = 8_000_000_000  # most pixels of all pictures of an archive
SPLITS = ("train", "test")
_ARRAYS = tuple(f"{OWN}_{split}.npz" for split in SPLITS)
SIDE = 1024  # most pixels per side, of images in an .npz
_PICTURE, _LIST = 32 * MIB, 8 * MIB  # most bytes of a picture, and of a label list
_FOLDERS = 60_000  # each counted with its parents: 10,000 classes in two splits in one folder
_BESIDE = (  # files next to pictures that are skipped; others, such as programs and archives, are refused
    "", ".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".log", ".ini", ".db", ".url", ".md5",
)  # fmt: skip
_log = logging.getLogger(__name__)


def take_data(
    files: Sequence[Path],
    name: str,
    progress: OnProgress | None = None,
    reading: Reading | None = None,
    tell: Callable[[str], None] = _log.warning,
) -> str:
    """Keep images under a name that `load_data` opens, and return it as "kept/NAME".

    files: one .npz, two of them (x_train.npz and x_test.npz), or one .zip of class folders, possibly below train/ and test/.
    reading: resolves ambiguous arrays. tell: receives a line about anything skipped or converted. A child process reads and
    decodes the files (see `sandbox`). Raises IntrafusionError, and keeps nothing, for files that are damaged, too large, unsafe
    or no labelled images.
    """
    free_path(IMAGES, name)
    with given(*files) as workshop:
        return drained(data_steps(workshop, name, reading, tell), progress)


def data_steps(
    workshop: Workshop, name: str, reading: Reading | None = None, tell: Callable[[str], None] = _log.warning
) -> Generator[Step, None, str]:
    """Run `take_data` in steps, on the files given to the workshop."""
    target, reading = free_path(IMAGES, name), reading or Reading()
    if not workshop.given:
        raise IntrafusionError("no file given; give one .npz, two (x_train, x_test), or one .zip of class folders")
    asked = {"layout": reading.layout, "span": reading.span}
    notes = yield from run_check("images", workshop, workshop.given, asked, tell)
    _check_made(workshop.made)
    if not any((workshop.made / test).exists() for test in ("test", f"{OWN}_test.npz")):
        raise IntrafusionError("there are training images but no test images; add a test split")
    target.parent.mkdir(parents=True, exist_ok=True)
    with plain_errors(target):
        move_into_place(workshop.made, target)
    for note in dict.fromkeys(map(str, notes if isinstance(notes, list) else [])):
        tell(note)
    return f"{KEPT}{name}"


def read(made: Path, files: Sequence[Path], progress: OnProgress, reading: Reading) -> list[str]:
    """Read and decode files, in a child process, and write what is kept to `made`; return what was skipped or converted."""
    made.mkdir()
    kinds = [file.suffix.lower() for file in files]
    if kinds == [".zip"]:
        notes = _take_pictures(files[0], made, progress)
    elif set(kinds) == {".npz"}:
        notes = _take_arrays(files, made, reading)
    else:
        raise IntrafusionError(
            f"cannot use {', '.join(f.name for f in files)}; give one .npz, two (x_train, x_test), or one .zip of class folders"
        )
    _check_splits(made)
    return notes


def _check_made(made: Path) -> None:
    """Reject output that a correct child would not leave: files other than images, or too many or too large ones."""
    pictures = total = 0
    for place, folders, names in os.walk(made):
        parts = Path(place).relative_to(made).parts
        for name in (*folders, *names):
            path = Path(place) / name
            size = path.stat().st_size
            total += size
            if path.is_dir():
                fits = name in SPLITS if not parts else len(parts) == 1 and _is_class_folder(name)
            elif not parts:
                fits = name in _ARRAYS and bool(_check_arrays(path))
            else:
                pictures += 1
                fits = len(parts) == 2 and is_picture(name) and size <= _PICTURE
            if not fits or pictures > PICTURES or total > 2 * UNPACKED:
                raise IntrafusionError(f"rejected images: checking them left {name[:80]!r}, which is not one of them")


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
    """Return the file of each split: by array names for one file, by file names for two."""
    keys = {file: _check_arrays(file) for file in files}
    if len(files) == 1:
        return [(split, files[0]) for split in splits_of(keys[files[0]]) or ("test",)]
    named = [("train" if "train" in file.stem.lower() else "test", file) for file in files]
    if sorted(split for split, _ in named) != ["test", "train"]:
        raise IntrafusionError(
            "one of two .npz files must have train in its name and the other test, such as x_train.npz and x_test.npz"
        )
    return named


def _save(path: Path, found: Arrays) -> None:
    classes = found.classes or (tuple(map(str, range(found.columns))) if found.columns else ())
    arrays = {"images": found.images, "labels": found.labels} | ({"classes": np.array(classes)} if classes else {})
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def _check_arrays(file: Path) -> list[str]:
    """Check the headers of all arrays before any of them is read; return their names."""
    keys = []
    with open_zip(file, MEMBERS) as (archive, infos):
        for info in infos:
            key = info.filename.removesuffix(".npy")
            role = role_of(key) if key != info.filename else None
            if role is None:
                raise IntrafusionError(f"{file} contains {info.filename[:80]!r}; only images, labels and classes are supported")
            keys.append(key)
            shape, kind = header(archive, info)
            if kind.hasobject:
                raise IntrafusionError(f"{file} contains {role[0]} as Python objects (a pickle); save plain numbers")
            most = (SIDE, SIDE, SIDE) if len(shape) > 2 else (SIDE * SIDE,)
            fits = len(shape) in (2, 3, 4) and all(size <= side for size, side in zip(shape[1:], most, strict=False))
            if role[0] == "images" and (not fits or kind.kind not in "uifb"):
                raise IntrafusionError(
                    f"{file}: images must be uint8 (N, H, W, C) with sides of at most {SIDE} pixels, not {kind} {shape}"
                )
            if role[0] == "classes" and (
                kind.kind != "U" or len(shape) != 1 or len(set(shape) | {CLASSES + 1}) < 2 or shape[0] > CLASSES
            ):
                raise IntrafusionError(f"{file}: classes must be at most {CLASSES:,} names, not {kind} {shape}")
    return keys


def _take_pictures(file: Path, made: Path, progress: OnProgress) -> list[str]:
    """Read each picture once, and write it under a name of our own; return what was skipped."""
    classes = dict[str, str]()  # class of each picture, by our name for it
    with open_zip(file) as (archive, infos):
        found = _listed(file, archive, infos)
        total, pixels = sum(len(listing.files) for listing in found.values()), 0
        for split, listing in found.items():
            folders = [inside(made, split, of_class) for of_class in listing.classes]
            for info, label in zip(listing.files, listing.labels.tolist(), strict=True):
                checkpoint()
                content = archive.read(info)
                pixels = _check_picture(file, info, content, pixels)
                picture = inside(folders[label], f"{len(classes) + 1:06}{_suffix(info)}")
                picture.parent.mkdir(parents=True, exist_ok=True)
                picture.write_bytes(content)
                classes[picture.name] = listing.classes[label]
                progress(len(classes), total)
    _check_kept(file, made, [*found], classes)
    return [note for listing in found.values() for note in listing.notes]


def _check_picture(file: Path, info: zipfile.ZipInfo, content: bytes, before: int) -> int:
    """Decode a picture once; return the pixels of all so far. before: the pixels of all previous pictures."""
    try:
        if (pixels := before + count_pixels(content)) <= PIXELS:
            pixels_of(content, (8, 8), "L", "always")
            return pixels
    except ValueError as error:
        name = repr(info.filename[:80])
        raise IntrafusionError(f"{file} contains {name}, which is not a readable image: {error}") from error
    raise IntrafusionError(f"the images in {file} have more than {PIXELS:,} pixels in total; make them smaller, or use fewer")


def _check_kept(file: Path, made: Path, splits: Sequence[str], classes: Mapping[str, str]) -> None:
    """Reject classes that change once their pictures are in folders, such as a single class called images."""
    kept = dict[str, str]()
    for split in splits:
        try:
            listing = list_images(OWN, made, split)
        except IntrafusionError as error:
            raise IntrafusionError(f"{file} has class names that cannot be folder names; rename {_named(classes)}") from error
        kept |= {path.name: listing.classes[label] for path, label in zip(listing.files, listing.labels.tolist(), strict=True)}
    if kept != classes:
        raise IntrafusionError(f"{file} has class names that cannot be folder names; rename {_named(classes)}")


def _named(classes: Mapping[str, str]) -> str:
    return ", ".join([*dict.fromkeys(classes.values())][:4])


def _listed(file: Path, archive: zipfile.ZipFile, infos: Sequence[zipfile.ZipInfo]) -> dict[str, Listing[zipfile.ZipInfo]]:
    """List the pictures of each split."""
    for info in infos:
        _check_member(file, info)
    pictures = sum(is_picture(PurePosixPath(info.filename).name) for info in infos)
    if pictures > PICTURES:
        raise IntrafusionError(f"{file} has {pictures:,} images; the limit is {PICTURES:,}")
    folders = {info.filename.rpartition("/")[0] for info in infos}
    if sum(folder.count("/") + 1 for folder in folders) > _FOLDERS:
        raise IntrafusionError(f"{file} has more than {_FOLDERS:,} nested folders; use fewer")

    def read_list(info: zipfile.ZipInfo) -> bytes:
        if info.file_size > _LIST:
            raise IntrafusionError(f"{file} contains {info.filename[:80]!r}, a list larger than {_LIST // MIB} MiB; shorten it")
        return archive.read(info)

    tree = in_archive((info.filename, info) for info in infos)
    if not tree.holds:
        raise IntrafusionError(f"{file} has no images; it needs one folder of images per class")
    layout = layout_of(tree)
    layout.at("test", file)
    found = {split: listed(OWN, file, layout, split, read_list) for split in layout.splits or ("test",)}
    for listing in found.values():
        if len(listing.classes) > CLASSES:
            raise IntrafusionError(f"{file} has more than {CLASSES:,} class folders")
        if odd := next((of_class for of_class in listing.classes if not _is_class_folder(of_class)), None):
            raise IntrafusionError(f"{file} has a class folder with an invalid name, {odd[:80]!r}; rename it")
    return found


def _is_class_folder(name: str) -> bool:
    """Return whether a class of this name can be kept in a folder of the same name."""
    return is_part(name) and not is_junk(name)


def _check_member(file: Path, info: zipfile.ZipInfo) -> None:
    """Reject files that are neither pictures nor text next to pictures, and pictures that are too large."""
    *folders, last = PurePosixPath(info.filename).parts
    name = info.filename[:80]
    if last.startswith(".") or any(map(is_junk, folders)):
        return
    if not is_picture(last) and _suffix(info) not in _BESIDE:
        raise IntrafusionError(f"{file} contains {name!r}, which is not an image; use {', '.join(SUFFIXES)}")
    if len(folders) > DEPTH:
        raise IntrafusionError(f"{file} contains {name!r}, nested more than {DEPTH} folders deep; move the images up")
    if info.file_size > _PICTURE:
        raise IntrafusionError(
            f"{file} contains {name!r} of {info.file_size / MIB:,.0f} MiB; the limit is {_PICTURE // MIB} MiB"
        )


def _suffix(info: zipfile.ZipInfo) -> str:
    return PurePosixPath(info.filename).suffix.lower()


def _check_splits(made: Path) -> None:
    """Reject splits of different shapes or classes."""
    files = sorted(made.glob("*.npz"))
    if len(files) == 2:
        test, train = (read_kept(split, made / f"{OWN}_{split}.npz") for split in ("test", "train"))
        if test.images.shape[1:] != train.images.shape[1:]:
            raise IntrafusionError(
                f"training images are {tuple(train.images.shape[1:])}, but test images are {tuple(test.images.shape[1:])}"
            )


def about(name: str) -> str:
    """Return a short text on what kept data ("kept/NAME") hold, or how they are damaged."""
    try:
        found = splits(name)
        if not any(found.values()):
            raise IntrafusionError("it has no images")
    except (IntrafusionError, OSError) as error:
        return f"damaged: {error}"
    return ", ".join(f"{count:,} {split}" for split, count in found.items())


def splits(name: str) -> dict[str, int]:
    """Return the number of images in each split of kept data ("kept/NAME")."""
    folder = home() / IMAGES / check_name(name.removeprefix(KEPT))
    arrays = {split: folder / f"{OWN}_{split}.npz" for split in ("train", "test")}
    found = {split: len(read_kept(split, file)) for split, file in arrays.items() if file.is_file()}
    return found or {
        split: sum(1 for file in (folder / split).rglob("*") if file.is_file())
        for split in ("train", "test")
        if (folder / split).is_dir()
    }
