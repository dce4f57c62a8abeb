"""Reading of weights files as written by training scripts, without running their code, and the state dicts in them.

Such files also hold settings, counters and paths. Objects of types known to be such data are skipped: a `Beside` replaces each
of them, and the modules that define them are not imported. Any other type is refused by name.
"""

import io
import json
import os
import pickle
import pickletools
import re
import threading
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intrafusion.errors import IntrafusionError, one_line, shown
from intrafusion.runtime import safe_zip

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".bin", ".tar")
PREFIXES = ("module", "model", "net", "network", "_orig_mod", "backbone")  # wrappers add these before keys or inside them
_PLAIN = (
    "state_dict", "model_state_dict", "model_state", "net_state_dict", "model", "net", "network", "module", "weights",
    "params", "student",
)  # fmt: skip
AVERAGED = (
    "model_ema", "ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "model_state_dict_ema",
    "ema_state", "params_ema", "averaged_model", "teacher",
)  # fmt: skip
WRAPPERS = (*_PLAIN, *AVERAGED)  # keys under which files store a state dict, in order of preference
_DEEP = 4  # maximum nesting of wrappers
_MOST_DIMENSIONS, _MOST_TENSORS, _MOST_TABLES = 8, 20_000, 100
_HEADER = 8 << 20  # maximum bytes of a file besides its tensors
_LONGEST = 100_000  # maximum values of a tuple, including its nested tuples
_MOST_STEPS = 1_000_000  # maximum operations in a file's pickles; a tensor takes some tens
_MOST_KEYS, _WIDE = 10_000, 53  # limit on non-string keys, whose hashes a file can choose; integers of more bits count too
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING")
_TEXT = -1  # marks a string on the stack, in place of a size
_TAKES_MARKED = ("APPENDS", "SETITEMS")
_MAKES = {
    "REDUCE": 2,
    "NEWOBJ": 2,
    "BINPERSID": 1,
}  # pickle operations that push one value, and how many values each pops
_TAKES = {"APPEND": 1, "SETITEM": 2, "BUILD": 1} | _MAKES  # plus those that push none

# Types that may appear beside weights. They are never imported: objects with these type names are skipped silently.
_TABLES = ("collections.defaultdict", "easydict.EasyDict", "munch.Munch", "addict.addict.Dict")  # dict subclasses
_TABLE_ENDS = (".CfgNode", ".AttributeDict", ".ConfigDict")
_LISTS = ("collections.deque",)
_OBJECTS = {
    "argparse.Namespace", "types.SimpleNamespace", "functools.partial", "typing.Any", "uuid.UUID", "decimal.Decimal",
    "torch.torch_version.TorchVersion", "numpy.dtype", "numpy.ndarray",
    *(f"builtins.{name}" for name in (
        "dict", "list", "tuple", "frozenset", "int", "float", "bool", "str", "bytes", "slice", "range", "object",
    )),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"pathlib.{pure}{name}Path" for pure in ("", "Pure") for name in ("", "Posix", "Windows")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{name}" for name in ("float16", "float32", "float64", "int32", "int64", "uint8", "bool_")),
}  # fmt: skip
_CONFIGS = (  # packages whose classes hold settings, schedules and counters; their layer modules are refused
    "omegaconf.", "yacs.", "fvcore.common.", "detectron2.config.", "ml_collections.", "hydra.", "mmcv.utils.config",
    "mmengine.config.", "mmengine.logging.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "fairseq.dataclass.",
    "fairseq.meters.", "torch.optim.", "transformers.trainer_", "transformers.training_args.",
)  # fmt: skip
_listing = threading.Lock()  # PyTorch's list of safe types is shared by the whole process


