"""Measure the wall time of the default curve and of its parts, and its peak memory.

python -m pytest tests/benchmarks/bench_curve.py -s
"""

import resource
import time

from intrafusion import PruneSpec
from intrafusion.studies.session import open_session
from intrafusion.studies.sweeps import grid, sweep


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_default_curve():
    memory = peak_mib()
    start = time.perf_counter()
    session = open_session(PruneSpec())
    opened = time.perf_counter()
    specs = grid(PruneSpec(), sparsity=[s / 10 for s in range(1, 10)], merge=["drop", "fusion"])
    results = list(sweep(specs, session))
    done = time.perf_counter()
    by_merge = {m: sum(r.seconds for r in results if r.spec.merge == m) for m in ("drop", "fusion")}
    print(
        f"\n{len(results)} points on {results[0].count} images: {done - opened:.2f} s, opening {opened - start:.2f} s; "
        f"fusion / drop {by_merge['fusion'] / by_merge['drop']:.2f}; memory {memory:.0f} -> {peak_mib():.0f} MiB"
    )
    assert len(results) == 18
