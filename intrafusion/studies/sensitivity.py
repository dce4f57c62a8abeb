"""Sensitivity of the accuracy to pruning each channel group alone: matrices over groups and sparsities, and rankings.

A group that is too small, or has blocks that are too small, keeps all its channels at low sparsities. Its accuracy then
says nothing about its sensitivity, so such cells are always marked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from intrafusion.errors import IntrafusionError
from intrafusion.studies.measurement import Result
from intrafusion.studies.paired_comparison import Paired, paired

if TYPE_CHECKING:
    import pandas as pd

_AXES = ("groups", "sparsity", "seed")  # the only fields in which the results of one matrix may differ
_COLUMNS = (
    "accuracy", "low", "high", "dense_accuracy", "count", "total", "channels", "channels_before", "params",
    "params_before", "macs", "macs_before", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One group pruned alone at one sparsity. results: one for each seed, at least one. Accuracies are means over seeds."""

    results: tuple[Result, ...]

    @property
    def accuracy(self) -> float:
        return _mean(result.accuracy for result in self.results)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval; with several seeds, from the lowest to the highest end of their intervals."""
        return _hull([result.interval for result in self.results])

    @property
    def loss(self) -> float:
        """Dense accuracy minus accuracy on the same images, as a fraction."""
        return _mean(result.dense_accuracy - result.accuracy for result in self.results)

    @property
    def seeds(self) -> int:
        return len(self.results)

    @property
    def least(self) -> Result:
        """The result measured on the fewest images; sizes and channels are the same in all."""
        return min(self.results, key=lambda result: result.count)

    @property
    def prunes(self) -> bool:
        """Whether any channel was removed; if none was, the accuracy is the dense network's."""
        return self.least.prunes

    @property
    def complete(self) -> bool:
        """Whether every seed was measured on all its images."""
        return all(result.complete for result in self.results)


@dataclass(frozen=True)
class Gap:
    """The difference between two cells on the same images.

    pairs: one for each seed. prunes: whether any channel was removed in either cell. complete: whether both are complete.
    """

    pairs: tuple[Paired, ...]
    prunes: bool
    complete: bool

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second, as a fraction; the mean over the seeds."""
        return _mean(pair.difference for pair in self.pairs)

    @property
    def interval(self) -> tuple[float, float]:
        """The paired 95 % interval, see `Paired`; with several seeds, from the lowest to the highest end of their intervals."""
        return _hull([pair.interval for pair in self.pairs])

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.interval[0] <= 0 <= self.interval[1]

    @property
    def p(self) -> float:
        """The p of `Paired`; the largest over the seeds."""
        return max(pair.p for pair in self.pairs)

    @property
    def count(self) -> int:
        """Number of images compared; the smallest over the seeds."""
        return min(pair.count for pair in self.pairs)


C = TypeVar("C", Cell, Gap)


@dataclass(frozen=True, eq=False)
class Grid(Generic[C]):
    """A grid of g groups by s sparsities.

    groups: in network order. sparsities: ascending. cells: the known cells, by group and sparsity.
    """

    groups: tuple[str, ...]
    sparsities: tuple[float, ...]
    cells: dict[tuple[str, float], C]

    def values(self, name: str) -> np.ndarray:
        """Return an attribute of every cell: float64 (g, s), nan where the cell is unknown."""
        return np.array(
            [
                [getattr(self.cells[group, s], name) if (group, s) in self.cells else np.nan for s in self.sparsities]
                for group in self.groups
            ],
            float,
        ).reshape(len(self.groups), len(self.sparsities))

    @property
    def prunes(self) -> np.ndarray:
        """bool (g, s): whether the cell is known and channels were removed in it."""
        return self.values("prunes") == 1

    @property
    def unpruned(self) -> np.ndarray:
        """bool (g, s): whether the cell is known but nothing was pruned in it, so that it is uninformative."""
        return self.values("prunes") == 0


@dataclass(frozen=True, eq=False)
class Matrix(Grid[Cell]):
    """Accuracy of each group pruned alone at each sparsity, with one merge and criterion."""

    merge: str
    criterion: str

    @property
    def accuracy(self) -> np.ndarray:
        """float64 (g, s), fractions, nan where not measured. Check `unpruned` before interpreting it."""
        return self.values("accuracy")

    @property
    def dense(self) -> float:
        """The dense network's accuracy on the most images that any cell was measured on; nan without cells."""
        results = [result for cell in self.cells.values() for result in cell.results]
        return max(results, key=lambda result: result.count).dense_accuracy if results else np.nan