class Beside:
    """Placeholder for an object stored beside weights: accepts what a pickle passes to it and ignores it."""

    of = ""  # type name of the replaced object

    def __new__(cls, *args: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Table(Beside):
    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


class _List(Beside):
    def __new__(cls, *args: Any) -> Any:
        return []


@dataclass
class _Seen:
    """Statistics of a file's pickles: the names that they look up, and counts of operations and of non-string keys."""

    path: Path
    names: set[str] = field(default_factory=set)
    steps: int = 0
    keys: int = 0

    def step(self, argument: Any) -> None:
        """Count an operation. A large integer argument also counts as a non-string key."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise _crowded(self.path, f"{_MOST_STEPS:,} values")
        if isinstance(argument, int) and argument.bit_length() > _WIDE:
            self.key(1)

    def key(self, count: int) -> None:
        self.keys += count
        if self.keys > _MOST_KEYS:
            raise IntrafusionError(
                f"{self.path} has dicts with more than {_MOST_KEYS:,} keys that are not strings; save only model.state_dict()"
            )


def read(path: Path) -> Any:
    """Read the content of a weights file, with tensors as they were saved. Nothing in the file is executed.

    Raises IntrafusionError if the file is missing, damaged, of another type, or would run code.
    """
    if not os.path.isfile(path):
        raise IntrafusionError(f"no file at {path}; check the path, or leave weights out for the embedded model")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise IntrafusionError(f"{path} is not a weights file: it must end in {', '.join(SUFFIXES)}")
    try:
        return _safetensors(path) if suffix == ".safetensors" else _unpickled(path)
    except IntrafusionError:
        raise
    except Exception as error:  # damaged files fail in many ways, in three libraries
        if isinstance(error, MemoryError):
            raise
        raise IntrafusionError(f"cannot read weights from {path}: {_advice(path) or one_line(error)}") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    _check_header(path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def _check_header(path: Path) -> None:
    """Raise if the header is too long, or if the tensors are too many, have too many dimensions or overlap."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(_HEADER, path.stat().st_size - 8):
            raise IntrafusionError(
                f"cannot read weights from {path}: its header of {size:,} bytes is larger than the file or the limit of "
                f"{_HEADER:,} bytes"
            )
        about = dict(json.loads(file.read(size), object_pairs_hook=_once))
    about.pop("__metadata__", None)
    check_count(len(about), path)
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


def check_count(count: int, path: Path) -> None:
    """Raise IntrafusionError if a file holds more tensors than the limit."""
    if count > _MOST_TENSORS:
        raise IntrafusionError(f"{path} has {count:,} tensors; the limit is {_MOST_TENSORS:,}")


def check_dimensions(count: int, name: str, path: Path) -> None:
    """Raise IntrafusionError if a tensor has more dimensions than the limit."""
    if count > _MOST_DIMENSIONS:
        raise IntrafusionError(f"{name} in {path} has {count:,} dimensions; the limit is {_MOST_DIMENSIONS}")


def _unpickled(path: Path) -> Any:
    seen = _Seen(path)
    names = seen.names
    try:
        _look(path, seen)
        try:
            return _loaded(path)
        except pickle.UnpicklingError:
            stands = {name: stand for name in names if (stand := _stand_in(name)) is not None}
            if not stands:
                raise
        with _listing, torch.serialization.safe_globals([(stand, name) for name, stand in stands.items()]):
            return _loaded(path)
    except pickle.UnpicklingError as error:
        raise _refused(path, error, names) from error


def _loaded(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for pickles that are refused below
        return torch.load(path, map_location="cpu", weights_only=True)


def _stand_in(name: str) -> Any:
    """Return a placeholder class for a type that may appear beside weights, or None for any other type."""
    last = name.rpartition(".")[2]
    known = name.startswith(_CONFIGS) and last[:1].isupper()
    if name in _TABLES or (name.endswith(_TABLE_ENDS) and known):
        base = _Table
    elif name in _LISTS:
        base = _List
    elif name in _OBJECTS or known:
        base = Beside
    else:
        return None
    return type(last, (base,), {"of": name})


def _look(path: Path, seen: _Seen) -> None:
    """Scan the pickles of a torch.save file before any name in them is looked up.

    Record their names and counts in `seen`. Raises an error for pickles that are damaged, too long, or too large for their
    length.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"
        file.seek(0)
        for _ in range(0 if is_zip else 5):  # the older format: magic number, version, machine, content, keys
            if not file.peek(1):
                break
            _follow(file, seen)
    if not is_zip:
        return
    with safe_zip.opened(path) as (archive, infos):
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED:
                packed = "it is compressed, unlike files of torch.save; save it again with torch.save"
                raise IntrafusionError(f"cannot read weights from {path}: {_advice(path) or packed}")
            if info.filename.endswith("/data.pkl"):
                if info.file_size > _HEADER:
                    raise _crowded(path, f"{_HEADER:,} bytes")
                _follow(io.BytesIO(archive.read(info)), seen)


def _crowded(path: Path, what: str) -> IntrafusionError:
    return IntrafusionError(f"{path} has more than {what} besides its tensors; save only its state dict")


def _follow(stream: Any, seen: _Seen) -> None:
    """Scan one pickle without creating any object.

    Record the names that it looks up and count its non-string keys. Limit the size of its tuples, because hashing a tuple key
    reads all of the tuple.
    """
    path = seen.path
    stack, marks, memo, begin = list[int](), list[int](), dict[Any, int](), stream.tell()
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            kind = operation.name
            seen.step(argument)
            if not count % 1000 and stream.tell() - begin > _HEADER:
                raise _crowded(path, f"{_HEADER:,} bytes")
            if kind == "GLOBAL":
                module, _, name = str(argument).partition(" ")
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                seen.names.add(f"{module}.{name}")
            if kind == "MARK":
                marks.append(len(stack))
            elif kind.startswith("TUPLE"):
                first = marks.pop() if kind == "TUPLE" else len(stack) - int(kind[-1])
                stack[first:] = [1 + sum(map(abs, stack[first:]))]
                if stack[-1] > _LONGEST:
                    raise IntrafusionError(f"{path} has tuples nested too deeply; save only model.state_dict()")
            elif kind.endswith("PUT"):
                memo[argument] = stack[-1]
            elif kind.endswith("GET"):
                stack.append(memo[argument])
            elif kind in _TAKES_MARKED:
                taken = marks.pop()
                if kind == "SETITEMS":
                    seen.key(sum(key != _TEXT for key in stack[taken::2]))
                del stack[taken:]
            elif kind in _TAKES:
                if kind == "SETITEM":
                    seen.key(stack[-2] != _TEXT)
                del stack[len(stack) - _TAKES[kind] :]
                stack.extend([1] if kind in _MAKES else ())
            elif kind not in ("PROTO", "STOP"):
                stack.append(_TEXT if kind in _TEXTS else 1)
    except (ValueError, IndexError, KeyError, UnicodeError, EOFError) as error:
        if isinstance(error, IntrafusionError):
            raise
        if told := _advice(path):
            raise ValueError(told) from error
        raise pickle.UnpicklingError("Unsupported operand") from error


def _refused(path: Path, error: Exception, names: set[str]) -> IntrafusionError:
    """Return an error that says why a pickle was refused, naming what it wanted to run."""
    layers = [name for name in names if re.match(r"torch\.nn\.(modules\.(?!loss)|parallel\.)", name)]
    if layers:
        return IntrafusionError(
            f"cannot load {path} safely: it is a whole pickled network (it names {min(layers)}), which would run code; "
            "load it where its code is, and save only its weights: torch.save(model.state_dict(), ...)"
        )
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return IntrafusionError(f"cannot load {path} safely: it would run {found[1]}; save only model.state_dict()")
    if "Unsupported operand" in str(error):
        return IntrafusionError(
            f"cannot load {path} safely: it is damaged, from another program, or written with a pickle_protocol other than "
            "torch.save's default; save a plain state dict"
        )
    return IntrafusionError(f"cannot load {path} safely: it is damaged, or would run code; save a plain state dict")


def _advice(path: Path) -> str:
    """Return advice for a file that PyTorch may read but not safely, or "" for any other."""
    with open(path, "rb") as file:
        start = file.read(512)
    if start[257:262] == b"ustar":
        return "it is a tar archive; if an old PyTorch can load it, save its state dict with a new one"
    if zipfile.is_zipfile(path):
        with safe_zip.opened(path) as (_, infos):
            names = [info.filename for info in infos]
            if not any(name.endswith("/data.pkl") for name in names):
                return "it is a zip archive that torch.save did not write; unpack it first"
            if any(name.endswith("/constants.pkl") for name in names):
                return "it is a scripted network; save only its weights: torch.save(torch.jit.load(FILE).state_dict(), ...)"
    return ""


def state_dicts(content: Any, path: Path, key: str | None = None) -> dict[str, dict[str, Any]]:
    """Find the state dicts in a file's content, most likely first.

    The keys of the result are locations in the file ("" for the whole content). Values that are not tensors are included.
    key: search only here, such as "model_ema" or "model.state_dict"; it may also be a key prefix.
    Raises IntrafusionError if nothing is found.
    """
    if isinstance(content, Beside):
        raise IntrafusionError(f"{path} contains a {content.of}, not a state dict (names to tensors)")
    found = dict(_found(content))
    if key is not None:
        chosen = _at(content, key)
        known = [name for name in found if name]
        if chosen is None:
            raise IntrafusionError(
                f"{path} has no weights under {shown(key)}; "
                + (f"choose one of {', '.join(known)}" if known else "it has one state dict, which needs no key")
            )
        found = dict(_found(chosen, key))
    if len(found) > _MOST_TABLES:
        raise IntrafusionError(f"{path} has {len(found):,} state dicts; the limit is {_MOST_TABLES}; save only the one to use")
    if not found:
        holds = ", ".join(map(_text, list(content)[:6])) if isinstance(content, dict) else ""
        if _has_arrays(content):
            holds += "; NumPy arrays are not supported; save them as tensors"
        raise IntrafusionError(f"{path} has no state dict (names to tensors)" + (f", only {holds}" if holds else ""))
    return found


def _has_arrays(content: Any, depth: int = 0, seen: set[int] | None = None) -> bool:
    seen = set() if seen is None else seen
    if isinstance(content, dict) and depth <= _DEEP and id(content) not in seen:
        seen.add(id(content))
        return any(_has_arrays(value, depth + 1, seen) for value in dict.values(content))
    return isinstance(content, Beside) and content.of.endswith("._reconstruct")


def _found(
    content: Any, place: str = "", depth: int = 0, seen: list[int] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (location, state dict) pairs: wrapped tables, or else the whole table and then its parts by key prefix.

    The depth of nesting and the number of tables are limited.
    """
    seen = [] if seen is None else seen
    if not isinstance(content, dict) or depth > _DEEP or len(seen) > 10 * _MOST_TABLES:
        return
    seen.append(depth)
    table = {_text(key): value for key, value in dict.items(content)}  # dict.items, because a file may override .items
    within = [one for name in WRAPPERS for one in _found(table.get(name), _joined(place, name), depth + 1, seen)]
    if within:
        yield from within
    elif any(isinstance(value, Tensor) for value in table.values()):
        yield place, table
        for name in dict.fromkeys((*WRAPPERS, *PREFIXES)):
            if part := _below(table, name):
                yield _joined(place, name), part


def _at(content: Any, key: str) -> Any:
    """Return the content under a key: a nested table, or the part of a table with that key prefix. None if there is none."""
    if not isinstance(content, dict):
        return None
    table = {_text(name): value for name, value in dict.items(content)}
    if isinstance(table.get(key), dict):
        return table[key]
    for name, value in table.items():
        if key.startswith(f"{name}.") and (found := _at(value, key[len(name) + 1 :])) is not None:
            return found
    return _below(table, key) or None


def _below(table: dict[str, Any], name: str) -> dict[str, Any]:
    return {key[len(name) + 1 :]: value for key, value in table.items() if key.startswith(f"{name}.")}


def _text(key: Any) -> str:
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else shown(key) if not isinstance(key, str) else key


def _joined(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
