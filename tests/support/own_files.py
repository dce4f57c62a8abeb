"""Makers of files that a user may upload: valid files, and files that an attacker might send."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from intrafusion.models.state_dict import read_state
from intrafusion.runtime.paths import ASSETS

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


class Touch:
    """An object whose pickle makes a folder when it is unpickled."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sentinel),)


def mlp_state() -> dict[str, torch.Tensor]:
    return read_state(ASSETS / "digits-mlp.safetensors")


def network() -> nn.Module:
    """Return a tiny classifier of (1, 8, 8) images with three classes, in eval mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3, bias=False),
        nn.ReLU(inplace=True),        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    ).eval()  # fmt: skip


def export(model: nn.Module, path: Path, size: tuple[int, ...] = (1, 8, 8), dynamic: bool = True, core: bool = False) -> Path:
    """Save a network as a torch.export program.

    dynamic: whether the batch size is dynamic. core: whether to decompose it into PyTorch's core operator set.
    """
    shapes: Any = ({0: torch.export.Dim("batch", min=1, max=4096)},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (torch.zeros(2, *size),), dynamic_shapes=shapes)
        torch.export.save(program.run_decompositions() if core else program, path)
    return path


def rewritten(source: Path, path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Copy a zip after `change` has modified its files, given by name."""
    with zipfile.ZipFile(source) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    change(files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def with_graph(source: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a program after `change` has modified its description."""

    def describe(files: dict[str, bytes]) -> None:
        name = next(name for name in files if name.endswith("models/model.json"))
        about = json.loads(files[name])
        change(about)
        files[name] = json.dumps(about).encode()

    return rewritten(source, path, describe)


def with_weights(source: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a program after `change` has modified its list of weights."""

    def describe(files: dict[str, bytes]) -> None:
        name = next(name for name in files if name.endswith("model_weights_config.json"))
        about = json.loads(files[name])
        change(about["config"])
        files[name] = json.dumps(about).encode()

    return rewritten(source, path, describe)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **({"images": PIXELS, "labels": LABELS} | arrays))
    return path


def picture(shade: int = 9, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 7, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(path: Path, files: dict[str, bytes] | None = None) -> Path:
    """Make a zip of class folders, with these files or, by default, with valid pictures."""
    whole = {f"{of_class}/{number}.png": picture(number) for of_class in ("cat", "dog") for number in range(2)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (whole if files is None else files).items():
            archive.writestr(name, content)
    return path


def link(path: Path) -> Path:
    """Make a zip that contains a symbolic link."""
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("cat/x.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return path


def bomb(path: Path, name: str = "cat/x.png", size: int = 50 << 20) -> Path:
    """Make a zip of one file that unpacks to a thousand times its size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(size))
    return path


def huge_header(path: Path) -> Path:
    """Make an .npz whose array header claims 10^12 images."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8, 1)})  # type: ignore[no-untyped-call]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", buffer.getvalue() + bytes(100))
        archive.writestr("labels.npy", buffer.getvalue())
    return path


def wide_picture() -> bytes:
    """Return a PNG that claims 40,000 x 40,000 pixels in a few bytes."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def postscript(sentinel: Path) -> bytes:
    """Return a PostScript program for a file named as a picture: Pillow would pass it to Ghostscript."""
    lines = (
        "%!PS-Adobe-3.0 EPSF-3.0",
        "%%BoundingBox: 0 0 8 8",
        "%%EndComments",
        f"({sentinel}) (w) file closefile",
        "showpage",
    )
    return "\n".join(lines).encode()


def save_state(path: Path, state: Any) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def pickled(path: Path, sentinel: Path) -> Path:
    path.write_bytes(pickle.dumps({"0.weight": Touch(sentinel)}))
    return path
