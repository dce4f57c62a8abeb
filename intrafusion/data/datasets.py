"""Labelled images by name: stored as uint8 on the device, and normalised there.

`digits` comes with scikit-learn; CIFAR from torchvision's files, an .npz or class folders; ImageNet and Imagenette from class
folders; your own images from an .npz, class folders, or what `upload.take_data` keeps. Only digits needs neither a path nor a
network connection. What was skipped or converted is logged as a warning, once per process, and listed in `ImageData.notes`.
"""

import gzip
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intrafusion.data.arrays import Reading, keys_of, read_arrays, splits_of
from intrafusion.data.decode_cache import Wanted, decoded
from intrafusion.data.image_folder import CIFAR10_CLASSES, OWN, has_split, imagenet_categories, list_images
from intrafusion.errors import IntrafusionError, check_choice, one_line, unknown
from intrafusion.runtime.cancellation import OnProgress, checkpoint
from intrafusion.runtime.devices import CPU, choose_device
from intrafusion.runtime.download import stream
from intrafusion.runtime.paths import home, is_name

_log = logging.getLogger(__name__)
KEPT = "kept/"
DATASETS = {
    "digits": "scikit-learn's 8x8 handwritten digits: 1,200 train, 597 test; embedded",
    "cifar10": "CIFAR-10, 10 classes of 32x32 colour images; a path or a download (170 MB)",
    "cifar100": "CIFAR-100, 100 classes of 32x32 colour images; a path or a download (169 MB)",
    "imagenet": "ImageNet class folders (WordNet ids, class names, or a labels.json); a path",
    "imagenette": "Imagenette, 10 ImageNet classes mapped to their places among the 1,000; a path",
    OWN: "your own images: an .npz, a folder of .npz files or of class folders; a path, or kept/NAME after `own data`",
}
Size = int | tuple[int, int, int]
_PIXELS = 1 << 17  # input pixels per batch on the CPU: 128 CIFAR images stay in the caches
_DEVICE_PIXELS = 1 << 22
_KEPT_AS = Reading("nhwc", (0, 255))  # how kept arrays are stored
_MEMORY_LIMIT = 4 << 30  # most bytes of decoded images in memory


