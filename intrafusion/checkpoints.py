"""Files of weights as training scripts leave them: read without running anything in them, and the state dicts in them.

Beside the weights such files hold settings, counters and paths. Objects of types that are known to be such data are passed
over: `Beside` stands for them, and nothing of their own modules is imported. Any other type is refused by its name.
"""

import os
import pickle
import pickletools
import re
import tarfile
import threading
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intrafusion.errors import IntrafusionError, one_line, shown

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".bin", ".tar")
PREFIXES = ("module", "model", "net", "network", "_orig_mod", "backbone")  # that wrappers put before keys, or into them
_PLAIN = (
    "state_dict", "model_state_dict", "model_state", "net_state_dict", "model", "net", "network", "module", "weights",
    "params", "student",
)  # fmt: skip
AVERAGED = (
    "model_ema", "ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "model_state_dict_ema",
    "ema_state", "params_ema", "averaged_model", "teacher",
)  # fmt: skip
WRAPPERS = (*_PLAIN, *AVERAGED)  # under which files keep a state dict; those before others are preferred
_DEEP = 4  # wrappers within wrappers
_MOST_DIMENSIONS = 16

# What may stand beside weights. Nothing of these names is looked up: they say what is passed over without a word.
_TABLES = ("collections.defaultdict", "easydict.EasyDict", "munch.Munch", "addict.addict.Dict")  # subclasses of dict
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
_CONFIGS = (  # packages whose classes hold settings, schedules and counters; their modules of layers are refused
    "omegaconf.", "yacs.", "fvcore.common.", "detectron2.config.", "ml_collections.", "hydra.", "mmcv.utils.config",
    "mmengine.config.", "mmengine.logging.", "pytorch_lightning.", "lightning.", "lightning_fabric.", "fairseq.dataclass.",
    "fairseq.meters.", "torch.optim.", "transformers.trainer_", "transformers.training_args.",
)  # fmt: skip
_listing = threading.Lock()  # PyTorch's list of safe types is the whole process's


class Beside:
    """In place of an object that stands beside weights: takes what a pickle gives it and does nothing with it."""

    of = ""  # the name of its type

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


def read(path: Path) -> Any:
    """What a weights file holds, tensors as they were saved; nothing in it is run.

    Raises IntrafusionError for a missing or damaged file, one of another kind, or one that would run code.
    """
    if not os.path.isfile(path):
        raise IntrafusionError(
            f"no weights file at {path}: check the path, or leave weights out for the embedded model"
        )
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise IntrafusionError(f"{path} is no weights file: it must end in {', '.join(SUFFIXES)}")
    try:
        return _safetensors(path) if suffix == ".safetensors" else _unpickled(path)
    except IntrafusionError:
        raise
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except Exception as error:  # damaged files fail in many ways, in three libraries
        if isinstance(error, MemoryError):
            raise
        raise IntrafusionError(f"{path} cannot be read as weights: {_advice(path) or one_line(error)}") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            if (count := len(file.get_slice(name).get_shape())) > _MOST_DIMENSIONS:
                raise IntrafusionError(
                    f"{path} holds {name} of {count:,} dimensions, and at most {_MOST_DIMENSIONS} are taken"
                )
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _unpickled(path: Path) -> Any:
    try:
        return _loaded(path)
    except pickle.UnpicklingError:
        names = {name: stand for name in _globals(path) if (stand := _stand_in(name)) is not None}
        if not names:
            raise
    with _listing, torch.serialization.safe_globals([(stand, name) for name, stand in names.items()]):
        return _loaded(path)


