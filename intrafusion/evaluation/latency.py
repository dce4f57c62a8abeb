"""Speed and size of networks on the current device, and comparison of two networks: measured, with the spread.

Two networks are timed in turns (A B, B A, A B, ...), so that other load on the machine affects both. Only the ratio within each
turn counts.
"""

import math
import platform
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from intrafusion.errors import IntrafusionError
from intrafusion.evaluation.accuracy import in_eval, size
from intrafusion.models.precision import inputs_for, kind_of
from intrafusion.runtime.cancellation import checkpoint, clock
from intrafusion.runtime.devices import CPU, device_name, device_of, synchronise

RUNS = 30  # turns at each batch size
_FEWEST = 6  # least number of turns: their extremes bound the median with 95 %
_LEAST = 0.01  # least seconds of one run: enough passes to make clock resolution irrelevant
_PATIENCE = 20.0  # seconds at each batch size after which no more turns begin, once there are enough
_WARM = 2  # passes before the first run
_GAP = 0.001  # seconds of waiting for a turn after which caches are cold


@dataclass(frozen=True)
class Latency:
    """Measured times of a network at one batch size.

    batch: images in one forward pass. seconds: mean time of a pass in each run, in order.
    """

    batch: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the runs, in seconds per pass."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Speed:
    """Speed and size of one network.

    latencies: at batch 1 and at a large batch, as far as measured. params, macs: see `accuracy.size`. bytes: size as
    safetensors. memory: peak bytes of one pass at the large batch, beyond weights and images. On CUDA it is from torch's own
    counter; elsewhere it is the results of operations that are alive at once (memory that a kernel uses internally is not
    seen).
    """

    latencies: tuple[Latency, ...]
    params: int
    macs: int
    bytes: int
    memory: int


@dataclass(frozen=True)
class Ratio:
    """How many times faster the second network is at one batch size: median over the turns, 95 % interval, number of turns."""

    batch: int
    times: float
    interval: tuple[float, float]
    turns: int

    @property
    def verdict(self) -> str:
        """faster, slower or no clear difference, depending on whether the interval contains 1."""
        low, high = self.interval
        return "faster" if low > 1 else "slower" if high < 1 else "no clear difference"


@dataclass(frozen=True)
class LatencyComparison:
    """Comparison of two networks, as far as they are measured.

    device: as text. share: fraction of the work that is done. kind: the dtypes of the networks, as text.
    """

    before: Speed
    after: Speed
    device: str
    share: float
    kind: str = "float32"

    @property
    def ratios(self) -> tuple[Ratio, ...]:
        """One ratio for each batch size."""
        pairs = zip(self.before.latencies, self.after.latencies, strict=True)
        return tuple(ratio(first, second) for first, second in pairs)

    @property
    def is_smaller(self) -> bool:
        return self.after.params < self.before.params

    def sentence(self) -> str:
        """Return the conclusion for a user who wants a faster network: "Smaller but not faster ..." where that is true."""
        told = "; ".join(f"{_said(one)} at batch {one.batch:,}" for one in self.ratios)
        verdicts = {one.verdict for one in self.ratios}
        if not verdicts or not self.is_smaller:
            return told[:1].upper() + told[1:]
        if verdicts == {"faster"}:
            return f"Smaller and faster: {told}"
        return f"Smaller but not faster{' everywhere' if 'faster' in verdicts else ''}: {told}"

    def rows(self) -> list[dict[str, Any]]:
        """Return JSON-able rows: one per batch size, network and run, with seconds per pass."""
        networks = ("before", self.before), ("after", self.after)
        return [
            {"network": name, "batch": latency.batch, "run": run, "seconds": seconds}
            for name, speed in networks
            for latency in speed.latencies
            for run, seconds in enumerate(latency.seconds)
        ]

    def summary(self) -> dict[str, Any]:
        """Return a JSON-able dict of the medians, quartiles and ratios, and both networks' sizes."""
        told: dict[str, Any] = {"device": self.device, "verdict": self.sentence(), "latency": []}
        for one, first, second in zip(self.ratios, self.before.latencies, self.after.latencies, strict=True):
            told["latency"].append(
                {
                    "batch": one.batch,
                    "turns": one.turns,
                    "before": first.median,
                    "before_quartiles": first.quartiles,
                    "after": second.median,
                    "after_quartiles": second.quartiles,
                    "times_faster": one.times,
                    "interval": one.interval,
                    "verdict": one.verdict,
                }
            )
        for name, speed in (("before", self.before), ("after", self.after)):
            told[name] = {"params": speed.params, "macs": speed.macs, "bytes": speed.bytes, "memory": speed.memory}
        return told


def _said(one: Ratio) -> str:
    low, high = one.interval
    if one.verdict == "no clear difference":
        return f"no clear difference ({low:.2f} to {high:.2f} times as fast)"
    times, ends = (one.times, (low, high)) if one.verdict == "faster" else (1 / one.times, (1 / high, 1 / low))
    return f"{times:.2f} times {one.verdict} ({ends[0]:.2f} to {ends[1]:.2f})"


def ratio(first: Latency, second: Latency) -> Ratio:
    """Return the median of first / second over paired runs, and the order statistics that contain its true value with 95 %.

    The interval is that of the sign test: it makes no assumption on the distribution of times, and needs 6 pairs to be finite.
    """
    pairs = sorted(a / b for a, b in zip(first.seconds, second.seconds, strict=True))
    rank = _sign_rank(len(pairs))
    interval = (pairs[rank], pairs[-1 - rank]) if rank >= 0 else (0.0, math.inf)
    return Ratio(first.batch, median(pairs), interval, len(pairs))


