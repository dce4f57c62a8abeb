"""A pretended CUDA device, for tests on machines without one.

`install` registers kernels for the dispatch key CUDA in a CPU build of torch. While the device is `present`,
`torch.device("cuda")` works in this process: tensors on it are real tensors, their memory and arithmetic are the CPU's, and the
rules are CUDA's:

- an operator refuses tensors of two devices, except 0-dimensional ones and indices on the CPU, which CUDA allows;
- `.numpy()` of a device tensor and a generator of the wrong device are refused;
- operators for which torch has a CPU kernel but no CUDA kernel are refused (from torch's own native_functions.yaml);
- waits for the device are counted, warned of or refused (`torch.cuda.set_sync_debug_mode`);
- device memory is limited: beyond the limit, torch.OutOfMemoryError is raised.

It cannot show CUDA's arithmetic (TF32, other orders of sums, non-determinism), its speed, whether a kernel works for a dtype,
streams and races, or the choices of cuDNN and cuBLAS.

Child processes have the device if PRETEND_DEVICE=1 is set and the folder pretend_site is on PYTHONPATH. PRETEND_NO_DOUBLE=1
refuses float64 there. g++ compiles the library once, in half a minute, into the folder of pytest's cache.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from places import ROOT

_SOURCE, _SITE = Path(__file__).with_suffix(".cpp"), Path(__file__).with_name("pretend_site")
_CACHE = ROOT / ".pytest_cache" / "pretended"
NAME, MEMORY = "Pretended GPU", 1 << 34


@contextlib.contextmanager
def present(no_double: bool = False) -> Iterator[None]:
    """Give this process, and the children that it starts, one CUDA device while the context is open.

    no_double: the device refuses float64, as Apple's mps does.
    """
    if reason := install():
        raise RuntimeError(reason)
    _refuse_what_lacks_a_kernel()
    pretend, wanted = torch.ops.pretend, {"PRETEND_DEVICE": "1", "PRETEND_NO_DOUBLE": "1" if no_double else ""}
    wanted["PYTHONPATH"] = os.pathsep.join([str(_SITE), os.environ.get("PYTHONPATH", "")])
    with contextlib.ExitStack() as stack:
        for name, value in wanted.items():
            stack.callback(_restore_variable, name, os.environ.get(name))
            os.environ[name] = value
        for owner, name, value in _replacements():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        stack.callback(pretend.present, False)
        stack.callback(pretend.no_double, False)
        stack.callback(limit, MEMORY)
        pretend.present(True)
        pretend.no_double(no_double)
        yield


def _restore_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@functools.cache
def install() -> str | None:
    """Register the device's kernels, for as long as the process lives; return why this machine cannot have them, or None.

    The device is not yet present. This must come before the first backward pass, which starts a thread for each device.
    """
    if torch.version.cuda or torch.version.hip:
        return "a pretended device needs the CPU build of torch"
    if not shutil.which("g++"):
        return "a pretended device needs g++"
    try:
        torch.ops.load_library(str(_library()))
    except (OSError, subprocess.CalledProcessError) as error:
        return f"the pretended device cannot be built: {error}"
    pretend = torch.ops.pretend
    pretend.limit(MEMORY)
    pretend.generator(_generator())
    pretend.present(False)
    torch.UntypedStorage.__new__ = _storage  # type: ignore[method-assign]
    torch._C._cuda_getCurrentRawStream = lambda *_: 0  # type: ignore[attr-defined]  # torch._dynamo imports it
    return None


_process = contextlib.ExitStack()


def present_from_now_on(no_double: bool = False) -> None:
    """Give this process the device for the rest of its life."""
    _process.enter_context(present(no_double))


@functools.cache
def _generator() -> torch.Generator:
    return torch.Generator("cuda")


def _library() -> Path:
    """Return the compiled library; compile it if there is none for this source and this torch."""
    mark = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    path = _CACHE / f"pretend_device-{mark}.so"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            root, part = Path(torch.__file__).parent, path.with_suffix(".part")
            include = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
            link = [f"-L{root}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib"]
            command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", *include, str(_SOURCE), "-o", str(part), *link]
            subprocess.run(command, check=True, capture_output=True)
            part.rename(path)
    return path


@functools.cache
def _refuse_what_lacks_a_kernel() -> None:
    torch.ops.pretend.lacking(sorted(_without_kernel()))


def _without_kernel(backend: str = "CUDA") -> set[str]:
    """Return the operators ("aten::name.overload") for which torch's sources list a CPU kernel and none for the backend."""
    path = Path(torch.__file__).parents[1] / "torchgen/packaged/ATen/native/native_functions.yaml"
    entries = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    keys: dict[str, set[str]] = {}
    delegate: dict[str, str] = {}
    for entry in entries:
        name = entry["func"].partition("(")[0]
        rows = entry.get("dispatch") or {"CompositeImplicitAutograd": ""}
        keys[name] = {key.strip() for row in rows for key in row.split(",")}
        if entry.get("structured_delegate"):
            delegate[name] = entry["structured_delegate"]
    has = {name: keys[delegate.get(name, name)] for name in keys}
    return {
        f"aten::{name}"
        for name, found in has.items()
        if "CPU" in found and backend not in found and not any(key.startswith("Composite") for key in found)
    }


