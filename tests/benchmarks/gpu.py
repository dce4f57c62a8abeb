"""Time what a GPU is for, in one table: at most 8 minutes on one large card.

python tests/benchmarks/gpu.py [--device cuda] [--data cifar10_test.npz] [--small]

Networks have random weights, and images are noise where no data are given: the work is the same. Each case runs twice: once to
load what is loaded once, and to count kernels, copies and waits; once to be timed. The last column is the share of the speed
that large matrix products reach on this device. --small: a hundredth of the work, run once, for a device that is pretended.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import intrafusion as itf
from intrafusion.models.architectures import Vgg
from intrafusion.pruning.transport.cost import pairwise, unit_vectors
from intrafusion.runtime.devices import choose_device, device_name, synchronise
from intrafusion.training.augment import shift_and_flip
from intrafusion.training.loop import Recipe, train

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@dataclass(frozen=True)
class Case:
    """What to time: `run` returns the seconds until its first result. flops: floating-point operations of the whole case."""

    name: str
    run: Callable[[], float]
    flops: float
    precision: str


def network(make: Callable[[], nn.Module], side: int, dataset: str) -> nn.Module:
    """Return a network with random weights and norms that are not trivial, and a card."""
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    model.card = itf.ModelCard("random", MEAN, STD, (3, side, side), 10, dataset)
    return model


def resnet18() -> nn.Module:
    """Return ResNet-18 for images of 32 x 32."""
    import torchvision  # after intrafusion, which lets it load beside a CPU-only torch

    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def noise(count: int, side: int, dataset: str) -> itf.ImageData:
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    return itf.ImageData(dataset, "test", images, torch.arange(count) % 10, tuple(map(str, range(10))))


def curve(device: torch.device, data: itf.ImageData, points: int) -> Case:
    model = network(resnet18, 32, "cifar10").to(device)
    base, data = itf.PruneSpec(model="random", dataset="cifar10", limit=None), data.to(device)
    shares = [0.05 * (1 + place) for place in range(points)]
    dense = itf.size(model, model.card.example()).macs
    specs = itf.grid(base, sparsity=shares)

    def run() -> float:
        session = itf.Session(model, itf.find_groups(model, model.card.example()), itf.size(model, model.card.example()), data)
        began, first = time.perf_counter(), 0.0
        for _ in itf.sweep(specs, session):
            first = first or time.perf_counter() - began
        return first

    work = 2 * dense * len(data) * sum((1 - share) ** 2 for share in shares)
    return Case(f"ResNet-18: {points} points x {len(data):,} images of 32 x 32", run, work, "bf16")


def evaluation(device: torch.device, count: int) -> Case:
    import torchvision

    model = network(lambda: torchvision.models.resnet50(num_classes=10), 224, "imagenet").to(device)
    data = noise(count, 224, "imagenet").to(device)

    def run() -> float:
        itf.evaluate(model, data, None)
        return 0.0

    work = 2 * itf.size(model, model.card.example()).macs * count
    return Case(f"ResNet-50: {count:,} images of 224 x 224", run, work, "fp32")


def distances(device: torch.device, channels: int, size: int) -> Case:
    vectors = unit_vectors(torch.randn(channels, size, dtype=torch.float64))

    def run() -> float:
        pairwise(vectors, device=device)
        return 0.0

    return Case(f"L1 distances of {channels:,} channels of {size:,} weights", run, 0.0, "fp32")


def epoch(device: torch.device, count: int) -> Case:
    widths = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
    model, data = network(lambda: Vgg(widths, (512, 10)), 32, "cifar10").to(device), noise(count, 32, "cifar10")

    def run() -> float:
        for _ in train(model, data, Recipe(1.0, shift_and_flip, lr=0.01), MEAN, STD):
            pass
        return 0.0

    work = 3 * 2 * itf.size(model, model.card.example()).macs * count
    return Case(f"VGG16-BN: a training epoch of {count:,} images", run, work, "bf16")


def timed(case: Case, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a case, and those until its first result."""
    began = time.perf_counter()
    first = case.run()
    synchronise(device)
    return time.perf_counter() - began, first


@contextmanager
def counted(device: torch.device) -> Iterator[Counter]:
    """Count kernels, copies and waits in this block: with torch's profiler, or by the pretended device."""
    found: Counter = Counter()
    if hasattr(torch.ops, "pretend") and hasattr(torch.ops.pretend, "names"):
        import pretend_device

        with pretend_device.counting() as found:
            yield found
        return
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        yield found
        synchronise(device)
    for event in profile.events() or ():
        name = event.name.lower()
        if "synchronize" in name:
            found["waits"] += 1
        elif "memcpy htod" in name or "memcpy dtoh" in name:
            found["copies"] += 1
        elif event.device_type != torch.autograd.DeviceType.CPU and "mem" not in name:
            found["kernels"] += 1


def peak(device: torch.device, kind: torch.dtype, side: int) -> float:
    """Return the FLOP/s of large matrix products."""
    matrix = torch.ones(side, side, device=device, dtype=kind)
    best = float("inf")
    for _ in range(5):
        synchronise(device)
        began = time.perf_counter()
        matrix @ matrix
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", help="CIFAR-10's test images; noise if not given")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    device, share = choose_device(args.device), 100 if args.small else 1
    data = itf.load_data("cifar10", path=args.data) if args.data else noise(10_000 // share, 32, "cifar10")
    cases: list[Callable[[], Case]] = [
        lambda: curve(device, data, 2 if args.small else 18),
        lambda: evaluation(device, 1_000 // share),
        lambda: distances(device, 2_048 // (4 if args.small else 1), 9_216 // (16 if args.small else 1)),
        lambda: epoch(device, 50_000 // share),
    ]
    side = 512 if args.small else 8_192
    peaks: dict[str, Any] = {"fp32": peak(device, torch.float32, side), "bf16": peak(device, torch.bfloat16, side)}
    told = ", ".join(f"{value / 1e12:.1f} TFLOP/s in {name}" for name, value in peaks.items())
    print(f"{device_name(device)}, torch {torch.__version__}: products reach {told}\n")
    print("| case | seconds | first result | kernels | copies | waits | share of the peak |\n|---|---|---|---|---|---|---|")
    for make in cases:
        case = make()
        with counted(device) as found:
            took, first = timed(case, device)
        if not args.small:  # the first run loads libraries, and counting takes time
            took, first = timed(case, device)
        reached = f"{case.flops / took / peaks[case.precision]:.0%} of {case.precision}" if case.flops else ""
        numbers = " | ".join(f"{found[name]:,}" for name in ("kernels", "copies", "waits"))
        print(f"| {case.name} | {took:.2f} | {f'{first:.2f}' if first else ''} | {numbers} | {reached} |", flush=True)


if __name__ == "__main__":
    main()
