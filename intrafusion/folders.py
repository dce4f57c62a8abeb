"""Folders of pictures: which files are there, and which label each has."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.places import ASSETS

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_LISTS = ("labels.json", "val.txt", "labels.txt", "LOC_val_solution.csv")  # of pictures that lie in one folder
_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Listing:
    """Pictures and their labels. files: N, class by class. labels: int64 (N,), -1 where not known."""

    root: Path
    files: tuple[Path, ...]
    labels: np.ndarray
    classes: tuple[str, ...]

    def rows(self, limit: int | None) -> list[int]:
        """All rows, or `limit` of them: the first of each class (-1 is one), then the second, until it is reached."""
        if limit is None or limit >= len(self.files):
            return list(range(len(self.files)))
        rank: list[int] = []
        seen: dict[str | int, int] = {}
        for file, label in zip(self.files, self.labels.tolist(), strict=True):
            of_class = file.parent.name if file.parent != self.root else label
            rank.append(seen.get(of_class, 0))
            seen[of_class] = rank[-1] + 1
        return sorted(sorted(range(len(rank)), key=lambda row: rank[row])[:limit])


def list_images(name: str, root: Path) -> Listing:
    """The pictures of a folder: in one folder a class, or all in one, as ImageNet's validation set, with a list of labels.

    Raises IntrafusionError where there are none, or where folders or lists name no class.
    """
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        return _listed(name, root)
    labels, classes = folder_labels(name, root, folders)
    files = [f for folder in folders for f in sorted(p for p in (root / folder).glob("[!.]*") if p.is_file())]
    if not files:
        raise IntrafusionError(f"the class folders of {root} hold no images")
    return Listing(root, tuple(files), np.array([labels[f.parent.name] for f in files], np.int64), classes)


def imagenet_categories() -> list[str]:
    """The 1,000 ImageNet class names, in label order (torchvision's)."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return list(_IMAGENET_CATEGORIES)


def folder_labels(name: str, root: Path, folders: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """The label of each class folder, and all class names: from labels.json, WordNet ids, or class names."""
    if name == "own":  # of all splits, so that a label means the same in each
        beside = (
            [root.parent / split for split in ("train", "test", "val")] if root.name in ("train", "test", "val") else []
        )
        folders = sorted(
            {*folders} | {p.name for other in beside if other.is_dir() for p in other.iterdir() if p.is_dir()}
        )
        folders = [folder for folder in folders if not folder.startswith(".")]
        return {f: i for i, f in enumerate(folders)}, tuple(folders)
    if name in ("cifar10", "cifar100"):
        count = 10 if name == "cifar10" else 100
        if name == "cifar10" and set(folders) <= set(CIFAR10_CLASSES):
            return {f: CIFAR10_CLASSES.index(f) for f in folders}, CIFAR10_CLASSES
        if len(folders) != count:
            raise IntrafusionError(f"{root} holds {len(folders)} class folders, and {name} has {count} classes")
        return {f: i for i, f in enumerate(folders)}, tuple(folders)
    categories = tuple(imagenet_categories())
    known = (
        _labels_json(root / "labels.json", categories)
        if (root / "labels.json").exists()
        else _imagenet_names(categories)
    )
    unknown = [f for f in folders if f not in known]
    if unknown:
        raise IntrafusionError(
            f"{root}: {len(unknown)} class folders are no ImageNet class ({', '.join(unknown[:3])}): name them by WordNet "
            f'id or class name, or put a labels.json beside them ({{"folder": label}})'
        )
    return {f: known[f] for f in folders}, categories


def _imagenet_names(categories: Sequence[str]) -> dict[str, int]:
    """The labels of class names and WordNet ids."""
    wnids = (ASSETS / "imagenet_wnids.txt").read_text().split()
    return {c: i for i, c in reversed(list(enumerate(categories)))} | {w: i for i, w in enumerate(wnids)}


def _labels_json(path: Path, categories: Sequence[str]) -> dict[str, int]:
    try:
        known = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise IntrafusionError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(known, dict) or not all(type(v) is int and -1 <= v < len(categories) for v in known.values()):
        raise IntrafusionError(f"{path} must map each folder to a label below {len(categories)}")
    return known


def _listed(name: str, root: Path) -> Listing:
    """Pictures in one folder, with a list of their labels beside them or one folder up."""
    places = [folder / file for folder in (root, root.parent) for file in _LISTS]
    found = next((place for place in places if place.is_file()), None)
    files = sorted(p for p in root.glob("[!.]*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not name.startswith("imagenet") or not files:
        raise IntrafusionError(f"{root} holds no class folders: it needs one folder of images a class")
    if found is None:
        raise IntrafusionError(
            f"{root} holds {len(files):,} images and no class folders: put a list of their labels beside them, val.txt "
            "(a file name and a label or WordNet id a line), LOC_val_solution.csv or labels.json"
        )
    categories = tuple(imagenet_categories())
    known = _labels_json(found, categories) if found.suffix == ".json" else _labels_text(found, categories)
    missing = [file.name for file in files if file.name not in known and file.stem not in known]
    if missing:
        raise IntrafusionError(
            f"{found} says nothing of {len(missing):,} of {len(files):,} images in {root}, as {missing[0]}"
        )
    labels = np.array([known.get(file.name, known.get(file.stem)) for file in files], np.int64)
    return Listing(root, tuple(files), labels, categories)


def _labels_text(path: Path, categories: Sequence[str]) -> dict[str, int]:
    """A file name, and a label from 0 or a WordNet id, on each line; more words may follow."""
    names, known = _imagenet_names(categories), {}
    try:
        with path.open(newline="") as opened:
            lines = list(csv.reader(opened) if path.suffix == ".csv" else (line.split() for line in opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise IntrafusionError(f"{path} is no list of labels: {one_line(error)}") from error
    for number, words in enumerate(lines, 1):
        if not words or words[0] == "ImageId":
            continue
        said = words[1].split()[0] if len(words) > 1 and words[1].split() else ""
        label = int(said) if re.fullmatch(r"\d{1,4}", said) else names.get(said, -1)
        if not 0 <= label < len(categories):
            raise IntrafusionError(
                f"{path}, line {number}: {said[:40]!r} is no label from 0 to {len(categories) - 1} and no WordNet id"
            )
        known[words[0]] = label
    return known
