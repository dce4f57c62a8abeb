"""Reader of `torch.export` archives (.pt2) that avoids PyTorch's own loader, which unpickles and evaluates their content.

The archive is a zip of JSON (the graph, the signature, the location of each tensor) and raw bytes (the tensors). Nothing else
is read. The sample inputs, which are a pickle, are ignored; code, custom objects and pickled tensors are refused.
"""

import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.description import is_path
from intrafusion.models.exported_program.shapes import RANK
from intrafusion.runtime.safe_zip import MIB, check_size, open_zip

_JSON, _TENSORS = 16 * MIB, 512 * MIB  # limits in bytes: one JSON file; all tensors together
_FILES = re.compile(
    r"models/model\.json|data/(weights|constants)/(weight|tensor)_\d+|data/(weights|constants)/model_(weights|constants)_config\.json|"
    r"data/sample_inputs/model\.pt|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)|extra/.*"
)
_DTYPES = {  # torch._export.serde.schema.ScalarType
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 7: torch.float32, 12: torch.bool,
}  # fmt: skip
_SCHEMA = 8  # major version of the graph's format


@dataclass(frozen=True)
class ProgramFile:
    """Content of a program file. graph: its nodes, inputs and outputs as JSON. signature: the kind of each input.

    tensors: parameters, buffers and constants by their dotted names.
    """

    graph: Mapping[str, Any]
    signature: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_archive(path: Path) -> ProgramFile:
    """Read the content of a .pt2 file. Nothing in it is run or unpickled.

    Raises IntrafusionError if the file breaks a rule or is invalid.
    """
    check_size(path)
    with open_zip(path) as (archive, infos):
        files = _files(path, infos)
        about = _json(archive, files, "models/model.json")
        try:
            module, version = about["graph_module"], about["schema_version"]["major"]
            if version != _SCHEMA:
                raise IntrafusionError(
                    f"{path} has format {version!r}, but {_SCHEMA} is required; export it with torch 2.11 or 2.13"
                )
            return ProgramFile(module["graph"], module["signature"], _tensors(archive, files))
        except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            raise IntrafusionError(f"{path} is damaged (an error in its description); export the network again") from error


def _files(path: Path, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Return the archive's files by their names below its single root folder."""
    files = {info.filename.partition("/")[2]: info for info in infos}
    roots = {info.filename.partition("/")[0] for info in infos}
    if len(roots) != 1 or "models/model.json" not in files:
        raise IntrafusionError(f"{path} was not saved by torch.export.save: it has no models/model.json")
    for name in files:
        if name.startswith("data/aotinductor"):
            raise IntrafusionError(f"{path} contains compiled code ({name[:80]}); save it uncompiled with torch.export.save")
        if not _FILES.fullmatch(name):
            raise IntrafusionError(f"{path} contains {name[:80]!r}, which torch.export.save does not write")
    return files


def _json(archive: zipfile.ZipFile, files: Mapping[str, zipfile.ZipInfo], name: str) -> Any:
    if files[name].file_size > _JSON:
        raise IntrafusionError(f"{archive.filename}: {name} is larger than {_JSON // MIB} MiB")
    try:
        return json.loads(archive.read(files[name]))
    except (ValueError, RecursionError) as error:
        raise IntrafusionError(f"{archive.filename}: {name} is not JSON") from error


def _tensors(archive: zipfile.ZipFile, files: Mapping[str, zipfile.ZipInfo]) -> dict[str, Tensor]:
    """Read the weights and constants by name, after checking that their total size is within the limit."""
    about: dict[str, _Layout] = {}
    places: dict[str, list[str]] = {}
    total = 0
    for kind in ("weights", "constants"):
        listed = f"data/{kind}/model_{kind}_config.json"
        if listed not in files:
            raise IntrafusionError(f"{archive.filename} has no {listed}; export it with torch 2.11 or later")
        for name, meta in _json(archive, files, listed)["config"].items():
            place = _place(archive, files, kind, name, meta)
            about[name] = _Layout.read(f"{archive.filename}: {name}", meta["tensor_meta"])
            total += about[name].count * about[name].kind.itemsize + (files[place].file_size if place not in places else 0)
            places.setdefault(place, []).append(name)
            if total > 2 * _TENSORS:  # the files plus the tensors made from them
                raise IntrafusionError(f"the tensors in {archive.filename} are larger than {_TENSORS // MIB} MiB")
    found: dict[str, Tensor] = {}
    for place, names in places.items():  # a file with several names is read only once
        content = bytearray(archive.read(files[place]))
        found |= {name: about[name].tensor(content) for name in names}
    return found


def _place(
    archive: zipfile.ZipFile, files: Mapping[str, zipfile.ZipInfo], kind: str, name: str, about: Mapping[str, Any]
) -> str:
    """Return the file of a tensor in the archive."""
    place = f"data/{kind}/{about['path_name']}"
    plain = re.fullmatch(r"(weight|tensor)_\d+", about["path_name"]) and about["tensor_meta"]
    if about.get("use_pickle") or not plain:
        raise IntrafusionError(f"{archive.filename} contains {name[:80]!r} as a pickle or custom object, which could run code")
    if not is_path(name):
        raise IntrafusionError(
            f"{archive.filename} has a tensor with the invalid name {name[:80]!r}; use letters, digits, _, - and dots"
        )
    if place not in files:
        raise IntrafusionError(f"{archive.filename} has no tensor {name} ({place})")
    return place


@dataclass(frozen=True)
class _Layout:
    """Layout of a tensor in its bytes."""

    what: str
    kind: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    @classmethod
    def read(cls, what: str, about: Mapping[str, Any]) -> "_Layout":
        """Parse a layout. Raises IntrafusionError if no tensor can have it."""
        kind = _DTYPES.get(about["dtype"])
        if kind is None:
            raise IntrafusionError(f"{what} has dtype number {about['dtype']}; export the network in float32")
        if len(about["sizes"]) > RANK:
            raise IntrafusionError(f"{what} has {len(about['sizes']):,} dimensions; the limit is {RANK}")
        sizes, strides = (tuple(one["as_int"] for one in about[key]) for key in ("sizes", "strides"))
        start = about["storage_offset"]["as_int"]
        numbers = [*sizes, *strides, start]
        if not all(type(n) is int and 0 <= n < 1 << 40 for n in numbers) or len(sizes) != len(strides) or about["layout"] != 7:
            raise IntrafusionError(f"{what} has the invalid shape {str(sizes)[:80]}")
        return cls(what, kind, sizes, strides, start)

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    def tensor(self, content: bytearray) -> Tensor:
        """Build the tensor from its bytes. Raises IntrafusionError if shape, strides and bytes do not agree."""
        item = self.kind.itemsize
        if len(content) % item or self.count * item > len(content):
            raise IntrafusionError(f"{self.what} is damaged: it has shape {self.sizes} but {len(content):,} bytes")
        if not self.count:
            return torch.empty(self.sizes, dtype=self.kind)
        last = self.start + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        if last >= len(content) // item:
            raise IntrafusionError(f"{self.what} is damaged: it extends past its {len(content):,} bytes")
        flat = torch.frombuffer(content, dtype=self.kind)
        tensor = flat.as_strided(self.sizes, self.strides, self.start).clone(memory_format=torch.contiguous_format)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise IntrafusionError(f"{self.what} has NaN or infinite values; it is damaged, or training diverged")
        return tensor
