"""Interpretation of folder trees: which folders are splits, which are classes, and which files are pictures.

It works on a tree of names alone, so folders on disk and in an archive are treated alike.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from intrafusion.errors import IntrafusionError, as_line

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}  # best first
LISTS = ("labels.json", "val.txt", "labels.txt", "LOC_val_solution.csv", "val_annotations.txt", "labels.csv")
_RANK = {word: (split, rank) for split, words in SPLITS.items() for rank, word in enumerate(words)}
_JUNK = ("__macosx", "@eadir", "#recycle", "$recycle.bin")  # system folders with thumbnails or deleted pictures
_BARE = (
    "images",
    "imgs",
    "img",
    "pictures",
    "jpegimages",
)  # the only folder, if it has such a name, is no class
DEPTH = 64

Entry = TypeVar("Entry")


class Tree(Generic[Entry]):
    """A folder: its name, and its files and subfolders by name; listed on first access."""

    def __init__(self, name: str, listing: Callable[[], tuple[dict[str, Entry], dict[str, "Tree[Entry]"]]]):
        self.name = name
        self._listing = listing

    @cached_property
    def _listed(self) -> tuple[dict[str, Entry], dict[str, "Tree[Entry]"]]:
        files, folders = self._listing()
        return dict(sorted(files.items())), dict(sorted(folders.items()))

    @property
    def files(self) -> dict[str, Entry]:
        return self._listed[0]

    @property
    def folders(self) -> dict[str, "Tree[Entry]"]:
        return self._listed[1]

    @cached_property
    def pictures(self) -> list[Entry]:
        """The pictures directly in the folder, sorted by name."""
        return [file for name, file in self.files.items() if is_picture(name)]

    @cached_property
    def holds(self) -> bool:
        """Whether the folder contains a picture, at any depth."""
        return bool(self.pictures) or any(not is_junk(name) and at.holds for name, at in self.folders.items())

    @cached_property
    def holding(self) -> list["Tree[Entry]"]:
        """The subfolders that contain pictures, sorted by name."""
        return [folder for name, folder in self.folders.items() if not is_junk(name) and folder.holds]

    def walk(self) -> Iterator[Entry]:
        """Yield the pictures of the folder, then those of its subfolders."""
        yield from self.pictures
        for folder in self.holding:
            yield from folder.walk()

    def below(self) -> Iterator["Tree[Entry]"]:
        """Yield the subfolders that contain pictures, at any depth."""
        for folder in self.holding:
            yield folder
            yield from folder.below()


def on_disk(path: Path) -> Tree[Path]:
    """Return the tree of the folder at a path. Links are followed, except those to a folder that contains them.

    Accessing the tree raises IntrafusionError for a folder that cannot be listed.
    """
    return _on_disk(path, os.path.realpath(path), frozenset())


def _on_disk(path: Path, real: str, above: frozenset[str]) -> Tree[Path]:
    """Return the tree of a folder. real: its resolved path; above: those of the folders around it."""

    def listing() -> tuple[dict[str, Path], dict[str, Tree[Path]]]:
        files: dict[str, Path] = {}
        folders: dict[str, Tree[Path]] = {}
        within = above | {real}
        _check_depth(path, len(above))
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if _is(entry.is_dir):
                        place = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                        if place not in within:
                            folders[entry.name] = _on_disk(Path(entry.path), place, within)
                    elif _is(entry.is_file):
                        files[entry.name] = Path(entry.path)
        except OSError as error:
            raise IntrafusionError(f"cannot list {path}: {error.strerror or error}") from error
        return files, folders

    return Tree(path.name, listing)


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself
        return False


def _check_depth(path: object, depth: int) -> None:
    if depth > DEPTH:
        raise IntrafusionError(f"{path} is nested more than {DEPTH} folders deep; move the images up")


def in_archive(entries: Iterable[tuple[str, Entry]]) -> Tree[Entry]:
    """Return the tree that names such as "cat/1.png" describe."""
    return _nested([([part for part in name.split("/") if part not in ("", ".")], entry) for name, entry in entries])


def _nested(entries: Sequence[tuple[list[str], Entry]], name: str = "", depth: int = 0) -> Tree[Entry]:
    def listing() -> tuple[dict[str, Entry], dict[str, Tree[Entry]]]:
        _check_depth(name, depth)
        files: dict[str, Entry] = {}
        inner: dict[str, list[tuple[list[str], Entry]]] = {}
        for (first, *rest), entry in entries:
            if rest:
                inner.setdefault(first, []).append((rest, entry))
            else:
                files[first] = entry
        return files, {folder: _nested(within, folder, depth + 1) for folder, within in inner.items()}

    return Tree(name, listing)


def is_picture(name: str) -> bool:
    """Return whether a file name is that of a picture: by its suffix, in any case; hidden files are none."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def is_junk(folder: str) -> bool:
    """Return whether a folder of this name is hidden, or belongs to the system."""
    return folder.startswith(".") or folder.lower() in _JUNK