class Difference(Grid[Gap]):
    """The accuracy of one matrix minus that of another, cell by cell on the same images."""


def sensitivity_matrix(
    results: Iterable[Result],
    merge: str,
    criterion: str | None = None,
    groups: Sequence[str] | None = None,
    sparsities: Sequence[float] | None = None,
) -> Matrix:
    """Arrange the results that prune one group alone with this merge in a matrix; the last result of each spec counts.

    criterion: None if all results share one. groups: names in network order; None for the measured groups in order of
    appearance. sparsities: None for the measured ones. Raises IntrafusionError if the results differ in more than group,
    sparsity and seed, because cells would then be ambiguous.
    """
    chosen = [result for result in alone(results) if result.spec.merge == merge and criterion in (None, result.spec.criterion)]
    for name in _varied(chosen):
        if name not in _AXES:
            values = ", ".join(dict.fromkeys(str(getattr(result.spec, name)) for result in chosen))
            raise IntrafusionError(f"these results differ in {name}; choose one of {values}")
    found: dict[tuple[str, float], list[Result]] = {}
    for result in sorted(chosen, key=lambda result: result.spec.seed):
        found.setdefault((result.spec.groups[0], _tidy(result.spec.sparsity)), []).append(result)
    names = tuple(dict.fromkeys(result.spec.groups[0] for result in chosen)) if groups is None else tuple(groups)
    shares = {sparsity for _, sparsity in found} if sparsities is None else {_tidy(s) for s in sparsities}
    cells = {place: Cell(tuple(own)) for place, own in found.items() if place[0] in names and place[1] in shares}
    used = criterion or (chosen[0].spec.criterion if chosen else "")
    return Matrix(names, tuple(sorted(shares)), cells, merge, used)


def alone(results: Iterable[Result]) -> list[Result]:
    """Return the results that prune one named group alone; the last one of each spec, in order of first appearance."""
    last = {result.spec: result for result in results if result.spec.groups != "all" and len(result.spec.groups) == 1}
    return list(last.values())


def difference(first: Matrix, second: Matrix) -> Difference:
    """Return the accuracy of `first` minus that of `second` in each cell that both know, seed by seed on the same images.

    The grid has the groups and sparsities of both matrices. Raises IntrafusionError if the images are not the same.
    """
    cells = {}
    for place, ours in first.cells.items():
        if (theirs := second.cells.get(place)) is not None:
            by_seed = {result.spec.seed: result for result in theirs.results}
            both = [(result, by_seed[result.spec.seed]) for result in ours.results if result.spec.seed in by_seed]
            both = both or [(ours.results[0], theirs.results[0])]  # without a common seed `paired` raises a clear error
            pairs = tuple(paired(a, b) for a, b in both)
            cells[place] = Gap(pairs, ours.prunes or theirs.prunes, ours.complete and theirs.complete)
    groups = tuple(dict.fromkeys((*first.groups, *second.groups)))
    return Difference(groups, tuple(sorted({*first.sparsities, *second.sparsities})), cells)


