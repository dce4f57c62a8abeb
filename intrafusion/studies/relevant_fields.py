"""What of a spec its result depends on, by what criteria, merges, solvers and recoveries declare that they read."""

from functools import lru_cache
from typing import Any

from intrafusion._registry import Entry, Registry
from intrafusion.pruning.importance import CRITERIA
from intrafusion.pruning.merge import MERGES
from intrafusion.pruning.transport.solvers import SOLVERS
from intrafusion.runtime.canonical import described, is_library
from intrafusion.spec import PruneSpec
from intrafusion.training.recovery import RECOVERIES

_COMPARED = ("cost", "bias")  # how channels are made vectors: what centroids are found from
_MOVED = ("distance", "p", "source", "target", "solver", "normalise")  # and what more it takes to move them
_DEFAULT = PruneSpec()


def relevant(spec: PruneSpec) -> PruneSpec:
    """The spec with the fields that its result cannot depend on at their defaults, and groups in alphabetical order.

    Specs for which this is equal have equal results on the same network, images and code. A spec with a name that is not
    registered is returned as it is. Fields that an entry declares as its knobs count for the entries that declare them alone,
    all others always. `seed` does: images are looked at in an order that it draws.
    """
    chosen: list[tuple[Registry, str]] = [
        (CRITERIA, spec.criterion),
        (MERGES, spec.merge),
        (SOLVERS, spec.solver),
        (RECOVERIES, spec.recovery),
    ]
    if not all(name in registry for registry, name in chosen):
        return spec
    declared = {knob for registry, _ in chosen for entry in registry.values() for knob in entry.knobs}
    if not MERGES[spec.merge].transports:
        chosen.remove((SOLVERS, spec.solver))
        declared |= {*_MOVED, *(_COMPARED if spec.anchors == "important" else ())}
    idle = declared - {knob for registry, name in chosen for knob in registry[name].knobs}
    spec = spec.but(**_DEFAULT.only(tuple(idle)), **_in_order(spec))
    return spec if calibrates(spec) else spec.but(calibration=_DEFAULT.calibration)


def own_code(spec: PruneSpec) -> list[str]:
    """The code of the spec's methods, as far as it is no part of this package: for what others register has no version."""
    named = (CRITERIA, spec.criterion), (MERGES, spec.merge), (SOLVERS, spec.solver), (RECOVERIES, spec.recovery)
    return [code for registry, name in named if name in registry and (code := _code(registry[name]))]


@lru_cache
def _code(entry: Entry) -> str:
    functions = [one for one in (entry.function, entry.fit) if one and not is_library(one)]
    return described(functions) if functions else ""


def calibrates(spec: PruneSpec) -> bool:
    """Whether pruning, merging or recovering, as this relevant part of a spec says, looks at calibration images."""
    looking = CRITERIA[spec.criterion].needs, MERGES[spec.merge].needs
    return spec.cost == "activations" or any(n != "nothing" for n in looking) or RECOVERIES[spec.recovery].needs == "images"


def trains(spec: PruneSpec) -> bool:
    """Whether the spec's recovery trains: then it looks at training images, and its result depends on the device."""
    return spec.recovery in RECOVERIES and RECOVERIES[spec.recovery].needs == "labels"


def _in_order(spec: PruneSpec) -> dict[str, Any]:
    """The spec's groups in alphabetical order, and their sparsities; one for all, where they are equal."""
    if isinstance(spec.groups, str):
        return {}
    if spec.sparsities is None:
        return {"groups": tuple(sorted(spec.groups))}
    groups, sparsities = zip(*sorted(zip(spec.groups, spec.sparsities, strict=True)), strict=True)
    if len({*sparsities}) == 1:
        return {"groups": groups, "sparsity": sparsities[0], "sparsities": None}
    return {"groups": groups, "sparsities": sparsities}
