"""Setup that must run before torch and torchvision are used; the package imports this module first.

Threads: OpenMP workers sleep while they wait, unless the environment says otherwise. By default they spin, which wastes cores
that another session, job or thread needs: on 2 busy cores the default curve took ten times as long.

Devices: an operator that Apple's or Intel's backend lacks runs on the CPU, and torch says so once. cuBLAS gets the workspace
without which its results depend on timing.

torchvision: a CPU-only torch must be able to import PyPI's build of torchvision.
torchvision's compiled operators do not load with a different build of torch. Its import then fails with "operator
torchvision::nms does not exist", because it registers shape functions for two undeclared operators. Declaring their schemas is
enough, because no detection operator is ever called here.

torch.fx: a thread that traces a network, directly or for torch.export, must not disturb networks that other threads run.
Tracing patches functions of nn.Module for the whole process. Layers that another thread runs meanwhile would be recorded as
part of the traced network, and two concurrent traces would leave each other's patches behind.
"""

import functools
import os
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch loads OpenMP
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
os.environ.setdefault("PYTORCH_ENABLE_XPU_FALLBACK", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch.fx import Tracer
from torch.fx._symbolic_trace import _Patcher

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def compiled_operators_load() -> bool:
    """Return whether torchvision's compiled library fits this torch (loading it declares the operators)."""
    spec = find_spec("torchvision")
    folders = (spec.submodule_search_locations if spec else None) or []
    for library in (file for folder in folders for file in Path(folder).glob("_C*")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
        return True
    return False


if not compiled_operators_load():
    _library = torch.library.Library("torchvision", "FRAGMENT")  # the schemas live as long as this object
    for _schema in SCHEMAS:
        _library.define(_schema)


def trace_alone() -> None:
    """Make torch.fx trace in one thread at a time, and limit its patches of nn.Module to that thread."""
    trace, patch, lock = Tracer.trace, _Patcher.patch_method, threading.RLock()

    @functools.wraps(trace)
    def one_at_a_time(self: Tracer, *args: Any, **options: Any) -> Any:
        with lock:
            return trace(self, *args, **options)

    @functools.wraps(patch)
    def patch_for_this_thread(self: _Patcher, cls: type, name: str, new: Callable[..., Any], deduplicate: bool = True) -> None:
        usual, tracing = getattr(cls, name), threading.get_ident()

        @functools.wraps(new)
        def either(*args: Any, **options: Any) -> Any:
            return (new if threading.get_ident() == tracing else usual)(*args, **options)

        patch(self, cls, name, either, deduplicate)

    Tracer.trace = one_at_a_time  # type: ignore[method-assign]
    _Patcher.patch_method = patch_for_this_thread  # type: ignore[method-assign, assignment]


trace_alone()