def _sign_rank(count: int) -> int:
    """Return how many order statistics to drop at each end for a 95 % interval of the median; -1 if there are too few."""
    left, rank = 1.0, -1
    tail = 0.5**count
    while 2 * tail <= 0.05:
        rank += 1
        left = left * (count - rank) / (rank + 1)
        tail += left * 0.5**count
    return rank


def measure_latency(model: nn.Module, example: Tensor, batch: int | None = None, runs: int = RUNS) -> Speed:
    """Measure the speed and size of one network. For the arguments, see `compare_latency`."""
    *_, ((found,), _) = _timed((model,), example, batch, runs)
    return found


def compare_latency(
    before: nn.Module, after: nn.Module, example: Tensor, batch: int | None = None, runs: int = RUNS
) -> Iterator[LatencyComparison]:
    """Time two networks in turns, yielding what is known after each turn; the last result is complete.

    example: one input, float (1, C, H, W), in torch's default memory format; it is moved to the networks'
    device. batch: size of the large
    batch, None for `large_batch`. runs: turns at each batch size, at least 6; after 20 s no more begin, once 6 are done. Raises
    IntrafusionError for fewer runs, or if the batch is no integer from 2.
    """
    device = device_words(device_of(before))
    kinds = dict.fromkeys(str(kind_of(network)).removeprefix("torch.") for network in (before, after))
    for (first, second), share in _timed((before, after), example, batch, runs):
        yield LatencyComparison(first, second, device, share, " and ".join(kinds))


def _timed(networks: Sequence[nn.Module], example: Tensor, batch: int | None, runs: int) -> Iterator[tuple[list[Speed], float]]:
    """Yield what is known of each network after each turn, and the fraction of the work that is done."""
    example = example.to(device_of(networks[0]))
    batch = large_batch(example) if batch is None else batch
    if type(batch) is not int or batch < 2:
        raise IntrafusionError(f"batch must be at least 2 images, not {batch!r}")
    if type(runs) is not int or runs < _FEWEST:
        raise IntrafusionError(f"runs must be at least {_FEWEST}, not {runs!r}")
    with in_eval(*networks):
        speeds = [_sized(network, example, batch) for network in networks]
        for place, images in enumerate((1, batch)):
            for times in _turns(networks, _noise(example, images), runs):
                speeds = [
                    replace(speed, latencies=(*speed.latencies[:place], Latency(images, tuple(mine))))
                    for speed, mine in zip(speeds, times, strict=True)
                ]
                yield speeds, min((place + len(times[0]) / runs) / 2, 0.99)
        yield speeds, 1.0


def large_batch(example: Tensor) -> int:
    """Return the default large batch size: 64 small images or 16 large ones; 128 on a GPU."""
    if example.device.type != "cpu":
        return 128
    return 64 if example.shape[-1] <= 64 else 16


def _sized(model: nn.Module, example: Tensor, batch: int) -> Speed:
    from safetensors.torch import save

    known = size(model, example)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    return Speed((), known.params, known.macs, len(save(state)), peak_memory(model, _noise(example, batch)))


def _noise(example: Tensor, images: int) -> Tensor:
    noise = torch.randn(images, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    return noise.to(example.device, example.dtype)


def _turns(networks: Sequence[nn.Module], images: Tensor, runs: int) -> Iterator[list[list[float]]]:
    """Yield each network's seconds per pass in all runs so far, after each turn; the order alternates."""
    passes, times = [], [[] for _ in networks]  # type: list[int], list[list[float]]
    for network in networks:
        _run(network, images, _WARM)
        checkpoint()
        passes.append(max(1, math.ceil(_LEAST / _run(network, images, 1))))
    start = clock()
    for turn in range(runs):
        order = range(len(networks)) if turn % 2 == 0 else reversed(range(len(networks)))
        _come_back(networks, images)
        for which in order:
            times[which].append(_run(networks[which], images, passes[which]))
        yield times
        if turn + 1 >= _FEWEST and clock() - start > _PATIENCE:
            return


def _come_back(networks: Sequence[nn.Module], images: Tensor) -> None:
    """Run a checkpoint; if other work has computed meanwhile, warm the networks up again."""
    before = time.perf_counter() - clock()
    checkpoint()
    if time.perf_counter() - clock() > before + _GAP:
        for network in networks:
            _run(network, images, 1)


def _run(network: nn.Module, images: Tensor, passes: int) -> float:
    """Return the mean seconds per forward pass over `passes`, in the network's own dtype."""
    images = inputs_for(network, images)
    with torch.inference_mode():
        synchronise(images.device)
        start = time.perf_counter()
        for _ in range(passes):
            network(images)
        synchronise(images.device)
        return (time.perf_counter() - start) / passes


def peak_memory(model: nn.Module, images: Tensor) -> int:
    """Return the peak bytes of one pass beyond weights and images; see `Speed`."""
    images = inputs_for(model, images)
    with torch.inference_mode():
        if images.device.type in ("cuda", "xpu"):
            memory: Any = getattr(torch, images.device.type)
            synchronise(images.device)
            before = memory.memory_allocated(images.device)
            memory.reset_peak_memory_stats(images.device)
            model(images)
            return memory.max_memory_allocated(images.device) - before
        with _Alive([*model.parameters(), *model.buffers(), images]) as alive:
            model(images)
        return alive.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of operation results while they are alive."""

    def __init__(self, known: Sequence[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def device_words(device: torch.device) -> str:
    """Return the device as text, such as "cpu, 2 threads of an AMD EPYC 7B13"."""
    if device != CPU:
        return device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''} of {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