def _loaded(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickles that are refused below
        return torch.load(path, map_location="cpu", weights_only=True)


def _stand_in(name: str) -> Any:
    """A class to take the place of a type that may stand beside weights; None for any other type."""
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


def _globals(path: Path) -> set[str]:
    """The names of what a file of torch.save wants to look up, as far as it can be read."""
    names: set[str] = set()
    with open(path, "rb") as file:
        try:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    inner = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                    with archive.open(inner) as stream:
                        names.update(_named(stream))
            else:  # the older format: magic number, version, machine, content
                file.seek(0)
                for _ in range(4):
                    names.update(_named(file))
        except Exception:  # damaged in any way: what it is refused for is said by who reads it
            return names
    return names


def _named(stream: Any) -> Iterator[str]:
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            yield f"{module}.{name}"


def _refused(path: Path, error: Exception) -> IntrafusionError:
    """Why a pickle was refused: by the name of what it wanted to run."""
    layers = [name for name in _globals(path) if re.match(r"torch\.nn\.(modules\.(?!loss)|parallel\.)", name)]
    if layers:
        return IntrafusionError(
            f"{path} cannot be loaded safely: it is a whole pickled network (it names {min(layers)}), which would run code; "
            "where its code is, torch.save(model.state_dict(), ...) writes its weights alone"
        )
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return IntrafusionError(
            f"{path} cannot be loaded safely: it wants to run {found[1]}, and nothing in a file is run; "
            "save model.state_dict() alone"
        )
    if "Unsupported operand" in str(error):
        return IntrafusionError(
            f"{path} cannot be loaded safely: it is damaged, of another program, or written with a pickle_protocol that is not "
            "torch.save's own; save it as a plain state dict"
        )
    return IntrafusionError(
        f"{path} cannot be loaded safely (it is damaged, or wants to run code): save it as a plain state dict"
    )


def _advice(path: Path) -> str:
    """What to do with a file that PyTorch reads, but not safely; "" for any other."""
    if tarfile.is_tarfile(path):
        return "it is a tar archive; if torch.load of an old PyTorch opens it, save its state dict with a new one"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.endswith("/data.pkl") for name in names):
                return "it is a zip archive that torch.save did not write: unpack it first"
            if any(name.endswith("/constants.pkl") for name in names):
                return "it is a scripted network; torch.save(torch.jit.load(FILE).state_dict(), ...) writes its weights alone"
    return ""


def state_dicts(content: Any, path: Path, key: str | None = None) -> dict[str, dict[str, Any]]:
    """The state dicts in what a file holds, by where they are in it ("" for all of it), the likeliest first.

    key: where to look alone, as "model_ema" or "model.state_dict"; the beginning of keys, too. Values that are no tensors
    are there, too. Raises IntrafusionError where there is none.
    """
    if isinstance(content, Beside):
        raise IntrafusionError(f"{path} holds no state dict (names to tensors) but a {content.of}")
    found = dict(_found(content))
    if key is not None:
        chosen = _at(content, key)
        known = [name for name in found if name]
        if chosen is None:
            raise IntrafusionError(
                f"{path} holds no weights under {shown(key)}: "
                + (f"choose one of {', '.join(known)}" if known else "it holds one state dict, which needs no key")
            )
        found = dict(_found(chosen, key))
    if not found:
        holds = ", ".join(map(_text, list(content)[:6])) if isinstance(content, dict) else ""
        if _has_arrays(content):
            holds += "; its NumPy arrays are not read, so save them as tensors"
        raise IntrafusionError(
            f"{path} holds no state dict (names to tensors)" + (f": it holds {holds}" if holds else "")
        )
    return found


def _has_arrays(content: Any, depth: int = 0) -> bool:
    if isinstance(content, dict) and depth <= _DEEP:
        return any(_has_arrays(value, depth + 1) for value in dict.values(content))
    return isinstance(content, Beside) and content.of.endswith("._reconstruct")


def _found(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is wrapped, else the whole; then what keys of the whole begin with."""
    if not isinstance(content, dict) or depth > _DEEP:
        return
    table = {_text(key): value for key, value in dict.items(content)}  # whatever a file hid behind its own .items
    within = [one for name in WRAPPERS for one in _found(table.get(name), _joined(place, name), depth + 1)]
    if within:
        yield from within
    elif any(isinstance(value, Tensor) for value in table.values()):
        yield place, table
        for name in dict.fromkeys((*WRAPPERS, *PREFIXES)):
            if part := _below(table, name):
                yield _joined(place, name), part


def _at(content: Any, key: str) -> Any:
    """What a file holds under a key, be it one of a table in a table or the beginning of keys; None where it holds nothing."""
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
