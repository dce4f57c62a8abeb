"""Quick checks of versions, devices, the store, the disk and the models, each with advice on what to do."""

import os
import platform
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from intrafusion.data.datasets import OWN, load_data
from intrafusion.errors import IntrafusionError, one_line
from intrafusion.evaluation.accuracy import evaluate
from intrafusion.models.card import card_of
from intrafusion.models.hub import load_model
from intrafusion.models.precision import has_bf16
from intrafusion.models.sources import builtin
from intrafusion.runtime import sandbox
from intrafusion.runtime.devices import device_names, why_not
from intrafusion.runtime.paths import home, store_path
from intrafusion.spec import PruneSpec
from intrafusion.studies.store.schema import plain_database_errors
from intrafusion.studies.store.sqlite import Store

OK, MISSING, BROKEN = "ok", "missing", "broken"
PACKAGES = (
    "torch", "torchvision", "streamlit", "POT", "torch-pruning", "captum", "scikit-learn", "scipy", "numpy", "pandas",
    "plotly", "rich", "safetensors", "onnx", "onnxscript", "onnxruntime",
)  # fmt: skip
OPTIONAL = {
    "timm": "pip install 'intrafusion[timm]'",
    "ray": "pip install 'intrafusion[ray]'",
    "playwright": "pip install 'intrafusion[test]'",
}
_ROOM = 256 << 20  # least free bytes on the disk
_OFF = 0.01  # largest difference in accuracy between an embedded model and its card, as machines differ


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    state: ok, missing or broken. said: the outcome as text. todo: what to do, or "". needed: whether it is essential.
    """

    name: str
    state: str
    said: str
    todo: str = ""
    needed: bool = True


def examine(data_path: str | None = None, dataset: str = OWN) -> Iterator[Finding]:
    """Run all checks in turn. data_path: the path of images of `dataset`, as for --data-path; None to skip that check."""
    yield _python()
    yield from (_package(name) for name in PACKAGES)
    yield from _devices()
    yield _careful("cache", _folder, "cache", home())
    yield _careful("store", _store, store_path().absolute())
    yield from (_careful(f"model {name}", _model, name) for name in builtin.names() if builtin.embedded(name))
    yield _careful("data digits", lambda: f"{len(load_data('digits')):,} test images, embedded")
    yield from (_cifar(name) for name in ("cifar10", "cifar100"))
    if data_path is not None:
        yield _careful("data path", lambda path: f"{len(load_data(dataset, path=path)):,} images of {dataset}", data_path)
    yield _careful("checks", _checks)
    yield from (_optional(name, command) for name, command in OPTIONAL.items())
    yield _chromium()


def is_well(findings: list[Finding]) -> bool:
    """Return whether all essential checks succeeded."""
    return all(found.state == OK for found in findings if found.needed)


def _careful(name: str, look: Callable[..., str | Finding], *of: Any) -> Finding:
    """Run one check; an exception becomes a finding."""
    again = "pip install -r requirements.txt"
    try:
        found = look(*of)
    except IntrafusionError as error:
        return Finding(name, BROKEN, str(error), "restore the file, or choose another path")
    except Exception as error:  # an arbitrary error is a valid outcome of a check
        return Finding(name, BROKEN, f"{type(error).__name__}: {one_line(error)}", again)
    return found if isinstance(found, Finding) else Finding(name, OK, found)


def _python() -> Finding:
    old = sys.version_info < (3, 11)
    return Finding("python", BROKEN if old else OK, platform.python_version(), "use Python 3.11 or newer" if old else "")


def _package(name: str) -> Finding:
    try:
        return Finding(name, OK, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, MISSING, "not installed", "pip install -r requirements.txt")


def _optional(name: str, command: str) -> Finding:
    found = _package(name)
    return Finding(name, found.state, found.said, "" if found.state == OK else command, needed=False)


def _checks() -> Finding:
    """Check how the processes that check uploaded files are confined; a system may refuse them namespaces."""
    if sandbox.is_alone():
        return Finding(
            "checks", OK, "uploads are checked in a process with resource limits and no network access", needed=False
        )
    said = "uploads are checked in a process with resource limits, but with network access"
    todo = "on Linux, allow user namespaces (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces)"
    return Finding("checks", MISSING, said, todo, needed=False)


def _chromium() -> Finding:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path:
        return Finding("chromium", OK, path, needed=False)
    return Finding("chromium", MISSING, "not installed; only browser tests need it", "apt-get install chromium", needed=False)


def _devices() -> Iterator[Finding]:
    able = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield _careful("cpu", lambda: f"{torch.get_num_threads()} threads on {able} cores, {_bf16(torch.device('cpu'))}")
    accelerators = device_names()[:-1]
    for name in accelerators:
        yield _careful(name, _accelerator, name)
    if not accelerators:
        yield Finding("gpu", MISSING, "no CUDA, XPU or MPS device: everything runs on the CPU", needed=False)


def _accelerator(name: str) -> str:
    device = torch.device(name)
    if reason := why_not(device):
        raise IntrafusionError(f"does not work: {reason}")
    if device.type == "mps":
        return f"Apple GPU, weights are merged on the CPU in float64, {_bf16(device)}"
    about = getattr(torch, device.type).get_device_properties(name)
    return f"{about.name}, {about.total_memory >> 30} GiB, {_bf16(device)}"


def _bf16(device: torch.device) -> str:
    """Return, as text, whether precision fast is available, and how much faster a matrix product is."""
    if not has_bf16(device):
        return "no bf16: only precision exact"
    exact, fast = (_seconds(torch.ones(1024, 1024, device=device, dtype=kind)) for kind in (torch.float32, torch.bfloat16))
    return f"matrix products in bf16 are {exact / fast:.1f} times as fast as in fp32"


def _seconds(matrix: torch.Tensor) -> float:
    """Return the shortest time of a few products, in seconds; reading a value back waits for the computation."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        times.append(time.perf_counter() - began)
    return min(times)