@dataclass(frozen=True)
class Layout(Generic[Entry]):
    """What a folder holds.

    around: the folders that wrap `top`, the outermost first. top: the folder that holds the splits or classes. splits: the
    folders of "train" and "test" that exist; empty if `top` holds the classes.
    """

    around: tuple[Tree[Entry], ...]
    top: Tree[Entry]
    splits: dict[str, Tree[Entry]] = field(default_factory=dict)

    def at(self, split: str, where: object) -> Tree[Entry]:
        """Return the folder of a split. Raises IntrafusionError, naming `where`, if it does not exist."""
        if not self.splits:
            return self.top
        if split in self.splits:
            return _unwrapped(self.splits[split])
        has, lacks, add = ("test", "training", "train") if split == "train" else ("training", "test", "test (or val)")
        raise IntrafusionError(f"{where} has {has} images but no {lacks} images; add a folder {add}")

    def labels_of(self, tree: Tree[Entry]) -> tuple[str, Entry] | None:
        """Return name and file of the label list for pictures outside class folders: next to them, or at the top."""
        near = ((name, at.files[name]) for at in (unlabelled_folder(tree) or tree, tree) for name in LISTS if name in at.files)
        top = ((name, file) for name, file in self.top.files.items() if name in LISTS and _is_for(name, tree.name))
        return next(near, None) or next(top, None)


def layout_of(root: Tree[Entry]) -> Layout[Entry]:
    """Find the splits, or the classes, of a folder.

    A folder that holds nothing but one folder of folders with pictures is a wrapper, unless that one is named like a split.
    Splits are named by a word of `SPLITS`, in any case; the name may contain other words ("training_set") if both splits exist.
    Pictures are in folders of a split. Of several test splits, the first of test, testing, val, valid, validation whose
    pictures have labels is chosen. Raises IntrafusionError if two folders match equally well.
    """
    around, top = [], root
    while _is_wrapper(top):
        around.append(top)
        top = top.holding[0]
    layout = Layout(tuple(around), top)
    named = _split_folders(top)
    for split in SPLITS:
        of_split = sorted((_claim(folder), folder.name) for folder in named if _claim(folder)[0] == split)
        known = of_split
        if len(of_split) > 1:
            known = [one for one in of_split if _has_labels(layout, top.folders[one[1]])] or of_split
        if len(known) > 1 and known[0][0] == known[1][0]:
            first, second = (name for _, name in known[:2])
            raise IntrafusionError(f"both {first} and {second} may be the {split} split; move one of them")
        if known:
            layout.splits[split] = top.folders[known[0][1]]
    return layout


def _is_wrapper(top: Tree[Entry]) -> bool:
    """Return whether a folder holds nothing but one folder of folders that is not itself named like a split."""
    if len(top.holding) != 1 or top.pictures:
        return False
    only = top.holding[0]
    return not only.pictures and bool(only.holding) and not _is_exact(only)


def unlabelled_folder(tree: Tree[Entry]) -> Tree[Entry] | None:
    """Return the folder whose pictures are in no class folder, or None.

    It is this folder, or its only subfolder if that has a name such as images.
    """
    if not tree.holding:
        return tree if tree.pictures else None
    only = tree.holding[0]
    is_bare = len(tree.holding) == 1 and not tree.pictures and not only.holding and only.name.lower() in _BARE
    return only if is_bare else None


