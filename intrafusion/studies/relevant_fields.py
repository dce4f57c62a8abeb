"""The fields of a spec that affect its result, as declared by criteria, merges, solvers and recoveries."""

from functools import lru_cache
from typing import Any

from intrafusion._registry import Entry, Registry
from intrafusion.pruning.importance import CRITERIA
from intrafusion.pruning.merge import MERGES
from intrafusion.pruning.transport.solvers import SOLVERS
from intrafusion.runtime.canonical import described, is_library
from intrafusion.spec import PruneSpec
from intrafusion.training.recovery import RECOVERIES

_COMPARED = ("cost", "bias")  # how channels become vectors, from which centroids are found
_MOVED = ("distance", "p", "source", "target", "solver", "normalise")  # further fields that only transport reads
_DEFAULT = PruneSpec()


def relevant(spec: PruneSpec) -> PruneSpec:
    """Return the spec with the fields that cannot affect its result at their defaults, and groups in alphabetical order.

    Specs with equal relevant specs have equal results on the same network, images and code. A spec with an unregistered
    name is returned unchanged. A field that registry entries declare as a knob counts only for the entries that declare it;
    all other fields always count. `seed` always counts, because it determines the order of the images.
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
    """Return the code of those of the spec's methods that are not part of this package.

    Methods that others register have no version, so their code identifies them.
    """
    named = (CRITERIA, spec.criterion), (MERGES, spec.merge), (SOLVERS, spec.solver), (RECOVERIES, spec.recovery)
    return [code for registry, name in named if name in registry and (code := _code(registry[name]))]


@lru_cache
def _code(entry: Entry) -> str:
    functions = [one for one in (entry.function, entry.fit) if one and not is_library(one)]
    return described(functions) if functions else ""


def calibrates(spec: PruneSpec) -> bool:
    """Return whether pruning, merging or recovery uses calibration images. spec: as returned by `relevant`."""
    looking = CRITERIA[spec.criterion].needs, MERGES[spec.merge].needs
    return spec.cost == "activations" or any(n != "nothing" for n in looking) or RECOVERIES[spec.recovery].needs == "images"


def trains(spec: PruneSpec) -> bool:
    """Return whether the spec's recovery trains; it then uses training images, and its result depends on the device."""
    return spec.recovery in RECOVERIES and RECOVERIES[spec.recovery].needs == "labels"


def _in_order(spec: PruneSpec) -> dict[str, Any]:
    """Return the spec's groups in alphabetical order and their sparsities; equal ones become a single sparsity."""
    if isinstance(spec.groups, str):
        return {}
    if spec.sparsities is None:
        return {"groups": tuple(sorted(spec.groups))}
    groups, sparsities = zip(*sorted(zip(spec.groups, spec.sparsities, strict=True)), strict=True)
    if len({*sparsities}) == 1:
        return {"groups": groups, "sparsity": sparsities[0], "sparsities": None}
    return {"groups": groups, "sparsities": sparsities}
