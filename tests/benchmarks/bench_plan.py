"""Time the transport plan, the full problem against the exact reduction, in one run.

python -m pytest tests/benchmarks/bench_plan.py -s
"""

import statistics
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import intrafusion as itf
from intrafusion.pruning.transport.cost import Geometry, pairwise, unit_vectors
from intrafusion.pruning.transport.planning import kept_count, solve
from intrafusion.pruning.transport.solvers import Problem


def seconds(call, runs=5):
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


@pytest.mark.parametrize("n", [64, 256, 512, 1024, 2048])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_reduced_against_full(n, sparsity):
    generator = torch.Generator().manual_seed(0)
    vectors = unit_vectors(torch.randn(n, 64, generator=generator, dtype=torch.float64))
    k = kept_count(n, sparsity)
    kept = np.sort(torch.randperm(n, generator=generator)[:k].numpy())
    M = pairwise(vectors)[:, kept].numpy()
    small = Problem(np.full(n, 1 / n), np.full(k, 1 / k), M, kept)
    exact = itf.registry("solver")["exact"]
    full, G_full = seconds(lambda: exact(replace(small, kept=None)), 1 if n > 1000 else 5)
    reduced, G = seconds(lambda: exact(small), 1 if n > 1000 else 5)
    gap = abs((G * M).sum() - (G_full * M).sum())
    print(
        f"\nn {n:5d}, sparsity {sparsity:.0%}: full {full * 1e3:8.1f} ms, reduced {reduced * 1e3:8.1f} ms, "
        f"ratio {full / reduced:4.1f}, cost gap {gap:.1e}"
    )
    assert small.reducible
    assert gap < 1e-9


@pytest.mark.parametrize(("n", "d"), [(128, 2304), (512, 9216), (2048, 1024)])
def test_moving_the_sparsity_against_measuring_again(n, d):
    generator = torch.Generator().manual_seed(0)
    vectors = unit_vectors(torch.randn(n, d, generator=generator, dtype=torch.float64))
    scores = torch.rand(n, generator=generator)
    block = torch.zeros(n, dtype=torch.int64)
    measuring, distances = seconds(lambda: pairwise(vectors), 1)
    geometry = Geometry(vectors, distances, block, "lp", 1)
    for solver in itf.registry("solver"):
        solving, _ = seconds(lambda solver=solver: solve(geometry, scores, 0.5, solver=solver), 1 if n > 1000 else 3)
        print(f"\nn {n:5d}, d {d:5d}: distances {measuring:6.2f} s once; {solver:10s} {solving * 1e3:8.1f} ms a sparsity, "
              f"ratio {measuring / solving:6.1f}")  # fmt: skip
