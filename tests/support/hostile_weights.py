"""Weights files that are refused.

Each is (make, expected), with make(folder, sentinel) -> file; `expected` is a part of the error message.
"""

import argparse
import builtins
import functools
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import own_files as files
import torch
from own_files import Touch

from intrafusion.runtime.paths import ASSETS

Make = Callable[[Path, Path], Path]


class Call:
    """An object whose pickle calls a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


class Restored:
    """An object whose class makes a folder when its state is set during unpickling."""

    def __getstate__(self) -> dict[str, str]:
        return {"sentinel": self.sentinel}

    def __setstate__(self, state: dict[str, str]) -> None:
        os.mkdir(state["sentinel"])


def state(change: Callable[[dict[str, Any], str], None], suffix: str = ".safetensors") -> Make:
    """Make a valid state dict that `change` then modifies. change: gets the state dict and the name of its first weight."""

    def make(folder: Path, sentinel: Path) -> Path:
        whole: dict[str, Any] = files.mlp_state()
        change(whole, next(name for name in whole if name.endswith("weight")))
        return files.save_state(folder / f"w{suffix}", whole)

    return make


def beside(make: Callable[[Path, Path], Any]) -> Make:
    """Save valid weights in a wrapper, and beside them the object that `make` returns."""

    def write(folder: Path, sentinel: Path) -> Path:
        torch.save({"state_dict": files.mlp_state(), "args": make(folder, sentinel)}, folder / "w.pt")
        return folder / "w.pt"

    return write


def cast(kind: torch.dtype, suffix: str = ".safetensors") -> Make:
    return state(lambda whole, first: whole.update({first: whole[first].to(kind)}), suffix)


def whole(name: str, content: bytes) -> Make:
    def make(folder: Path, sentinel: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def cut(suffix: str, at: int) -> Make:
    """Make a valid file and keep its first `at` bytes or, if `at` is negative, all but the last `-at` bytes."""

    def make(folder: Path, sentinel: Path) -> Path:
        path = files.save_state(folder / f"w{suffix}", files.mlp_state())
        path.write_bytes(path.read_bytes()[:at])
        return path

    return make


def header(*tensors: tuple[str, Any, list[int], list[int]], raw: bytes | None = None, data: int = 64) -> Make:
    """Make a .safetensors file with a custom header of tensors (name, type, shape, offsets), or with the header `raw`."""
    about = {name: {"dtype": kind, "shape": shape, "data_offsets": place} for name, kind, shape, place in tensors}
    text = json.dumps(about).encode() if raw is None else raw
    return whole("w.safetensors", len(text).to_bytes(8, "little") + text + bytes(data))


def gadget(make: Callable[[Path, Path], Any], **options: Any) -> Make:
    """Save with torch.save a file whose pickle runs code."""

    def write(folder: Path, sentinel: Path) -> Path:
        torch.save({"0.weight": make(folder, sentinel)}, folder / "w.pt", **options)
        return folder / "w.pt"

    return write


def raw(protocol: int) -> Make:
    def make(folder: Path, sentinel: Path) -> Path:
        (folder / "w.pth").write_bytes(pickle.dumps({"0.weight": Touch(sentinel)}, protocol))
        return folder / "w.pth"

    return make


def _endless() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["model"] = made["state_dict"] = made
    return made


def _views(change: Callable[[int, torch.Tensor], dict[str, Any]], count: int) -> Make:
    """Save many tensors that share one storage of half a megabyte."""

    def make(folder: Path, sentinel: Path) -> Path:
        whole = torch.zeros(1 << 17)
        return files.save_state(
            folder / "w.pt", {name: value for number in range(count) for name, value in change(number, whole).items()}
        )

    return make


def _tuples(folder: Path, sentinel: Path) -> Path:
    """Make a pickle whose key is 60 nested tuples, each holding the next one twice: its hash takes exponential time."""
    content = b"\x80\x02}K\x01" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60))
    return files.pictures(folder / "w.pt", {"archive/data.pkl": content + b"K\x01s.", "archive/version": b"3\n"})


def _tables(folder: Path, sentinel: Path) -> Path:
    """Make nested dicts in which each dict occurs about a hundred times: there are a hundred million paths through them."""
    made: dict[str, Any] = {}
    for _ in range(4):
        made = dict.fromkeys(("state_dict", "model", "net", "ema", *map(str, range(100))), made)
    return files.save_state(folder / "w.pt", made)


def _packed(folder: Path, sentinel: Path) -> Path:
    source = files.save_state(folder / "x.pt", files.mlp_state())
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(folder / "w.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    source.unlink()
    return folder / "w.pt"


def _restored(folder: Path, sentinel: Path) -> Restored:
    made = Restored()
    made.sentinel = str(sentinel)
    return made


def _opcodes(folder: Path, sentinel: Path) -> Path:
    (folder / "w.th").write_bytes(f"cos\nmkdir\n(S'{sentinel}'\ntR.".encode())
    return folder / "w.th"


def _hub(folder: Path, sentinel: Path) -> Call:
    (folder / "hubconf.py").write_text(f"import os\nos.mkdir({str(sentinel)!r})\n")
    return Call(torch.hub._load_local, str(folder), "x")


def _load(folder: Path, sentinel: Path) -> Call:
    (folder / "other.pt").write_bytes(pickle.dumps(Touch(sentinel)))
    return Call(torch.load, str(folder / "other.pt"))


def _tar(folder: Path, sentinel: Path) -> Path:
    """Make a tar file in PyTorch's format before 0.1.10."""
    for name in ("sys_info", "pickle", "storages", "tensors"):
        (folder / name).write_bytes(pickle.dumps(Touch(sentinel)))
    with tarfile.open(folder / "w.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.add(folder / name, name)
            (folder / name).unlink()
    return folder / "w.pt"


def _zipped(folder: Path, sentinel: Path) -> Path:
    inner = files.pickled(folder / "inner.pt", sentinel).read_bytes()
    return files.pictures(folder / "w.pt", {"w.pt": inner})


def _data_pkl(folder: Path, sentinel: Path) -> Path:
    """Write PyTorch's zip format by hand."""
    content = pickle.dumps({"0.weight": Touch(sentinel)}, 2)
    return files.pictures(folder / "w.pt", {"archive/data.pkl": content, "archive/version": b"3\n"})


def _outside(folder: Path, sentinel: Path) -> Call:
    storage = torch.zeros(4).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    return Call(torch._utils._rebuild_tensor_v2, typed, 10**6, (10**6,), (1,), False, OrderedDict())


def _script(folder: Path, sentinel: Path) -> Path:
    torch.jit.script(files.network()).save(folder / "w.pt")
    return folder / "w.pt"


def _renamed(source: str, name: str) -> Make:
    def make(folder: Path, sentinel: Path) -> Path:
        return files.save_state(folder / f"s{source}", files.mlp_state()).rename(folder / name)

    return make


def _other(folder: Path, sentinel: Path) -> Path:
    return files.save_state(folder / "w.safetensors", files.read_state(ASSETS / "digits-vgg.safetensors"))


def _link(folder: Path, sentinel: Path) -> Path:
    (folder / "w.pt").symlink_to(files.pickled(folder / "behind.pt", sentinel))
    return folder / "w.pt"


def _fifo(folder: Path, sentinel: Path) -> Path:
    os.mkfifo(folder / "w.pt")
    return folder / "w.pt"


def _folder(folder: Path, sentinel: Path) -> Path:
    (folder / "w.pt").mkdir()
    return folder / "w.pt"


_PERIOD = 2**61 - 1  # period of the hash of integers
_UNSAFE, _UNREAD = "cannot load", "cannot read weights"
MORE_WEIGHTS: dict[str, tuple[Make, str]] = {
    "another architecture": (_other, "does not fit"),
    "no tensors at all": (lambda f, s: files.save_state(f / "w.pt", {}), "has no state dict"),
    "eight-bit weights": (cast(torch.int8), "is int8"),
    "whole numbers": (cast(torch.int64), "is int64"),
    "true and false": (cast(torch.bool), "is bool"),
    "complex weights": (cast(torch.complex64, ".pt"), "is complex64; save it as float32"),
    "floats of eight bits": (cast(torch.float8_e4m3fn), "is float8_e4m3fn"),
    "larger than float32": (state(lambda w, first: w.update({first: w[first].double() * 1e300})), "NaN or infinite"),
    "NaN in half precision": (state(lambda w, first: w.update({first: w[first].half() * float("nan")})), "NaN or infinite"),
    "NaN biases": (state(lambda w, first: w.update({"1.bias": torch.full((128,), float("nan"))})), "NaN or infinite"),
    "a namespace of code": (beside(lambda f, s: argparse.Namespace(x=Touch(s))), "would run posix.mkdir"),
    "a namespace whose class is code": (
        beside(lambda f, s: Call(getattr, argparse.Namespace, "__init__")), "would run getattr",
    ),
    "an array of code": (beside(lambda f, s: np.array([Touch(s)], dtype=object)), "would run posix.mkdir"),
    "a table that makes code": (beside(lambda f, s: defaultdict(os.getcwd)), "would run posix.getcwd"),
    "a table of code": (beside(lambda f, s: defaultdict(list, a=Touch(s))), "would run posix.mkdir"),
    "a queue of code": (beside(lambda f, s: deque([Touch(s)])), "would run posix.mkdir"),
    "part of a call": (beside(lambda f, s: functools.partial(os.mkdir, str(s))), "would run posix.mkdir"),
    "eval beside them": (beside(lambda f, s: Call(eval, f"__import__('os').mkdir({str(s)!r})")), "would run eval"),
    "NumPy's loader beside them": (
        beside(lambda f, s: Call(np.load, str(files.pickled(f / "x.npy", s)), None, True)), "would run numpy.load",
    ),
    "a state that is set beside them": (beside(_restored), "would run hostile_weights.Restored"),
    "a tensor that hides its size": (state(lambda w, first: vars(w[first]).update(numel=5), ".pt"), "overrides numel"),
    "a tensor that hides its kind": (
        state(lambda w, first: vars(w[first]).update(is_complex=5), ".pt"), "overrides is_complex"
    ),
    "views of one storage": (
        state(lambda w, first: w.update({f"{n}": w[first].half().flatten()[n:] for n in range(999)}), ".pt"), "",
    ),
    "half precision of one storage": (
        state(lambda w, first: w.update({f"{n}": v for n, v in enumerate([torch.zeros(1 << 17).half()] * 999)}), ".pt"),
        "share too much memory",
    ),
    "one tensor under many names": (_views(lambda n, w: {f"{n}": w}, 999), "share too much memory"),
    "masks of one storage": (_views(lambda n, w: {f"{n}_orig": w, f"{n}_mask": w}, 500), "share too much memory"),
    "tensors without end": (
        state(lambda w, first: w.update({f"{n}": w[first][:0] for n in range(20_001)}), ".pt"), "the limit is 20,000",
    ),
    "tensors without end in a header": (
        header(*((f"{n}", "F32", [0], [0, 0]) for n in range(20_001)), data=0), "the limit is 20,000",
    ),
    "a header of 9 MB": (header(raw=b" " * 9_000_000), "limit of 8,388,608 bytes"),
    "a name twice in a header": (
        header(raw=b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},"a":{"dtype":"F32","shape":[8],"data_offsets":[32,64]}}'),
        "a duplicate name",
    ),
    "nine dimensions": (state(lambda w, first: w.update({first: w[first][(None,) * 7]}), ".pt"), "has 9 dimensions"),
    "tuples without end": (_tuples, "nested too deeply"),
    "keys of one hash": (
        beside(lambda f, s: dict.fromkeys((_PERIOD * n for n in range(1, 6_000)), 0)), "keys that are not strings",
    ),
    "a list that becomes keys of one hash": (
        beside(lambda f, s: Call(set, [_PERIOD * n for n in range(1, 11_000)])), "keys that are not strings",
    ),
    "small numbers as keys": (beside(lambda f, s: dict.fromkeys(range(11_000), 0)), "keys that are not strings"),
    "values without end": (beside(lambda f, s: [None] * 1_100_000), "values besides its tensors"),
    "tables without end": (_tables, "has no state dict"),
    "more beside tensors than tensors": (beside(lambda f, s: list(map(str, range(10**6)))), "besides its tensors"),
    "the older format, more beside tensors": (
        lambda f, s: whole("w.pt", b"".join(pickle.dumps(x, 2) for x in (1, 1, {}, list(range(2 * 10**6)))))(f, s),
        "besides its tensors",
    ),
    "packed": (_packed, "is compressed"),
    "100,000 dimensions": (header(("0.weight", "F32", [1] * 100_000, [0, 4]), data=4), "100,000 dimensions"),
    "wrappers without an end": (lambda f, s: files.save_state(f / "w.pt", _endless()), "has no state dict"),
    "numpy arrays": (state(lambda w, first: w.update({first: np.ones(3)}), ".pt"), _UNSAFE),
    **{f"cut at {at}": (cut(".safetensors", at), _UNREAD) for at in (1, 7, 8, 60, 5000, -1)},
    **{f"a zip cut at {at}": (cut(".pt", at), "") for at in (1, 30, 5000, -1, -30)},
    "a shape of 10^18 numbers": (header(("0.weight", "F32", [10**9, 10**9], [0, 64])), _UNREAD),
    "a shape that overflows": (header(("0.weight", "F32", [2**40, 2**40], [0, 64])), _UNREAD),
    "a negative shape": (header(("0.weight", "F32", [-1, 4], [0, 16])), _UNREAD),
    "overlapping offsets": (header(("0.weight", "F32", [8], [0, 32]), ("0.bias", "F32", [8], [16, 48])), _UNREAD),
    "offsets past the end": (header(("0.weight", "F32", [16], [10**12, 10**12 + 64])), _UNREAD),
    "offsets backwards": (header(("0.weight", "F32", [16], [64, 0])), _UNREAD),
    "bytes of nobody": (header(("0.weight", "F32", [8], [0, 32])), _UNREAD),
    "an unknown type": (header(("0.weight", "Q7", [16], [0, 64])), _UNREAD),
    "a header that is no JSON": (header(raw=b"{" * 40), _UNREAD),
    "a deep header": (header(raw=b"[" * 10**6), _UNREAD),
    "a header of no text": (header(raw=b"\xff\xfe{}"), _UNREAD),
    **{
        f"a header whose {kind}": (header(raw=b'{"a":%s}' % entry), "no valid shape and offsets for 'a'")
        for kind, entry in {
            "tensor is a number": b"5",
            "tensor is a list": b"[[],[],[]]",
            "type is a number": b'{"dtype":4,"shape":[16],"data_offsets":[0,64]}',
            "shape is text": b'{"dtype":"F32","shape":"ab","data_offsets":[0,64]}',
            "shape has fractions": b'{"dtype":"F32","shape":[1.5],"data_offsets":[0,64]}',
            "places are text": b'{"dtype":"F32","shape":[16],"data_offsets":["0","64"]}',
            "places are of two kinds": b'{"dtype":"F32","shape":[16],"data_offsets":[0,"64"]}',
            "places are three": b'{"dtype":"F32","shape":[16],"data_offsets":[0,32,64]}',
            "places are missing": b'{"dtype":"F32","shape":[16]}',
        }.items()
    },
    "a header of nothing": (header(raw=b"{}", data=0), "has no state dict"),
    "os.system": (gadget(lambda f, s: Call(os.system, f"mkdir {s}")), _UNSAFE),
    "eval": (gadget(lambda f, s: Call(builtins.eval, f"__import__('os').mkdir({str(s)!r})")), _UNSAFE),
    "exec": (gadget(lambda f, s: Call(builtins.exec, f"import os; os.mkdir({str(s)!r})")), _UNSAFE),
    "torch.hub": (gadget(_hub), _UNSAFE),
    "torch.load within": (gadget(_load), _UNSAFE),
    "a state that is set": (gadget(_restored), _UNSAFE),
    "an array of objects": (gadget(lambda f, s: np.array([Touch(s)], dtype=object)), _UNSAFE),
    "the older format": (gadget(lambda f, s: Touch(s), _use_new_zipfile_serialization=False), _UNSAFE),
    "the oldest format, a tar": (_tar, ""),
    "another protocol of torch.save": (gadget(lambda f, s: Touch(s), pickle_protocol=4), _UNSAFE),
    **{f"a pickle of protocol {p}": (raw(p), _UNSAFE) for p in range(6)},
    "opcodes by hand": (_opcodes, _UNSAFE),
    "a zip by hand": (_data_pkl, _UNSAFE),
    "a pickle in a zip": (_zipped, ""),
    "a tensor past its storage": (gadget(_outside), ""),
    "a scripted module as weights": (_script, ""),
    "a pickle called safetensors": (_renamed(".pt", "w.safetensors"), _UNREAD),
    "safetensors called a pickle": (_renamed(".safetensors", "w.pt"), ""),
    "another suffix of weights": (_renamed(".pt", "w.dat"), "is not a weights file"),
    "zeros": (whole("w.pt", bytes(9999)), ""),
    "a link to a pickle": (_link, _UNSAFE),
    "a pipe": (_fifo, "no file at w.pt"),
    "a folder": (_folder, "no file at w.pt"),
    "a file that is not there": (lambda f, s: f / "w.pt", "no file at w.pt"),
    "a name of two lines": (whole("a\nb.pt", b"x"), ""),
    "a name that is no text": (whole("\udcff.pt", b"x"), ""),
    "a name as long as can be": (whole("w" * 252 + ".pt", b"x"), ""),
    "a name of markup": (whole("<b>$x$.pt", b"x"), ""),
}  # fmt: skip
