"""Reading of the files that torch.save writes in training scripts, without running their code.

Such files also hold settings, counters and paths. Objects of types known to be such data are skipped: a `Beside` replaces each
of them, and the modules that define them are not imported. Any other type is refused by name.
"""

import io
import pickle
import pickletools
import re
import threading
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from intrafusion.errors import IntrafusionError
from intrafusion.runtime import safe_zip

HEADER = 8 << 20  # maximum bytes of a file besides its tensors
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


def unpickled(path: Path) -> Any:
    """Read the content of a file of torch.save, with tensors as they were saved. Nothing in the file is executed.

    Raises IntrafusionError if the file is too large besides its tensors or would run code, and others if it is damaged.
    """
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
    with safe_zip.open_zip(path) as (archive, infos):
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED:
                packed = "it is compressed, unlike files of torch.save; save it again with torch.save"
                raise IntrafusionError(f"cannot read weights from {path}: {advice_on(path) or packed}")
            if info.filename.endswith("/data.pkl"):
                if info.file_size > HEADER:
                    raise _crowded(path, f"{HEADER:,} bytes")
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
            if not count % 1000 and stream.tell() - begin > HEADER:
                raise _crowded(path, f"{HEADER:,} bytes")
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
        if told := advice_on(path):
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


def advice_on(path: Path) -> str:
    """Return advice for a file that PyTorch may read but not safely, or "" for any other."""
    with open(path, "rb") as file:
        start = file.read(512)
    if start[257:262] == b"ustar":
        return "it is a tar archive; if an old PyTorch can load it, save its state dict with a new one"
    if zipfile.is_zipfile(path):
        with safe_zip.open_zip(path) as (_, infos):
            names = [info.filename for info in infos]
            if not any(name.endswith("/data.pkl") for name in names):
                return "it is a zip archive that torch.save did not write; unpack it first"
            if any(name.endswith("/constants.pkl") for name in names):
                return "it is a scripted network; save only its weights: torch.save(torch.jit.load(FILE).state_dict(), ...)"
    return ""