def limit(count: int) -> None:
    """Set the device's memory in bytes; 0 for no limit."""
    torch.ops.pretend.limit(count)


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count what the device does in this block; the counter is filled when the block ends.

    kernels: operators run on the device. copies: transfers between the device and the CPU. waits: calls that make the CPU wait
    for the device. Each operator, as "kernel aten::mm" or "sync aten::nonzero", is there, too, as are "bytes up" and "bytes
    down".
    """
    found: Counter[str] = Counter()
    torch.ops.pretend.reset()
    yield found
    found.update(dict(zip(torch.ops.pretend.names(), torch.ops.pretend.numbers(), strict=True)))
    sums = {"kernels": "kernel ", "waits": "sync "}
    totals = {name: sum(n for key, n in found.items() if key.startswith(start)) for name, start in sums.items()}
    totals["waits"] += found["synchronize"]
    totals["copies"] = found["kernel copy up"] + found["kernel copy down"] + found["kernel upload of indices"]
    found.update(totals)


class _Event:
    def __init__(self, enable_timing: bool = False, **_: Any):
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "_Event") -> float:
        return 1000 * (other.at - self.at)

    def synchronize(self) -> None:
        torch.ops.pretend.synchronize()

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    def __init__(self, *_: Any, **__: Any): ...

    def synchronize(self) -> None:
        torch.ops.pretend.synchronize()

    def wait_stream(self, *_: Any) -> None: ...

    wait_event = wait_stream


def _replacements() -> list[tuple[Any, str, Any]]:
    """Return (owner, name, value) of everything in `torch` that would ask the driver."""
    cuda: Any = torch.cuda
    pretend, random = torch.ops.pretend, _generator()
    card = SimpleNamespace(
        name=NAME,
        total_memory=MEMORY,
        major=9,
        minor=0,
        multi_processor_count=132,
        is_integrated=0,
        is_multi_gpu_board=0,
        L2_cache_size=50 << 20,
        gcnArchName="",
        warp_size=32,
        max_threads_per_multi_processor=2048,
    )

    def allocated(*_: Any) -> int:
        return pretend.memory()[0]

    def peak(*_: Any) -> int:
        return pretend.memory()[1]

    answers: dict[str, Any] = {
        "is_available": True,
        "_is_compiled": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_properties": card,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_is_in_bad_fork": False,
        "get_arch_list": ["sm_90"],
        **dict.fromkeys(("init", "_lazy_init", "set_device", "empty_cache", "ipc_collect", "reset_accumulated_memory_stats")),
    }
    calls: dict[str, Callable[..., Any]] = {name: lambda *_, value=value, **__: value for name, value in answers.items()}
    calls |= {
        "synchronize": lambda *_: pretend.synchronize(),
        "memory_allocated": allocated,
        "memory_reserved": lambda *_: allocated(),  # torch._dynamo has a rule for each function and refuses two names of one
        "max_memory_allocated": peak,
        "max_memory_reserved": lambda *_: peak(),
        "reset_peak_memory_stats": lambda *_: pretend.reset_peak(),
        "mem_get_info": lambda *_: (pretend.memory()[2] - allocated(), pretend.memory()[2]),
        "memory_stats": lambda *_: {"allocated_bytes.all.current": allocated(), "allocated_bytes.all.peak": peak()},
        "manual_seed": lambda seed: random.manual_seed(int(seed)),
        "manual_seed_all": lambda seed: random.manual_seed(int(seed)),
        "seed": lambda: random.seed(),
        "initial_seed": lambda: random.initial_seed(),
        "get_rng_state": lambda *_: random.get_state(),
        "get_rng_state_all": lambda: [random.get_state()],
        "set_rng_state": lambda state, *_: random.set_state(state),
        "set_rng_state_all": lambda states: random.set_state(states[0]),
        "set_sync_debug_mode": lambda mode: pretend.sync_mode({"default": 0, "warn": 1, "error": 2}.get(mode, mode)),
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "Event": _Event,
        "Stream": _Stream,
    }
    found = [
        (owner, name, call) for name, call in calls.items() for owner in (cuda, cuda.random, cuda.memory) if name in vars(owner)
    ]
    return [*found, (cuda, "default_generators", (random,))]


def _storage(cls: type, *args: Any, device: Any = None, **options: Any) -> torch.UntypedStorage:
    if device is not None and torch.device(device).type == "cuda":  # a CPU build cannot make one
        return torch.empty(args[0] if args else 0, dtype=torch.uint8, device="cuda").untyped_storage()
    return torch._C.StorageBase.__new__(cls, *args, **({} if device is None else {"device": device}), **options)