@dataclass(frozen=True)
class Fragility:
    """How much accuracy a group loses when it is pruned alone.

    loss: the mean over the sparsities in `over`, as a fraction. interval: the same mean of the ends of the cells'
    intervals. Both are nan if nothing is known. safe: the largest of those sparsities up to which no cell loses more than
    `tolerance`; 0 if the first cell does, None if nothing is known. note: why the loss is less reliable than that of other
    groups, or "".
    """

    group: str
    loss: float
    interval: tuple[float, float]
    safe: float | None
    tolerance: float
    over: tuple[float, ...]
    note: str


UNPRUNED, UNMEASURED = "nothing was pruned", "not measured yet"


def fragility(matrix: Matrix, tolerance: float = 0.01) -> list[Fragility]:
    """Rank the groups, the most fragile first, by the area between the dense accuracy and the group's own curve.

    The area is taken over the sparsities at which channels were removed, and divided by their range. Groups that lost no
    channels come after all others, followed by unmeasured groups; neither may be taken as robust. tolerance: the largest
    loss, as a fraction, that counts as none.
    """
    found = [_fragility(matrix, group, tolerance) for group in matrix.groups]
    return sorted(found, key=lambda f: ((UNPRUNED, UNMEASURED).index(f.note) + 1 if not f.over else 0, -f.loss))


def _fragility(matrix: Matrix, group: str, tolerance: float) -> Fragility:
    known = {s: matrix.cells[group, s] for s in matrix.sparsities if (group, s) in matrix.cells}
    over = tuple(s for s, cell in known.items() if cell.prunes)
    if not over:
        return Fragility(group, np.nan, (np.nan, np.nan), None, tolerance, (), UNPRUNED if known else UNMEASURED)
    cells = [known[s] for s in over]
    loss = np.array([cell.loss for cell in cells])
    low, high = (loss + [cell.accuracy - cell.interval[end] for cell in cells] for end in (1, 0))
    within = np.append(loss <= tolerance + 1e-9, False).argmin()
    note = "" if len(over) == len(matrix.sparsities) else f"{len(over)} of {len(matrix.sparsities)} sparsities"
    mean, lowest, highest = (_mean_height(over, values) for values in (loss, low, high))
    safe = over[within - 1] if within else 0.0
    return Fragility(group, mean, (lowest, highest), safe, tolerance, over, note)


def _mean_height(x: Sequence[float], y: np.ndarray) -> float:
    """Return the area under a piecewise linear curve divided by its width, or the height of a single point."""
    return float(np.trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 else float(y[0])


def table(results: Iterable[Result]) -> "pd.DataFrame":
    """Return a table with a row for each result that prunes one group alone; the last result of each spec counts.

    Accuracies, their intervals (low, high) and loss are fractions. Spec fields that differ among the results also have
    columns.
    """
    import pandas as pd

    chosen = alone(results)
    fields = ["sparsity", "merge", "criterion", "seed"]
    fields += [name for name in _varied(chosen) if name not in ("groups", *fields)]
    rows: list[dict[str, Any]] = []
    for result in chosen:
        low, high = result.interval
        known = {**result.__dict__, "low": low, "high": high}
        rows.append(
            {
                "group": result.spec.groups[0],
                **result.spec.only(tuple(fields)),
                **{name: known[name] for name in _COLUMNS},
                "loss": result.dense_accuracy - result.accuracy,
                "prunes": result.prunes,
                "complete": result.complete,
            }
        )
    return pd.DataFrame(rows, columns=["group", *fields, *_COLUMNS, "loss", "prunes", "complete"])


def _varied(results: Sequence[Result]) -> list[str]:
    """Return the names of the spec fields in which the results differ."""
    if not results:
        return []
    return [name for name in results[0].spec.to_dict() if len({getattr(result.spec, name) for result in results}) > 1]


def _tidy(sparsity: float) -> float:
    """Round a sparsity, 0.30000000000000004 to 0.3, so that computed values equal written ones."""
    return round(sparsity, 9)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _hull(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in intervals), max(high for _, high in intervals)