def _folder(name: str, folder: Path) -> Finding:
    """Check that a folder, or its nearest existing parent, is writable and has enough free space."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    free = shutil.disk_usage(there).free
    said = f"{folder}: {held / 1e6:,.0f} MB used, {free / 1e9:,.1f} GB free"
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        return Finding(name, BROKEN, f"cannot write to {folder}: {one_line(error)}", "set INTRAFUSION_HOME to another folder")
    if free < _ROOM:
        return Finding(name, BROKEN, said, "free some space, or set INTRAFUSION_HOME to another disk")
    return Finding(name, OK, said)


def _store(path: Path) -> Finding:
    """Check that the store is intact and writable, or can be created; a missing file is not created."""
    if not path.exists():
        folder = _folder("store", path.parent)
        said = f"{path}: none yet; the first study creates it" if folder.state == OK else folder.said
        return Finding("store", folder.state, said, "set INTRAFUSION_STORE to another file" if folder.todo else "")
    try:
        with Store(path, wait=1) as store:
            rows = store.studies()
        with plain_database_errors(path, 1), closing(sqlite3.connect(path, timeout=1, isolation_level=None)) as db:
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
            db.execute("BEGIN IMMEDIATE")
            (points,) = db.execute("SELECT count(*) FROM points").fetchone()
            (form,) = db.execute("PRAGMA user_version").fetchone()
            db.execute("ROLLBACK")
    except IntrafusionError as error:
        return Finding("store", BROKEN, str(error), "fix the store, or set INTRAFUSION_STORE to another file")
    if verdict != "ok":
        said = f"{path} is damaged: {one_line(ValueError(verdict))}"
        return Finding("store", BROKEN, said, "move it away; the .recover command of sqlite3 saves the readable part")
    return Finding("store", OK, f"{path}: format {form}, {len(rows)} studies, {points:,} points")


def _model(name: str) -> str:
    """Run an embedded model: the default one on all test images, compared with its card; others on an empty image."""
    model = load_model(name)
    card = card_of(model)
    if name != PruneSpec.model:
        logits = model(card.example())
        if logits.shape[1:] != (card.classes,) or not logits.isfinite().all():
            raise IntrafusionError(f"its logits have shape {tuple(logits.shape)}, or are not finite")
        return f"runs; accuracy on its card {card.accuracy:.1%}"
    found = evaluate(model, load_data(card.dataset))
    said = f"accuracy {found.accuracy:.1%} on {found.count} test images; on its card {card.accuracy:.1%}"
    if card.accuracy is None or abs(found.accuracy - card.accuracy) > _OFF:
        raise IntrafusionError(said)
    return said


def _cifar(name: str) -> Finding:
    """Check that a download exists; whether it is complete is checked when it is opened."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    places = [home() / "data" / part for part in (kind.base_folder, kind.filename)]
    found = next((place for place in places if place.exists()), None)
    if found is not None:
        return Finding(f"data {name}", OK, str(found), needed=False)
    command = f"python -m intrafusion data {name} --download, or use --data-path"
    return Finding(f"data {name}", MISSING, "not downloaded", command, needed=False)
