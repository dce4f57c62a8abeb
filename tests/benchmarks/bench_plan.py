"""Time of the transport plan, full problem against exact reduction, in one run.

python -m pytest tests/benchmarks/bench_plan.py -s
"""

import statistics
import time

import numpy as np
import pytest

import intrafusion as itf
from intrafusion.transport import cost_matrix, unit_vectors

torch = pytest.importorskip("torch")


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
    k = int(n * (1 - sparsity))
    kept = np.sort(torch.randperm(n, generator=generator)[:k].numpy())
    M = cost_matrix(vectors, vectors[kept]).numpy()
    a, b = np.full(n, 1 / n), np.full(k, 1 / k)
    solve = itf.registry("solver")["exact"]
    full, (G_full, _) = seconds(lambda: solve(a, b, M, None), 1 if n > 1000 else 5)
    reduced, (G, used) = seconds(lambda: solve(a, b, M, kept), 1 if n > 1000 else 5)
    gap = abs((G * M).sum() - (G_full * M).sum())
    print(
        f"\nn {n:5d}, sparsity {sparsity:.0%}: full {full * 1e3:8.1f} ms, reduced {reduced * 1e3:8.1f} ms, "
        f"ratio {full / reduced:4.1f}, cost gap {gap:.1e}"
    )
    assert used
    assert gap < 1e-9
