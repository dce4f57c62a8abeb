"""What pruning each channel group alone does to accuracy: a cell for each group and sparsity, and what follows from them.

A group that is too small, or whose blocks are, keeps all its channels at low sparsities. Its accuracy then says nothing
of how much it bears, so such cells are told apart everywhere.
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

_AXES = ("groups", "sparsity", "seed")  # in what else they differ, the results of one matrix may not
_COLUMNS = (
    "accuracy", "low", "high", "dense_accuracy", "count", "total", "channels", "channels_before", "params",
    "params_before", "macs", "macs_before", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One group pruned alone at one sparsity: `results`, one a seed, at least one. Accuracies are means over the seeds."""

    results: tuple[Result, ...]

    @property
    def accuracy(self) -> float:
        return _mean(result.accuracy for result in self.results)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval; with several seeds, from the lowest end of theirs to the highest."""
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
        """Whether any channel went: where none did, the accuracy is the dense network's."""
        return self.least.prunes

    @property
    def complete(self) -> bool:
        """Whether every seed was measured on all its images."""
        return all(result.complete for result in self.results)


@dataclass(frozen=True)
class Gap:
    """Two cells on the same images: `pairs`, one a seed. prunes: whether any channel went in either; complete: both are."""

    pairs: tuple[Paired, ...]
    prunes: bool
    complete: bool

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second, a fraction; the mean over the seeds."""
        return _mean(pair.difference for pair in self.pairs)

    @property
    def interval(self) -> tuple[float, float]:
        """The paired 95 % interval; with several seeds, from the lowest end of theirs to the highest."""
        return _hull([pair.interval for pair in self.pairs])

    @property
    def decided(self) -> bool:
        """Whether the interval excludes no difference."""
        return not self.interval[0] <= 0 <= self.interval[1]

    @property
    def p(self) -> float:
        """McNemar's exact p, of the seed with the largest."""
        return max(pair.p for pair in self.pairs)

    @property
    def count(self) -> int:
        """Images that were compared, for the seed with the fewest."""
        return min(pair.count for pair in self.pairs)


C = TypeVar("C", Cell, Gap)


@dataclass(frozen=True, eq=False)
class Grid(Generic[C]):
    """g groups by s sparsities. groups: in network order; sparsities: ascending; cells: what is known, by both."""

    groups: tuple[str, ...]
    sparsities: tuple[float, ...]
    cells: dict[tuple[str, float], C]

    def values(self, name: str) -> np.ndarray:
        """An attribute of every cell: float64 (g, s), nan where the cell is not known."""
        return np.array(
            [
                [getattr(self.cells[group, s], name) if (group, s) in self.cells else np.nan for s in self.sparsities]
                for group in self.groups
            ],
            float,
        ).reshape(len(self.groups), len(self.sparsities))

    @property
    def prunes(self) -> np.ndarray:
        """bool (g, s): whether the cell is known and channels went in it."""
        return self.values("prunes") == 1

    @property
    def unpruned(self) -> np.ndarray:
        """bool (g, s): whether the cell is known and nothing was pruned in it, so that it says nothing."""
        return self.values("prunes") == 0


@dataclass(frozen=True, eq=False)
class Matrix(Grid[Cell]):
    """Accuracy of each group pruned alone at each sparsity, with one merge and criterion."""

    merge: str
    criterion: str

    @property
    def accuracy(self) -> np.ndarray:
        """float64 (g, s), fractions, nan where not measured. See `unpruned` before reading anything into it."""
        return self.values("accuracy")

    @property
    def dense(self) -> float:
        """The dense network's accuracy on the most images that any cell was measured on; nan without cells."""
        results = [result for cell in self.cells.values() for result in cell.results]
        return max(results, key=lambda result: result.count).dense_accuracy if results else np.nan


class Difference(Grid[Gap]):
    """Accuracy of one matrix minus that of another, cell by cell on the same images."""


