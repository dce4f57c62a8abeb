"""Reading of weights files: those of safetensors here, those of torch.save by `safe_unpickling`."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from intrafusion.errors import IntrafusionError, one_line, shown
from intrafusion.models.safe_unpickling import HEADER, advice_on, unpickled

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".bin", ".tar")
_MOST_DIMENSIONS, _MOST_TENSORS = 8, 20_000


def read_weights_file(path: Path) -> Any:
    """Read the content of a weights file, with tensors as they were saved. Nothing in the file is executed.

    Raises IntrafusionError if the file is missing, damaged, of another type, or would run code.
    """
    if not os.path.isfile(path):
        raise IntrafusionError(f"no file at {path}; check the path, or leave weights out for the embedded model")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise IntrafusionError(f"{path} is not a weights file: it must end in {', '.join(SUFFIXES)}")
    try:
        return _safetensors(path) if suffix == ".safetensors" else unpickled(path)
    except IntrafusionError:
        raise
    except Exception as error:  # damaged files fail in many ways, in three libraries
        if isinstance(error, MemoryError):
            raise
        raise IntrafusionError(f"cannot read weights from {path}: {advice_on(path) or one_line(error)}") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    _check_header(path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def _check_header(path: Path) -> None:
    """Raise if the header is too long, or if the tensors are too many, have too many dimensions or overlap."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(HEADER, path.stat().st_size - 8):
            raise IntrafusionError(
                f"cannot read weights from {path}: its header of {size:,} bytes is larger than the file or the limit of "
                f"{HEADER:,} bytes"
            )
        about = dict(json.loads(file.read(size), object_pairs_hook=_once))
    about.pop("__metadata__", None)
    check_tensor_count(len(about), path)
    if odd := next((name for name, entry in about.items() if not _is_described(entry)), None):
        raise ValueError(f"its header has no valid shape and offsets for {shown(odd)}; save it again with safetensors")
    end = 0
    for begin, after, name in sorted((*entry["data_offsets"], name) for name, entry in about.items()):
        check_dimensions(len(about[name]["shape"]), name, path)
        if begin != end or after < begin:
            raise ValueError(f"{shown(name)} begins at byte {begin:,}, but the tensor before it ends at {end:,}")
        end = after


def _is_described(entry: Any) -> bool:
    """Return whether a header entry has a dtype, an integer shape and two integer offsets."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(place, list) or len(place) != 2:
        return False
    return all(type(number) is int for number in (*shape, *place))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) < len(pairs):
        raise ValueError("its header has a duplicate name")
    return made


def check_tensor_count(count: int, path: Path) -> None:
    """Raise IntrafusionError if a file holds more tensors than the limit."""
    if count > _MOST_TENSORS:
        raise IntrafusionError(f"{path} has {count:,} tensors; the limit is {_MOST_TENSORS:,}")


def check_dimensions(count: int, name: str, path: Path) -> None:
    """Raise IntrafusionError if a tensor has more dimensions than the limit."""
    if count > _MOST_DIMENSIONS:
        raise IntrafusionError(f"{name} in {path} has {count:,} dimensions; the limit is {_MOST_DIMENSIONS}")