def _split_word(name: str) -> str | None:
    """Return the word of a name that says which split it is; None unless there is exactly one."""
    words = [word for word in re.findall("[a-z]+", name.lower()) if word in _RANK]
    return words[0] if len(words) == 1 else None


def _is_exact(folder: Tree[Entry]) -> bool:
    return folder.name.lower() in _RANK


def _split_folders(top: Tree[Entry]) -> list[Tree[Entry]]:
    """Return the folders of `top` that are splits; a class may also be called train, next to other classes."""
    exact = all(map(_is_exact, top.holding))
    named = [folder for folder in top.holding if _split_word(folder.name)]
    if not exact and (len(named) < len(top.holding) or not _are_both(named)):
        named = [folder for folder in named if not folder.pictures]
    if not _are_both(named):  # a lone split must be unambiguous
        named = [folder for folder in named if _is_exact(folder) and (exact or unlabelled_folder(folder) is None)]
    return named


def _are_both(folders: Sequence[Tree[Entry]]) -> bool:
    return len({_claim(folder)[0] for folder in folders}) == len(SPLITS)


def _claim(folder: Tree[Entry]) -> tuple[str, int, bool]:
    """Return the split, the rank of its word, and whether the name contains other words."""
    word = _split_word(folder.name)
    assert word is not None
    return *_RANK[word], not _is_exact(folder)


def _has_labels(layout: Layout[Entry], folder: Tree[Entry]) -> bool:
    return unlabelled_folder(folder) is None or layout.labels_of(folder) is not None


def _is_for(file: str, split: str) -> bool:
    """Return whether a label list at the top is for this split: its name says so, or names none."""
    words = {word[:3] for name in (file, split) if (word := _split_word(name))}  # val, valid and validation are the same
    return len(words) < 2


def _unwrapped(split: Tree[Entry]) -> Tree[Entry]:
    """Return the innermost folder that wraps a split's classes, as in "train/train" or "train/images"."""
    while len(split.holding) == 1 and not split.pictures:
        only = split.holding[0]
        is_bare = only.name.lower() in _BARE and only.holding and not only.pictures
        if not is_bare and _split_word(only.name) != _split_word(split.name):
            break
        split = only
    return split


def passed_over(layout: Layout[Entry], tree: Tree[Entry], lists: Iterable[Entry] = ()) -> list[str]:
    """Return what is in a folder, or around it, but is ignored: as text, one part for each kind.

    lists: label files that are used.
    """
    classes = [] if unlabelled_folder(tree) is not None else tree.holding
    deeper = [place for of_class in classes for place in of_class.below()]
    outer = {id(place): place for place in (*layout.around, layout.top, tree)}  # `tree` may be the top
    inner = [*classes, *deeper]
    if not classes:
        inner = [unlabelled_folder(tree) or tree]
        outer.pop(id(inner[0]), None)
    places, known = [*outer.values(), *inner], {*lists}
    files = [name for at in places for name, file in at.files.items() if not is_picture(name) and file not in known]
    loose = [name for at in outer.values() for name in at.files if is_picture(name)]
    empty = [name for at in places for name, folder in at.folders.items() if is_junk(name) or not folder.holds]
    beside = [folder.name for folder in layout.top.holding if layout.splits and folder not in layout.splits.values()]
    parts = [
        _told("skipped", files, "file that is not an image", "files that are not images"),
        _told("skipped", empty, "folder without images", "folders without images"),
        _told("skipped", loose, "image outside class folders", "images outside class folders"),
        _told("skipped", beside, "folder next to the splits", "folders next to the splits"),
        _told("included the images of", [at.name for at in deeper], "inner folder", "inner folders"),
    ]
    return [part for part in parts if part]


def _told(did: str, names: list[str], one: str, several: str) -> str:
    shown = [as_line(name)[:40] for name in dict.fromkeys(names)]
    told = f"{did} {len(names):,} {one if len(names) == 1 else several}"
    return f"{told} ({', '.join(shown[:3])}{', …' if len(shown) > 3 else ''})" if names else ""
