"""Time the same study in this process and on Ray workers of one core each: the start-up cost, and the gain per worker.

python -m pytest tests/benchmarks/bench_cluster.py -s
"""

import logging
import os
import time

import pytest
import torch

import intrafusion as itf
from intrafusion.studies.cluster import driver
from intrafusion.studies.session import open_session
from intrafusion.studies.sweeps import grid, sweep

ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")
IMAGES = 2000


def made_bench():
    """Return a session of ResNet-20 with random weights on noise images, since accuracy does not matter here."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (IMAGES,), generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    session = open_session("cifar10-resnet20", weights="random")
    return session.on(itf.ImageData("cifar10", "test", images, labels, tuple("0123456789")))


def timed(results):
    """Return the seconds to the first result, the seconds from there to the last, and the last result of each point."""
    start, first, last = time.perf_counter(), 0.0, {}
    for result in results:
        first = first or time.perf_counter()
        last[result.spec] = result
    return first - start, time.perf_counter() - first, last


def test_study():
    logging.getLogger("ray").setLevel(logging.ERROR)
    session = made_bench()
    groups = [(group.name,) for group in session.groups if group.reason is None]
    base = itf.PruneSpec(model="cifar10-resnet20", dataset="cifar10", limit=None)
    specs = grid(base, groups=groups, sparsity=[0.3, 0.6], merge=["drop", "fusion"])
    print(f"\n{len(specs)} points, {len(groups)} groups, {IMAGES} images; seconds to the first result, then to the last")
    took = {}
    for threads in (1, os.cpu_count()):
        torch.set_num_threads(threads)
        *seconds, expected = timed(sweep(specs, session.on(session.images())))
        took[threads] = sum(seconds)
        print(f"this process, threads: {threads}    {seconds[0]:5.1f} {seconds[1]:6.1f}")
    quiet = {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    for workers in (1, 2):
        start = time.perf_counter()
        ray.init("local", num_cpus=workers, object_store_memory=256 << 20, **quiet)
        start = time.perf_counter() - start
        *seconds, found = timed(driver.sweep_on_cluster(specs, session))
        ray.shutdown()
        assert found.keys() == expected.keys()
        ratios = ", ".join(f"{took[threads] / sum(seconds):.2f} to threads: {threads}" for threads in took)
        print(
            f"Ray, workers of a thread: {workers} {seconds[0]:5.1f} {seconds[1]:6.1f}  and {start:.1f} to start; ratio {ratios}"
        )
