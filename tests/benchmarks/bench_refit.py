"""Measure the gain and the cost of each step beyond `refit`, on the inner groups of a CIFAR ResNet pruned together.

python tests/benchmarks/bench_refit.py NAME WEIGHTS DATA [SPARSITY], such as cifar10-resnet20 resnet20.th cifar10_test.npz 0.5
"""

import sys
import time

import intrafusion as itf
from intrafusion.pruning.merge import calibrate
from intrafusion.pruning.merge.calibrated import refit, refit_all
from intrafusion.spec import PruneSpec
from intrafusion.studies.allocation import shapes, suggest
from intrafusion.studies.sensitivity import sensitivity_matrix
from intrafusion.studies.session import Session, merged, open_session
from intrafusion.studies.sweeps import grid, sweep


def widths(session: Session, spec: PruneSpec, data: itf.ImageData) -> dict[str, float]:
    """Return a sparsity for each group of the spec that together keep as many parameters as the spec does.

    They come from the sensitivity of each group pruned alone, on the training images `data`.
    """
    alone = [spec.but(groups=(group,), merge="calibrated", recovery="none", limit=None) for group in spec.groups]
    points = [point for one in alone for point in grid(one, sparsity=(0.3, 0.5, 0.7, 0.85))]
    table = sensitivity_matrix(sweep(points, session.on(data)), "calibrated")
    known = shapes(session.model, session.groups, session.example)
    share = known.size(dict.fromkeys(spec.groups, spec.sparsity)).params / known.dense.params
    found = suggest(table, known, "params", share)
    return {group: found.sparsities[group] for group in spec.groups}


def main(name: str, weights: str, path: str, sparsity: str = "0.5") -> None:
    spec = PruneSpec(
        model=name, dataset="cifar10", weights=weights, data_path=path, sparsity=float(sparsity), merge="drop",
        recovery="repair",  # so that no layers are shared with the session's network
    )  # fmt: skip
    session = open_session(spec)
    inner = [group.name for group in session.groups if group.name.endswith("conv1") and group.name != "conv1"]
    spec = spec.but(groups=tuple(inner))
    print(f"{name}, {len(inner)} groups, {sparsity}, dense {session.dense(None).accuracy:.1%}", flush=True)

    def show(title: str, spec: PruneSpec, *steps, images: int = 512) -> None:
        start = time.perf_counter()
        made = merged(spec, session)
        for step in steps:
            step(made.fit(session.calibration(spec.but(calibration=images))))
        seconds = time.perf_counter() - start
        made.small.card = session.card  # type: ignore[assignment]
        result = itf.evaluate(made.small, session.images(), None)
        params = sum(p.numel() for p in made.small.parameters())
        print(f"| {title} | {100 * result.accuracy:.1f} | {seconds:.0f} s | {params:,} |", flush=True)

    for criterion in ("l1", "greedy"):
        one = spec.but(criterion=criterion)
        show(f"calibrated, {criterion}", one, calibrate)
        show(f"refit, {criterion}", one, refit)
        show(f"refit, {criterion}, a second sweep", one, refit, refit)
        show(f"refit-all, {criterion}", one, refit_all)
        show(f"refit-all, {criterion}, 2,048 images", one, refit_all, images=2048)
    start = time.perf_counter()
    seen = session.calibration(spec.but(calibration=1000, seed=1))
    found = widths(session, spec, seen)
    print(f"widths by sensitivity, found in {time.perf_counter() - start:.0f} s: {found}", flush=True)
    one = spec.but(sparsities=tuple(found.values()))
    show("refit-all, l1, widths by sensitivity", one, refit_all)
    show("refit-all, l1, widths by sensitivity, 2,048 images", one, refit_all, images=2048)


if __name__ == "__main__":
    main(*sys.argv[1:])
