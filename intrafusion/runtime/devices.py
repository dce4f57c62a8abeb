"""Devices: which this machine has, how they are called, and what they can do.

Images run on the network's device. Weights are merged on the CPU, in float64: they are small, and not every device has float64.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError, one_line

CPU = torch.device("cpu")
KINDS = ("cuda", "xpu", "mps")  # of accelerators: NVIDIA's and AMD's, Intel's, Apple's


def device_names() -> list[str]:
    """Return the names of this machine's devices: accelerators first, "cpu" last."""
    numbered = [f"{kind}:{number}" for kind in ("cuda", "xpu") for number in range(_count(kind))]
    return [*numbered, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def _count(kind: str) -> int:
    module: Any = getattr(torch, kind)
    return module.device_count() if module.is_available() else 0


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """Return a device of this machine by name; "auto" is the first one of `device_names` that works.

    Raises IntrafusionError if the device is not available.
    """
    names = device_names()
    if name == "auto":
        return next(device for device in map(torch.device, names) if device == CPU or why_not(device) is None)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    others = " or ".join(("auto", *names))
    if device is None or device.type not in ("cpu", *KINDS):
        raise IntrafusionError(f"unknown device {str(name)!r}; choose {others}")
    if device not in map(torch.device, names) and str(device) not in KINDS:
        raise IntrafusionError(f"this machine has no device {str(name)!r}; choose {others}")
    if reason := why_not(device):
        raise IntrafusionError(f"device {str(name)!r} is not available ({reason}); choose {others}")
    return device


def why_not(device: torch.device) -> str | None:
    """Return in one line why nothing can be computed on a device; None if it works."""
    if device.type != "cpu" and not any(name.startswith(device.type) for name in device_names()):
        return f"this machine has no {device.type} device"
    try:
        float(torch.ones(2, device=device).sum())
    except (RuntimeError, AssertionError) as error:  # torch raises the latter for a kind that it was not built for
        return one_line(error)
    return None


def device_name(device: torch.device) -> str:
    """Return the name of a device: of its model for a GPU that has one, else as torch writes it."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).get_device_name(device)
    return str(device)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a network's weights; the CPU if it has none."""
    return next((tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors), CPU)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def float64_device(device: torch.device) -> torch.device:
    """Return the device that computes in float64 for this one: itself, or the CPU if it has no float64."""
    return device if has_float64(device) else CPU


def doubled(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its `float64_device`."""
    return tensor.to(float64_device(tensor.device)).double()


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64; Apple's and some of Intel's do not."""
    if device.type == "cpu":
        return True
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


class _Switches:
    """Settings of the whole process that hold while any thread is inside: the first sets them, the last restores them."""

    def __init__(self, read: Callable[[], tuple], write: Callable[..., None], *values: bool):
        self._read, self._write, self._values = read, write, values
        self._lock, self._users, self._before = threading.Lock(), 0, ()  # type: threading.Lock, int, tuple

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._before = self._read()
                self._write(*self._values)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._write(*self._before)


def _tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def _set_tf32(products: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions


def _algorithms() -> tuple[bool, bool, bool]:
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns, torch.backends.cudnn.deterministic


def _set_algorithms(only: bool, warns: bool, convolutions: bool) -> None:
    torch.use_deterministic_algorithms(only, warn_only=warns)
    torch.backends.cudnn.deterministic = convolutions


float32_without_tf32 = _Switches(_tf32, _set_tf32, False, False)
deterministic = _Switches(_algorithms, _set_algorithms, True, True, True)
"""Algorithms whose results do not depend on the order of threads, wherever torch has one; torch warns of each one it lacks."""