@dataclass(frozen=True)
class ImageData:
    """A labelled split of a dataset.

    images: uint8 (N, C, H, W), channels last in memory. labels: int64 (N,), -1 if not known. notes: what was skipped or
    converted, one line each.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str | torch.device) -> "ImageData":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, limit: int | None, seed: int = 0) -> "ImageData":
        """Return at most `limit` images, drawn without replacement; the same ones for the same seed on any device."""
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise IntrafusionError(f"limit must be at least 1 image, not {limit}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
        order = order.to(self.labels.device)
        return replace(self, images=self.images[order], labels=self.labels[order])

    def labelled(self) -> "ImageData":
        """Return the images with known labels, which accuracies and losses are computed on.

        Raises IntrafusionError if there are none.
        """
        known = self.labels >= 0
        if bool(known.all()) and len(self):
            return self
        if not bool(known.any()):
            raise IntrafusionError(f"no image of {self.name} has a label; use labelled images")
        return replace(self, images=self.images[known], labels=self.labels[known])

    @property
    def note(self) -> str:
        """How many images have labels, as text; "" if all have."""
        known = int((self.labels >= 0).sum())
        return "" if known == len(self) else f"{known:,} of {len(self):,} images have labels; accuracies are measured on these"

    def batches(self, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield successive (images, labels) batches, of a size that suits the device and is at most `most`."""
        pixels = _PIXELS if self.images.device == CPU else _DEVICE_PIXELS
        size = max(1, pixels // (self.images.shape[-1] * self.images.shape[-2]))
        size = size if most is None else min(most, size)
        for batch in zip(self.images.split(size), self.labels.split(size), strict=True):
            checkpoint()
            yield batch


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert uint8 (B, C, H, W) in 0..255 to float32 `(image / 255 - mean) / std` per channel, on the images' device."""
    shift, scale = _constants(tuple(mean), tuple(std), images.device)
    return images.float().sub_(shift).mul_(scale)


@lru_cache(maxsize=32)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what `normalise` subtracts and multiplies by, (1, C, 1, 1) each: one upload for all batches."""
    with torch.inference_mode(False):
        shift, scale = torch.tensor(mean) * 255, 1 / (torch.tensor(std) * 255)
        return shift.view(1, -1, 1, 1).to(device), scale.view(1, -1, 1, 1).to(device)


def load_data(
    name: str,
    split: str = "test",
    path: str | Path | None = None,
    device: str | torch.device = "cpu",
    download: bool = False,
    limit: int | None = None,
    input_size: Size = 224,
    progress: OnProgress | None = None,
) -> ImageData:
    """Load a labelled split of a dataset.

    Parameters
    ----------
    name : str
        A dataset's name; "kept/NAME" for images kept on this machine.
    split : str
        "train" or "test".
    path : str or Path, optional
        An .npz of images and labels (see `arrays`), a folder of class folders, possibly below train and test (see
        `folder_layout`), torchvision's CIFAR folder or that of its batches, or a folder that holds `{name}_{split}.npz`.
    device : str or torch.device
        Where the images are kept.
    download : bool
        Whether CIFAR may be downloaded.
    limit : int, optional
        Decode at most this many images of a folder, spread over the classes.
    input_size : int or (C, H, W)
        Side in pixels of the central crop for ImageNet and own folders, whose shorter side is first resized to 8/7 of it.
    progress : callable, optional
        Called with (images decoded, images in total). Folders of many pictures are decoded once and cached.

    Returns
    -------
    ImageData
        Images as uint8 (N, C, H, W), labels as int64 (N,).

    Raises
    ------
    IntrafusionError
        For an unknown name or split, or a path that does not hold such a dataset.

    Examples
    --------
    >>> import intrafusion as itf
    >>> data = itf.load_data("digits")
    >>> tuple(data.images.shape), data.images.dtype
    ((597, 1, 8, 8), torch.uint8)
    """
    if name not in DATASETS and not name.startswith(KEPT):
        raise unknown("dataset", name, [*DATASETS, *kept_data()])
    check_choice("split", split, ("train", "test"))
    if name == "digits":
        if path is not None:
            raise IntrafusionError(f"digits is embedded and takes no path; leave {path} out, or choose another dataset")
        data = _digits(split)
    elif name.startswith(KEPT):
        data = _from_path(OWN, split, _kept(name, path), limit, input_size, progress, _KEPT_AS)
        data = replace(data, name=name)
    elif path is not None:
        data = _from_path(name, split, Path(os.path.expanduser(path)), limit, input_size, progress)
    elif name in ("cifar10", "cifar100"):
        data = _torchvision_cifar(name, split, home() / "data", download=download)
    elif name == OWN:
        raise IntrafusionError("dataset own needs path= (--data-path); for saved images, choose dataset kept/NAME")
    else:
        raise IntrafusionError(f"{name} cannot be downloaded; pass path= (--data-path) with its folder of class folders")
    for note in data.notes:
        _tell(note)
    return data.to(choose_device(device))


@lru_cache(maxsize=1024)  # log each note once
def _tell(note: str) -> None:
    _log.warning("%s", note)


def kept_data() -> list[str]:
    """Return the datasets kept on this machine, as "kept/NAME", in alphabetical order."""
    return sorted(f"{KEPT}{path.name}" for path in (home() / "images").glob("[!.]*") if is_name(path.name))


def _kept(name: str, path: str | Path | None) -> Path:
    """Return the folder of a kept dataset."""
    if path is not None:
        raise IntrafusionError(f"{name} is saved on this machine and takes no path; leave {path} out")
    if name not in kept_data():
        raise unknown("saved images", name, kept_data())
    folder = home() / "images" / name.removeprefix(KEPT)
    if not folder.is_dir():
        raise IntrafusionError(f"{name} is damaged: it is not a folder of images; remove it")
    return folder


def load_calibration(
    name: str,
    path: str | Path | None = None,
    device: str | torch.device = "cpu",
    limit: int | None = 512,
    seed: int = 0,
    input_size: Size = 224,
) -> ImageData:
    """Load at most `limit` images for criteria and costs, from the training split, so that no test label leaks.

    If `path` holds no training split (x_train.npz for x_test.npz or x.npz), they come from the test split; `.split` says which.
    Raises IntrafusionError as `load_data` does.
    """
    if name.startswith(KEPT):
        split, where = "train" if _has_train(OWN, _kept(name, path)) else "test", None
    else:
        split, where = _calibration_split(name, None if path is None else Path(os.path.expanduser(path)))
    data = load_data(name, split, where, limit=limit, input_size=input_size).subset(limit, seed)
    data = replace(data, images=data.images.clone(), labels=data.labels.clone())  # releases the other images
    return data.to(choose_device(device))


def _calibration_split(name: str, where: Path | None) -> tuple[str, Path | None]:
    """Return the split to calibrate on, and the path that holds it."""
    if where is not None and where.is_file() and "train" not in splits_of(keys_of(where)):
        beside = train_beside(where)
        return ("train", beside) if beside.is_file() else ("test", where)
    return "train" if where is None or not where.is_dir() or _has_train(name, where) else "test", where


def train_beside(test: Path) -> Path:
    """Return the path of training images beside a file of test images: x_train.npz for x_test.npz, or for x.npz."""
    name = test.name.replace("test", "train")
    return test.with_name(name if name != test.name else f"{test.stem}_train{test.suffix}")


def _has_train(name: str, folder: Path) -> bool:
    arrays = (folder / f"{name}_train.npz").exists(), (folder / f"{name}_test.npz").exists()
    return arrays[0] or (not arrays[1] and (_cifar_place(name, folder) is not None or has_split(folder, "train")))


def _digits(split: str) -> ImageData:
    """Read the file that comes with scikit-learn, without importing scikit-learn, which takes two seconds."""
    (folder,) = find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr, misc]
    with gzip.open(Path(folder) / "datasets" / "data" / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    rows = table[stratified_split(table[:, -1], 597)[split == "test"]]
    images = np.rint(rows[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return _pack("digits", split, images, rows[:, -1].astype(np.int64), tuple("0123456789"))


def stratified_split(labels: np.ndarray, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows for training and `count` rows for testing, int64, in each of which the classes have the same shares.

    The rows are those of scikit-learn's train_test_split(stratify=labels, random_state=seed).
    """
    rng, sizes = np.random.RandomState(seed), np.bincount(labels)

    def shares(sizes: np.ndarray, count: int) -> np.ndarray:
        """Return whole numbers in proportion to `sizes` that sum to `count`; of equal remainders chance rounds some up."""
        exact = sizes / sizes.sum() * count
        found = np.floor(exact)
        remainders = exact - found
        for remainder in np.unique(remainders)[::-1]:
            if (more := int(count - found.sum())) <= 0:
                break
            (equal,) = np.nonzero(remainders == remainder)
            found[rng.choice(equal, min(len(equal), more), replace=False)] += 1
        return found.astype(int)

    trained = shares(sizes, len(labels) - count)
    tested = shares(sizes - trained, count)
    parts: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for label, (first, then) in enumerate(zip(trained, tested, strict=True)):
        rows = rng.permutation(np.nonzero(labels == label)[0])
        parts[0].append(rows[:first])
        parts[1].append(rows[first : first + then])
    return rng.permutation(np.concatenate(parts[0])), rng.permutation(np.concatenate(parts[1]))


def _pack(
    name: str,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    notes: tuple[str, ...] = (),
) -> ImageData:
    nchw = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    data = ImageData(name, split, nchw, torch.from_numpy(labels.astype(np.int64)), classes, notes)
    return replace(data, notes=(*notes, data.note)) if data.note else data


def _from_path(
    name: str,
    split: str,
    path: Path,
    limit: int | None,
    input_size: Size,
    progress: OnProgress | None,
    reading: Reading | None = None,
) -> ImageData:
    if not os.path.exists(path):
        raise IntrafusionError(f"no file at {path}; give an .npz file or a folder of class folders")
    if path.is_dir() and (path / f"{name}_{split}.npz").exists():
        path = path / f"{name}_{split}.npz"
    if path.is_file():
        return _npz(name, split, path, reading)
    if not path.is_dir():
        raise IntrafusionError(f"{path} is neither a file nor a folder; give an .npz file or a folder of class folders")
    if place := _cifar_place(name, path):
        return _torchvision_cifar(name, split, *place)
    cifar = name in ("cifar10", "cifar100")
    channels, height, width = (3, 32, 32) if cifar else _whole(input_size)
    crop = "none" if cifar else "other" if name == OWN else "always"
    wanted = Wanted((height, width), "L" if channels == 1 else "RGB", crop)
    return _class_folders(name, split, path, limit, wanted, progress)


def _whole(size: Size) -> tuple[int, int, int]:
    return (3, size, size) if isinstance(size, int) else size


def _class_folders(
    name: str, split: str, root: Path, limit: int | None, wanted: Wanted, progress: OnProgress | None
) -> ImageData:
    listing = list_images(name, root, split)
    rows = listing.rows(limit)
    in_memory = wanted.crop == "none" or len(rows) < len(listing.files)
    if in_memory and len(rows) * math.prod(wanted.pixels) > _MEMORY_LIMIT:
        height, width = wanted.shape
        raise IntrafusionError(
            f"{root}: {len(rows):,} images of {height}x{width} exceed {_MEMORY_LIMIT >> 30} GiB of memory; pass limit="
        )
    images = decoded(root, listing.files, rows, wanted, progress)
    return _pack(name, split, images, listing.labels[rows], listing.classes, listing.notes)


def stream_cifar(name: str) -> Iterator[tuple[int, int]]:
    """Download CIFAR's archive to where `load_data` looks for it, yielding (bytes done, total bytes)."""
    maker = _cifar_class(name)
    yield from stream(maker.url, home() / "data" / maker.filename)


def _cifar_class(name: str) -> Any:
    from torchvision import datasets

    return datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100


def _cifar_place(name: str, path: Path) -> tuple[Path, str | None] | None:
    """Return the parent folder of torchvision's batches, and the batch folder's name if unusual; None if there are none.

    The batches may be in `path` itself or in a folder below it.
    """
    if name not in ("cifar10", "cifar100"):
        return None
    maker = _cifar_class(name)
    if (path / maker.base_folder).is_dir() or (path / maker.filename).is_file():
        return path, None
    batches = path.resolve()
    if all((batches / file).is_file() for file in (maker.meta["filename"], maker.test_list[0][0])):
        return batches.parent, batches.name
    return None


def _torchvision_cifar(name: str, split: str, root: Path, folder: str | None = None, download: bool = False) -> ImageData:
    """Load torchvision's batches from `root`, or a folder in it.

    They are pickles: torchvision only opens those with the published MD5.
    """
    maker = _cifar_class(name)
    if download and not (root / maker.base_folder).exists():
        for _ in stream_cifar(name):
            pass
    file = root / maker.filename
    archive = folder is None and file.exists()
    if archive and hashlib.md5(file.read_bytes()).hexdigest() != maker.tgz_md5:
        raise IntrafusionError(f"{file} is damaged: its checksum is wrong; delete it and download it again (--download)")
    if folder is not None:
        maker = type(maker.__name__, (maker,), {"base_folder": folder})
    try:  # torchvision checks the archive's MD5 and unpacks it
        raw = maker(str(root), train=split == "train", download=archive)
    except (RuntimeError, OSError) as error:
        raise IntrafusionError(
            f"no usable {name} in {root} ({one_line(error)}); pass path= (--data-path) with an "
            f".npz file or torchvision's folder, or download=True (--download); offline, use the embedded digits"
        ) from error
    return _pack(name, split, raw.data, np.array(raw.targets), tuple(raw.classes))


def read_kept(split: str, path: Path) -> ImageData:
    """Read a split of a kept .npz, which needs no conversion any more."""
    return _npz(OWN, split, path, _KEPT_AS)


def _npz(name: str, split: str, path: Path, reading: Reading | None) -> ImageData:
    """Load a split of an .npz, checking that its labels are classes of the dataset."""
    found = read_arrays(path, split, None if name == OWN else (1, 3), reading)
    labels, last = found.labels, int(found.labels.max())
    if labels.min() < 0:
        raise IntrafusionError(f"{path}: labels range from {labels.min()} to {last}; number the classes from 0")
    classes = found.classes or _class_names(name, max(last + 1, found.columns))
    if last >= len(classes):
        raise IntrafusionError(f"{path}: labels range from {labels.min()} to {last}, but {name} has {len(classes)} classes")
    if found.columns and found.columns != len(classes):
        raise IntrafusionError(f"{path}: one-hot labels have {found.columns} columns, but {name} has {len(classes)} classes")
    return _pack(name, split, found.images, labels, classes, found.notes)


def _class_names(name: str, count: int) -> tuple[str, ...]:
    if name == "cifar10":
        return CIFAR10_CLASSES
    if name == "cifar100":
        return tuple(str(i) for i in range(100))
    return tuple(imagenet_categories()) if name.startswith("imagenet") else tuple(str(i) for i in range(count))