def sensitivity_matrix(
    results: Iterable[Result],
    merge: str,
    criterion: str | None = None,
    groups: Sequence[str] | None = None,
    sparsities: Sequence[float] | None = None,
) -> Matrix:
    """Arrange the results that prune one group alone with this merge; of one spec the last one counts.

    criterion: None where all results share one. groups: names in network order, None for those measured, as they come.
    sparsities: None for those measured. Raises IntrafusionError when the results differ in more than group, sparsity and
    seed, so that a cell would have two meanings.
    """
    chosen = [result for result in alone(results) if result.spec.merge == merge and criterion in (None, result.spec.criterion)]
    for name in _varied(chosen):
        if name not in _AXES:
            values = ", ".join(dict.fromkeys(str(getattr(result.spec, name)) for result in chosen))
            raise IntrafusionError(f"these results differ in {name} ({values}): choose one of them")
    found: dict[tuple[str, float], list[Result]] = {}
    for result in sorted(chosen, key=lambda result: result.spec.seed):
        found.setdefault((result.spec.groups[0], _tidy(result.spec.sparsity)), []).append(result)
    names = tuple(dict.fromkeys(result.spec.groups[0] for result in chosen)) if groups is None else tuple(groups)
    shares = {sparsity for _, sparsity in found} if sparsities is None else {_tidy(s) for s in sparsities}
    cells = {place: Cell(tuple(own)) for place, own in found.items() if place[0] in names and place[1] in shares}
    used = criterion or (chosen[0].spec.criterion if chosen else "")
    return Matrix(names, tuple(sorted(shares)), cells, merge, used)


def alone(results: Iterable[Result]) -> list[Result]:
    """The results that prune one named group alone; of each spec the last one, in order of first appearance."""
    last = {result.spec: result for result in results if result.spec.groups != "all" and len(result.spec.groups) == 1}
    return list(last.values())


def difference(first: Matrix, second: Matrix) -> Difference:
    """What `first` keeps more than `second`, in each cell that both know, seed by seed on the same images.

    Both matrices' groups and sparsities make up the grid. Raises IntrafusionError when the images are not the same ones.
    """
    cells = {}
    for place, ours in first.cells.items():
        if (theirs := second.cells.get(place)) is not None:
            by_seed = {result.spec.seed: result for result in theirs.results}
            both = [(result, by_seed[result.spec.seed]) for result in ours.results if result.spec.seed in by_seed]
            both = both or [(ours.results[0], theirs.results[0])]  # no seed in common: refused, saying so
            pairs = tuple(paired(a, b) for a, b in both)
            cells[place] = Gap(pairs, ours.prunes or theirs.prunes, ours.complete and theirs.complete)
    groups = tuple(dict.fromkeys((*first.groups, *second.groups)))
    return Difference(groups, tuple(sorted({*first.sparsities, *second.sparsities})), cells)


@dataclass(frozen=True)
class Fragility:
    """How much accuracy a group loses when it is pruned alone.

    loss: the mean over the sparsities in `over`, a fraction; interval: the same of the ends of the cells' intervals; nan
    where nothing is known. safe: the largest of those sparsities up to which no cell loses more than `tolerance`, 0 where
    the first one does; None where nothing is known. note: why the loss says less than other groups', or "".
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
    """The groups, the most fragile first: by the area between the dense accuracy and the group's own curve.

    The area is taken over the sparsities at which channels really went, and divided by their range. Groups in which none
    went come last, then those not measured: neither is robust. tolerance: the loss, a fraction, that counts as none.
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
    """The area under a curve of straight pieces, divided by its width; the height of a single point."""
    return float(np.trapezoid(y, x) / (x[-1] - x[0])) if len(x) > 1 else float(y[0])


def table(results: Iterable[Result]) -> "pd.DataFrame":
    """One row a result that prunes one group alone: what it pruned, how, and what came of it; of one spec the last one.

    Accuracies, their intervals (low, high) and loss are fractions. Spec fields that differ among the results are columns
    too.
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
    """The spec fields in which the results differ."""
    if not results:
        return []
    return [name for name in results[0].spec.to_dict() if len({getattr(result.spec, name) for result in results}) > 1]


def _tidy(sparsity: float) -> float:
    """0.3 for 0.30000000000000004, so that sparsities that were computed fall on those that were written."""
    return round(sparsity, 9)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _hull(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in intervals), max(high for _, high in intervals)
