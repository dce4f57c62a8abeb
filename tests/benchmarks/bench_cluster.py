"""Time the same study in this process and on Ray workers of one core each: the start-up cost, and the gain per worker.

python -m pytest tests/benchmarks/bench_cluster.py -s
python tests/benchmarks/bench_cluster.py --simulate      # 1 to 1,000 workers, without Ray

The simulation runs the real driver and the real store file. Its Ray has no processes: tasks stream ready-made results as fast
as the driver takes them, and each call takes the time that Ray 2.60 took for it on a local cluster (`COSTS`).
"""

import argparse
import logging
import os
import pickle
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import intrafusion as itf
from intrafusion.evaluation.incremental import MEMORY
from intrafusion.studies.cluster import driver
from intrafusion.studies.cluster.worker import Parts
from intrafusion.studies.measurement import Result
from intrafusion.studies.session import open_session
from intrafusion.studies.store.sqlite import Store
from intrafusion.studies.sweeps import grid, sweep

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from fake_ray import FakeRay

IMAGES = 2000
LOOKS = (100, IMAGES)  # images of the two results of a point
COSTS = {"wait": 2e-6, "take": 25e-6, "submit": 78e-6}  # seconds per stream in a wait, per result taken, per task
PARTS = {"put": (Store, "put_all"), "claim": (Store, "claim_all"), "get": (Store, "get"), "log": (driver, "tell")}


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


def metered(part, function, spent):
    """Return the function, which now adds its seconds of processor time to spent[part]."""

    def run(*arguments, **options):
        start = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            spent[part] += time.process_time() - start

    return run


def simulated(session, specs, workers):
    """Return the number of results, the processor and wall time of a study on so many workers, and the time by part."""
    dense, correct = session.dense(IMAGES).accuracy, {count: bytes(-(-count // 8)) for count in LOOKS}

    def ready(spec, count):
        return Result(spec, 0.5, (0.4, 0.6), count, IMAGES, dense, 9, 10, 90, 100, 7, 8, 0.4, correct[count])

    spent, share = Counter(), driver._Share(1, 0)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, Store(Path(folder) / "s") as store:
        points = {spec: share.origin(spec, session) for spec in specs}
        store.save_study("study", "", list(points.items()))
        ray = FakeRay(workers, lambda specs: [ready(spec, count) for count in LOOKS for spec in specs], **COSTS)
        for part, (owner, name) in {**PARTS, "wait": (ray, "wait")}.items():
            patch.setattr(owner, name, metered(part, getattr(owner, name), spent))
        patch.setattr(driver.Parts, "of", lambda *_: None)  # measured apart
        start, wall = time.process_time(), time.perf_counter()
        results = sum(1 for _ in driver._Driver(ray, points, session, store, {}, False, MEMORY, share).steps())
        took, wall = time.process_time() - start, time.perf_counter() - wall
        assert store.study("study").done == len(specs)
        spent["driver"] = took - spent.total()
    return results, took, wall, spent


def simulate(seconds):
    """Print what 1 to 1,000 workers that take so many seconds for a point could deliver, and what the driver sustains."""
    session = made_bench()
    groups = [(group.name,) for group in session.groups if group.reason is None]
    base = itf.PruneSpec(model="cifar10-resnet20", dataset="cifar10", limit=None)
    sent = len(pickle.dumps(Parts.of(session, [base])))
    print(f"{sent / 1e6:.1f} MB go out once; {seconds:g} s a point; {len(LOOKS)} results a point; ms of processor time a point")
    parts = (*PARTS, "wait", "driver")  # put includes releasing; driver includes taking results and sending tasks
    print("workers  points/s delivered  taken  (wall)   busy " + "".join(f"{part:>8}" for part in parts) + "  limit")
    for workers in (1, 10, 100, 1000):
        number = max(800, 6 * workers) // (2 * len(groups))
        specs = grid(base, groups=groups, sparsity=[k / 1000 for k in range(1, number + 1)], merge=["drop", "fusion"])
        results, took, wall, spent = simulated(session, specs, workers)
        assert results == len(LOOKS) * len(specs)
        rate, taken = workers / seconds, len(specs) / took
        limit = "workers" if rate < taken else max(spent, key=spent.get)
        row = f"{workers:7} {rate:19.1f} {taken:6.0f} {len(specs) / wall:7.0f} {min(1, taken / rate):6.0%} "
        print(row + "".join(f"{1e3 * spent[part] / len(specs):8.2f}" for part in parts) + f"  {limit}", flush=True)


def test_study():
    ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulate", action="store_true", help="print a table of 1 to 1,000 workers, without Ray")
    parser.add_argument("--seconds", type=float, default=0.42, help="measured cost of a point in a simulation")
    chosen = parser.parse_args()
    simulate(chosen.seconds) if chosen.simulate else test_study()
