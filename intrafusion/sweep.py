"""Grids of specs, measured one after the other on one bench."""

import itertools
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

from intrafusion.run import Bench, Result, check, run
from intrafusion.spec import PruneSpec


def grid(base: PruneSpec, **choices: Sequence[Any]) -> list[PruneSpec]:
    """`base` with every combination of the given fields' choices; the last field varies fastest."""
    return [base.but(**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]


def sweep(
    specs: Iterable[PruneSpec], bench: Bench, known: MutableMapping[PruneSpec, Result] | None = None
) -> Iterator[Result]:
    """Check all specs, then measure them in order, yielding each result as it is there.

    known: results that need not be computed again; new ones are added to it.
    """
    specs = list(specs)
    known = {} if known is None else known
    for spec in specs:
        check(spec, bench)
    for spec in specs:
        if spec not in known:
            known[spec] = run(spec, bench)
        yield known[spec]
