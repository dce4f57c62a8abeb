"""Pictures and their labels, from class folders or from one folder with a label list."""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Generic

import numpy as np

from intrafusion.data.folder_layout import (
    LISTS,
    Entry,
    Layout,
    Tree,
    is_junk,
    is_picture,
    layout_of,
    on_disk,
    passed_over,
    unlabelled_folder,
)
from intrafusion.errors import IntrafusionError, one_line
from intrafusion.runtime.file_text import check_classes
from intrafusion.runtime.paths import ASSETS

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
OWN = "own"  # a user's own images, whose classes are not known in advance
_IMAGENETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
_NUMBER = re.compile("[0-9]{1,9}")

Read = Callable[[Entry], bytes]  # returns a file's content


@dataclass(frozen=True)
class Listing(Generic[Entry]):
    """Pictures and their labels.

    files: N, class by class. labels: int64 (N,), -1 where not known. notes: what to tell the user.
    """

    files: tuple[Entry, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def rows(self, limit: int | None) -> list[int]:
        """Return all rows, or `limit` of them: the first of each label (also of -1), then the second, and so on."""
        if limit is None or limit >= len(self.files):
            return list(range(len(self.files)))
        rank: list[int] = []
        seen: dict[int, int] = {}
        for label in self.labels.tolist():
            rank.append(seen.get(label, 0))
            seen[label] = rank[-1] + 1
        return sorted(sorted(range(len(rank)), key=lambda row: rank[row])[:limit])


def list_images(name: str, root: Path, split: str = "test") -> Listing[Path]:
    """List the pictures of a folder's split with their labels.

    They are in one folder per class, or all in one folder, like ImageNet's validation set. `folder_layout.layout_of` says which
    folders are splits and classes. A label list may also be one folder above `root`. Raises IntrafusionError if there are no
    pictures, or if folders or lists name no class.
    """
    tree = on_disk(root)
    return listed(name, root, layout_of(tree), split, Path.read_bytes, on_disk(root.parent))


def has_split(root: Path, split: str) -> bool:
    """Return whether a folder has a folder of this split."""
    return split in layout_of(on_disk(root)).splits


def listed(
    name: str, where: object, layout: Layout[Entry], split: str, read: Read, above: Tree[Entry] | None = None
) -> Listing[Entry]:
    """Apply `list_images` to any tree of folders. where: its name in messages; read: returns the bytes of a file."""
    if not layout.top.holds:
        raise IntrafusionError(f"{where} {_without_pictures(layout.top)}; it needs one folder of images per class")
    tree = layout.at(split, where)
    if unlabelled_folder(tree) is None:
        listing, lists = _of_folders(name, where, layout, tree, read)
    else:
        listing, lists = _of_list(name, where, layout, tree, read, above)
    told = passed_over(layout, tree, lists), listing.notes
    return replace(listing, notes=tuple(f"{where}: {'; '.join(parts)}" for parts in told if parts))


def _without_pictures(tree: Tree[Entry]) -> str:
    folders = [name for name in tree.folders if not is_junk(name)]
    return "has class folders without images" if folders else "has no class folders"


def _of_folders(
    name: str, where: object, layout: Layout[Entry], tree: Tree[Entry], read: Read[Entry]
) -> tuple[Listing[Entry], list[Entry]]:
    """Return the pictures of class folders, and the labels.json that was used for their labels, if any."""
    lists = [tree.files["labels.json"]] if name.startswith("imagenet") and "labels.json" in tree.files else []
    known = _labels_json(f"{where}: labels.json", read(lists[0])) if lists else None
    names = [folder.name for folder in tree.holding]
    if name == OWN:  # from all splits, so that a label means the same in each
        names = [folder.name for of_split in _splits(layout, tree) for folder in of_split.holding]
    labels, classes = folder_labels(name, where, names, known)
    files = [(file, labels[folder.name]) for folder in tree.holding for file in folder.walk()]
    return _listing(files, classes, _odd(classes) if name == OWN else []), lists


def _splits(layout: Layout[Entry], tree: Tree[Entry]) -> list[Tree[Entry]]:
    """Return the splits that have class folders."""
    trees = [layout.at(split, "") for split in layout.splits] or [tree]
    return [one for one in trees if unlabelled_folder(one) is None]


def _listing(files: Sequence[tuple[Entry, int]], classes: tuple[str, ...], notes: Sequence[str] = ()) -> Listing[Entry]:
    labels = np.array([label for _, label in files], np.int64)
    return Listing(tuple(file for file, _ in files), labels, classes, tuple(notes))


def imagenet_categories() -> list[str]:
    """Return the 1,000 ImageNet class names, in label order (torchvision's)."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return list(_IMAGENET_CATEGORIES)


def folder_labels(
    name: str, where: object, folders: Iterable[str], known: Mapping[str, int] | None = None
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the label of each class folder, and all class names.

    If the dataset's classes are known, a folder is named by its class or by its label; ImageNet's also by WordNet id, or as
    `known` (labels.json) says. The labels of own folders are their positions when sorted by name, or by value if all names are
    numbers. Raises IntrafusionError for folders that are no class.
    """
    folders = list(check_classes(dict.fromkeys(folders), where))
    if name == OWN:
        return _places(folders)
    if name in ("cifar10", "cifar100"):
        return _cifar_labels(name, where, folders)
    categories = tuple(imagenet_categories())
    numbers = _numbers(folders) if known is None else None
    if numbers is not None and (name == "imagenet" or {*numbers.values()} <= {*_IMAGENETTE}):
        return _checked(name, where, numbers, len(categories)), categories
    names = known if known is not None else _imagenet_names(categories)
    unknown = [folder for folder in folders if folder not in names]
    if unknown:
        raise IntrafusionError(
            f"{where}: {len(unknown)} class folders are not ImageNet classes ({', '.join(unknown[:3])}); name them by WordNet "
            f'id, class name or label, or put a labels.json next to them ({{"folder": label}})'
        )
    return {folder: names[folder] for folder in folders}, categories


def _places(folders: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return labels in the order of the names; different Unicode spellings of one name are one class."""
    by_value = _numbers(folders)
    spelt = sorted(folders, key=(lambda folder: (by_value[folder], folder)) if by_value is not None else None)
    place = {name: label for label, name in enumerate(dict.fromkeys(map(_composed, spelt)))}
    return {folder: place[_composed(folder)] for folder in folders}, tuple(place)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _numbers(folders: Sequence[str]) -> dict[str, int] | None:
    """Return the values of folders if all are named by whole numbers, else None."""
    return {folder: int(folder) for folder in folders} if all(map(_NUMBER.fullmatch, folders)) else None


def _odd(classes: Sequence[str]) -> list[str]:
    """Return notes on own classes: if there is only one, or if their numbers differ from their labels."""
    if len(classes) == 1:
        return [f"all images are of one class, {classes[0]}"]
    numbers = _numbers(classes)
    if numbers is None or [*numbers.values()] == [*range(len(classes))]:
        return []
    return [f"classes are numbered {classes[0]} to {classes[-1]}; their labels are 0 to {len(classes) - 1}, in this order"]


def _cifar_labels(name: str, where: object, folders: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    count = 10 if name == "cifar10" else 100
    names = CIFAR10_CLASSES if name == "cifar10" else tuple(map(str, range(count)))
    numbers = _numbers(folders)
    if numbers is not None:
        return _checked(name, where, numbers, count), names
    if name == "cifar10" and {*folders} <= {*names}:
        return {folder: names.index(folder) for folder in folders}, names
    if len(folders) != count:
        raise IntrafusionError(f"{where} has {len(folders)} class folders, but {name} has {count} classes")
    return _places(folders)


def _checked(name: str, where: object, numbers: dict[str, int], count: int) -> dict[str, int]:
    least, most = min(numbers.values()), max(numbers.values())
    if most >= count:
        raise IntrafusionError(
            f"{where}: class folders are numbered {least} to {most}, but labels of {name} range from 0 to {count - 1}; "
            "rename them to their labels"
        )
    return numbers


def _imagenet_names(categories: Sequence[str]) -> dict[str, int]:
    """Return the labels of class names and WordNet ids."""
    wnids = (ASSETS / "imagenet_wnids.txt").read_text().split()
    return {c: i for i, c in reversed(list(enumerate(categories)))} | {w: i for i, w in enumerate(wnids)}


def _labels_json(where: str, content: bytes, names: bool = False) -> dict[str, Any]:
    """Parse a labels.json: an ImageNet label for each folder or image or, with `names`, a class name or number."""
    count = len(imagenet_categories())
    try:
        known = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise IntrafusionError(f"{where} is not JSON: {one_line(error)}") from error
    if not isinstance(known, dict) or not all(
        (names and isinstance(v, str)) or (type(v) is int and -1 <= v < count) for v in known.values()
    ):
        raise IntrafusionError(f"{where} must map each folder or image to a label below {count}")
    return known


def _of_list(
    name: str, where: object, layout: Layout[Entry], tree: Tree[Entry], read: Read[Entry], above: Tree[Entry] | None
) -> tuple[Listing[Entry], list[Entry]]:
    """Return pictures outside class folders, and the list of their labels.

    Labels are numbers and WordNet ids, or class names for own images.
    """
    files = {file: entry for file, entry in (unlabelled_folder(tree) or tree).files.items() if is_picture(file)}
    found = layout.labels_of(tree)
    if found is None and above is not None and tree is layout.top:
        found = next(((file, above.files[file]) for file in LISTS if file in above.files), None)
    if name != OWN and not name.startswith("imagenet"):
        raise IntrafusionError(f"{where} has no class folders; it needs one folder of images per class")
    if found is None:
        raise IntrafusionError(
            f"{where} has {len(files):,} images but no class folders (for example {next(iter(files))}); create class folders, "
            "or add a list of labels: val.txt (one file name and label per line) or labels.csv"
        )
    told = f"{where}: {found[0]}"
    lines = _lines(told, name, read(found[1]))
    by_file = {file: line for file in files if (line := lines.get(file) or lines.get(PurePosixPath(file).stem))}
    if name == OWN:
        labels, classes = _own_words(told, by_file, _splits(layout, tree))
    else:
        labels, classes = _imagenet_words(by_file)
    lacking = [file for file in files if file not in labels]
    if lacking:
        raise IntrafusionError(f"{told} has no label for {len(lacking):,} of {len(files):,} images, such as {lacking[0]}")
    notes = _odd(classes) if name == OWN else []
    return _listing([(entry, labels[file]) for file, entry in files.items()], classes, notes), [found[1]]


def _lines(told: str, name: str, content: bytes) -> dict[str, tuple[str, str]]:
    """Parse a label list: for each file, the location of its entry and the entry's text."""
    if told.endswith(".json"):
        return {file: (told, str(label)) for file, label in _labels_json(told, content, name == OWN).items()}
    try:
        text = content.decode("utf-8-sig")
        rows = [*csv.reader(io.StringIO(text, newline=""))] if told.endswith(".csv") else map(str.split, text.splitlines())
        return {
            PurePosixPath(words[0]).name: (f"{told}, line {number}", words[1].strip() if len(words) > 1 else "")
            for number, words in enumerate(rows, 1)
            if words
        }
    except (UnicodeDecodeError, csv.Error) as error:
        raise IntrafusionError(f"{told} is not a list of labels: {one_line(error)}") from error


def _own_words(
    told: str, lines: Mapping[str, tuple[str, str]], others: Sequence[Tree[Entry]]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return labels of own files by class name; if another split has class folders, the names must be among those."""
    names = [folder.name for split in others for folder in split.holding]
    labels, classes = folder_labels(OWN, told, names or [word for _, word in lines.values()])
    known = {_composed(name): label for name, label in labels.items()}
    for place, word in lines.values():
        if not word or _composed(word) not in known:
            raise IntrafusionError(f"{place}: {word[:40]!r} is not one of the class folders {', '.join(classes[:4])}, …")
    return {file: known[_composed(word)] for file, (_, word) in lines.items()}, classes


def _imagenet_words(lines: Mapping[str, tuple[str, str]]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return labels of files, each from the first word of its entry or the whole entry.

    An entry is a label from 0, -1 if not known, or a class name or WordNet id; further words may follow.
    """
    categories = tuple(imagenet_categories())
    names, labels = _imagenet_names(categories), {}
    for file, (place, words) in lines.items():
        said = words if words in names else (words.split() or [""])[0]
        label = int(said) if re.fullmatch(r"-1|[0-9]{1,4}", said) else names.get(said, len(categories))
        if label >= len(categories):
            raise IntrafusionError(f"{place}: {said[:40]!r} is not a label from 0 to {len(categories) - 1} or a WordNet id")
        labels[file] = label
    return labels, categories
