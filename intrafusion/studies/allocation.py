"""Choose a sparsity for each group so that the network fits a budget with the least expected loss.

The loss of each group pruned alone is measured (`sensitivity`). That the losses of several groups add up is an
assumption: their joint loss is only known once they are pruned together. The sizes are exact.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from intrafusion.errors import IntrafusionError, check_choice
from intrafusion.evaluation.accuracy import Size, layer_sizes, size
from intrafusion.pruning.groups.group import CONSUMER, PAD, Group
from intrafusion.pruning.groups.norms import fold_groups
from intrafusion.pruning.groups.surgery import shrink
from intrafusion.pruning.transport.planning import group_counts
from intrafusion.studies.sensitivity import Matrix

TARGETS = {
    "params": "share of the parameters that may stay",
    "macs": "share of the multiply-accumulates that may stay",
    "accuracy": "accuracy that must be expected",
}


_TRIES = 3  # extra searches, as multiply-accumulates outside of the layers also shrink and leave room in the budget


@dataclass(frozen=True, eq=False)
class Shapes:
    """The shapes of a network's layers as functions of the channels removed from its groups; made by `shapes`.

    groups: the prunable groups. dense: the size of the dense network. spans: each group's slice of the B blocks. For each
    of the L layers: rows (L,) and columns (L,) are its numbers of output and input channels; cut_rows and cut_columns
    (L, B) are how many of them are removed with each channel of each block; weights (L,) and macs (L,) are per row and
    column; biases (L,) are per row. fixed: parameters that no group affects. rest: multiply-accumulates that are not a
    product of a layer's rows and columns, such as those of attention. network: the folded network if `rest` depends on the
    groups and must be recounted, else None.
    """

    groups: tuple[Group, ...]
    dense: Size
    spans: dict[str, slice]
    rows: np.ndarray
    columns: np.ndarray
    cut_rows: np.ndarray
    cut_columns: np.ndarray
    weights: np.ndarray
    biases: np.ndarray
    macs: np.ndarray
    fixed: int
    rest: int
    network: nn.Module | None
    example: Tensor

    def removed(self, sparsities: Mapping[str, float]) -> np.ndarray:
        """Return the number of channels removed from each block: int64 (B,). Groups that are not named stay whole."""
        gone = np.zeros(self.cut_rows.shape[1], np.int64)
        for group in self.groups:
            if sparsity := sparsities.get(group.name):
                kept = np.array(group_counts(group, sparsity))
                gone[self.spans[group.name]] = group.block.bincount().numpy() - kept
        return gone

    def size(self, sparsities: Mapping[str, float]) -> Size:
        """Return the exact size of the network that `prune_groups` makes with these sparsities, by group name.

        Its norms are folded, so it may have fewer parameters than the dense network even if nothing is pruned. Layers added
        by a recovery are not counted. Raises IntrafusionError for a name that is not a prunable group.
        """
        known = [group.name for group in self.groups]
        if unknown := [name for name in sparsities if name not in known]:
            raise IntrafusionError(f"no prunable group {unknown[0]!r} in this network; choose one of {', '.join(known)}")
        params, macs = self._of_layers(sparsities)
        return Size(params, macs + self.rest_of(sparsities), self.dense.left_out)

    def rest_of(self, sparsities: Mapping[str, float]) -> int:
        """Return the value of `rest` after pruning with these sparsities."""
        if self.network is None:
            return self.rest
        small = copy.deepcopy(self.network)
        shrink(small, {g: _some(g, sparsities[g.name]) for g in self.groups if sparsities.get(g.name)})
        return size(small, self.example).macs - self._of_layers(sparsities)[1]

    def _of_layers(self, sparsities: Mapping[str, float]) -> tuple[int, int]:
        """Return the number of all parameters, and of the multiply-accumulates that scale with rows and columns."""
        gone = self.removed(sparsities)
        rows, columns = self.rows - self.cut_rows @ gone, self.columns - self.cut_columns @ gone
        params = self.fixed + int((rows * (columns * self.weights + self.biases)).sum())
        return params, int((rows * columns * self.macs).sum())


def _some(group: Group, sparsity: float) -> Tensor:
    """Return the first channels of each block, as many as stay: int64 (k,), sorted."""
    counts = group_counts(group, sparsity)
    return torch.cat([(group.block == block).nonzero()[:count, 0] for block, count in enumerate(counts)]).sort().values


def shapes(model: nn.Module, groups: Sequence[Group], example: Tensor) -> Shapes:
    """Return the layer shapes of `model`. groups: all groups from `find_groups`. example: one input, float (1, C, H, W)."""
    folded = copy.deepcopy(model)
    fold_groups(folded, groups)
    sizes = layer_sizes(folded, example)
    layers = [(n, m) for n, m in folded.named_modules() if isinstance(m, _ConvNd | nn.Linear | _BatchNorm)]
    counted = [_describe(m, sizes[name].macs if name in sizes else 0) for name, m in layers]
    described = np.array(counted, np.int64).reshape(-1, 5)
    rows, columns, weights, biases, each = described.T
    number = {name: i for i, (name, _) in enumerate(layers)}
    prunable = tuple(group for group in groups if group.reason is None)
    blocks = [(group, block) for group in prunable for block in range(int(group.block.max()) + 1)]
    owners = [group.name for group, _ in blocks]
    spans = {name: slice(owners.index(name), owners.index(name) + owners.count(name)) for name in owners}
    cuts = np.zeros((2, len(layers), len(blocks)), np.int64)
    for b, (group, block) in enumerate(blocks):
        for layer in group.layers:
            holds = bool(layer.present()[group.block == block].all())
            if layer.role != PAD and layer.name in number and holds:
                cuts[int(layer.role == CONSUMER), number[layer.name], b] += layer.positions.shape[1]
    fixed = sum(p.numel() for p in folded.parameters()) - int((rows * (columns * weights + biases)).sum())
    whole = Shapes(
        prunable, size(model, example), spans, rows, columns, cuts[0], cuts[1], weights, biases, each, fixed, 0, folded, example
    )
    made = replace(whole, rest=whole.rest_of({}))
    changes = made.rest_of({group.name: 0.5 for group in prunable}) != made.rest
    return made if changes else replace(made, network=None)


def _describe(module: nn.Module, macs: int) -> tuple[int, int, int, int, int]:
    """Return a layer's rows and columns, its weights per row and column, biases per row, and MACs per row and column."""
    if isinstance(module, _BatchNorm):
        return module.num_features, 1, 0, sum(p.numel() for p in module.parameters()) // module.num_features, 0
    assert isinstance(module, _ConvNd | nn.Linear)
    rows, columns = module.weight.shape[:2]
    entries = rows * columns
    return rows, columns, module.weight.numel() // entries, int(module.bias is not None), macs // entries


@dataclass(frozen=True)
class Suggestion:
    """Suggested sparsities for the groups of a network. All accuracies are fractions.

    merge: the merge with which the losses were measured. sparsities: of every prunable group, in network order; 0 for
    groups left whole. channels: for each group, how many channels stay and how many there are. accuracy: the expected
    accuracy if losses add up. size: the exact size after pruning. dense: the size of the dense network. met: whether the
    target is met. note: why not, or "".
    """

    merge: str
    sparsities: dict[str, float]
    channels: dict[str, tuple[int, int]]
    accuracy: float
    dense_accuracy: float
    size: Size
    dense: Size
    met: bool
    note: str


def suggest(matrix: Matrix, shapes: Shapes, target: str, value: float, smaller: str = "macs") -> Suggestion:
    """Suggest a sparsity for each group, among the measured ones, that meets a target of TARGETS.

    target "params" or "macs": minimise the expected loss while keeping at most the share `value` of the dense network's
    parameters or multiply-accumulates. target "accuracy": find the smallest network, in `smaller` ("params" or "macs"),
    with an expected accuracy of at least `value`. A group's loss is taken to be non-decreasing in its sparsity, because a
    measured decrease is noise. The search is greedy: it takes the step with the least loss for each unit saved, which may
    skip sparsities, and then moves one or two groups at a time while that helps. The result is near the optimum but not
    always optimal. Raises IntrafusionError for an unknown target, a value outside (0, 1], or if nothing was measured.
    """
    check_choice("target", target, tuple(TARGETS))
    check_choice("measure of size", smaller, ("params", "macs"))
    if not 0 < value <= 1:
        raise IntrafusionError(f"{target} must be a number above 0 and at most 1, not {value}")
    unit = smaller if target == "accuracy" else target
    most = np.inf if target == "accuracy" else value * getattr(shapes.dense, unit)
    allowed = matrix.dense - value + 1e-12 if target == "accuracy" else np.inf
    search = _Search(matrix, shapes, unit, most, allowed)
    search.run()
    for _ in range(_TRIES):
        rest = shapes.rest_of(search.sparsities())
        if rest == search.shapes.rest:
            break
        again = _Search(matrix, replace(shapes, rest=rest), unit, most, allowed)
        again.run()
        if shapes.rest_of(again.sparsities()) > rest:  # larger than this search assumed
            break
        search = again
    sparsities = search.sparsities()
    after, expected = shapes.size(sparsities), max(0.0, matrix.dense - search.loss())
    return Suggestion(
        matrix.merge,
        sparsities,
        {g.name: (sum(group_counts(g, sparsities[g.name])), g.size) for g in shapes.groups},
        expected,
        matrix.dense,
        after,
        shapes.dense,
        *_verdict(target, value, unit, expected, after, shapes.dense),
    )


def _verdict(target: str, value: float, unit: str, expected: float, after: Size, dense: Size) -> tuple[bool, str]:
    """Return whether the target is met, and a line that says why not, or ""."""
    if target == "accuracy":
        met = expected >= value - 1e-9
        return (
            met,
            "" if met else f"{value:.1%} is above the {expected:.1%} of the unpruned network; choose a lower target",
        )
    stays, whole = getattr(after, unit), getattr(dense, unit)
    if stays <= value * whole:
        return True, ""
    word = {"params": "parameters", "macs": "MACs"}[unit]
    return False, f"{stays / whole:.1%} of the {word} remain even at the largest measured sparsities; measure larger ones"


class _Search:
    """A local search over one choice for each group: no pruning, or one of its measured sparsities.

    It minimises the loss within the size `most` or, if `most` is infinite, the size within the loss `allowed`. The c
    choices of all groups form one list. A layer's size is rows times columns, each reduced by what every group's choice
    cuts, so the sizes after any one step and after any two steps are computed for all choices at once.
    """

    def __init__(self, matrix: Matrix, shapes: Shapes, unit: str, most: float, allowed: float):
        self.shapes, self.most, self.allowed = shapes, most, allowed
        options = [(i, *option) for i, group in enumerate(shapes.groups) for option in _options(matrix, group)]
        if len(options) == len(shapes.groups):
            raise IntrafusionError(
                f"no group of this network was measured with merge {matrix.merge} at a sparsity that prunes it; run the "
                "study first"
            )
        self.owner = np.array([i for i, _, _ in options])
        self.sparsity, self.losses = (np.array([option[k] for option in options]) for k in (1, 2))
        gone = np.stack([shapes.removed({shapes.groups[i].name: s}) for i, s, _ in options])
        self.rows, self.columns = (gone @ cut.T.astype(float) for cut in (shapes.cut_rows, shapes.cut_columns))
        self.weight = (shapes.weights if unit == "params" else shapes.macs).astype(float)
        self.bias = shapes.biases * float(unit == "params")
        self.fixed = shapes.fixed if unit == "params" else shapes.rest
        self.at = self._all_at(0.0)

    def run(self) -> None:
        """Search from the dense network, the smallest network, and uniform sparsities, and keep the best result."""
        found = []
        for sparsity, begin in itertools.product(self._starts(), (self.take, self.give_back)):
            self.at = self._all_at(sparsity)
            begin()
            self.improve()
            found.append((*self._missed(), self.at))
        self.at = min(found, key=lambda end: end[:2])[2]

    def _missed(self) -> tuple[float, float]:
        """Return by how much the target is missed, and the value of the objective."""
        size, loss = self._steps()[0], self.loss()
        return max(0.0, size - self.most, loss - self.allowed), loss if np.isfinite(self.most) else size

    def _starts(self) -> list[float]:
        """Return zero, the largest sparsity, and the two adjacent uniform sparsities between which the target is met."""
        shares, beyond = np.unique(self.sparsity), []
        for sparsity in shares:
            self.at = self._all_at(sparsity)
            beyond.append(self._missed()[0] > 0)
        edge = int(np.argmax(np.array(beyond) != beyond[0]))
        return list(dict.fromkeys([shares[0], shares[-1], shares[max(edge - 1, 0)], shares[edge]]))

    def _all_at(self, sparsity: float) -> np.ndarray:
        """Return the choice of each group at its largest measured sparsity that is at most this one."""
        return np.array(
            [np.flatnonzero((self.owner == i) & (self.sparsity <= sparsity))[-1] for i in range(len(self.shapes.groups))]
        )

    def sparsities(self) -> dict[str, float]:
        return {group.name: float(self.sparsity[c]) for group, c in zip(self.shapes.groups, self.at, strict=True)}

    def loss(self) -> float:
        return float(self.losses[self.at].sum())

    def _steps(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Return the present size and, after each choice, the size (c,) and the loss (c,)."""
        now = self.at[self.owner]
        rows, columns = self.rows - self.rows[now], self.columns - self.columns[now]
        height = self.shapes.rows - self.rows[self.at].sum(0)
        width = self.shapes.columns - self.columns[self.at].sum(0)
        size = self.fixed + float((height * (width * self.weight + self.bias)).sum())
        sizes = self.fixed + ((height - rows) * ((width - columns) * self.weight + self.bias)).sum(1)
        return size, sizes, self.loss() + self.losses - self.losses[now]

    def _pairs(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Return the present size and, after each pair of choices, the size (c, c) and the loss (c, c)."""
        size, sizes, losses = self._steps()
        now = self.at[self.owner]
        cross = ((self.rows - self.rows[now]) * self.weight) @ (self.columns - self.columns[now]).T
        return size, sizes[:, None] + (sizes - size) + cross + cross.T, losses[:, None] + (losses - self.loss())

    def take(self) -> None:
        """Prune in steps of the least loss for each unit saved, until the size fits or no more loss is allowed."""
        while True:
            size, sizes, losses = self._steps()
            can = (sizes < size) & (losses <= self.allowed)
            if size <= self.most < np.inf or not can.any():
                return
            self._step(can, losses - self.loss(), size - sizes)

    def give_back(self) -> None:
        """Restore in steps of the least size for each unit of loss regained.

        Stops once the loss is allowed, or no step fits the size.
        """
        while True:
            size, sizes, losses = self._steps()
            can = (losses < self.loss() - 1e-12) & (sizes <= self.most)
            if self.loss() <= self.allowed < np.inf or not can.any():
                return
            self._step(can, sizes - size, self.loss() - losses)

    def _step(self, can: np.ndarray, price: np.ndarray, gain: np.ndarray) -> None:
        """Take the feasible choice with the least price for its gain; of equal ratios, the one with the largest gain."""
        ratio = np.where(can, price / np.where(can, gain, 1), np.inf)
        self._take(np.lexsort((-gain, ratio))[0])

    def improve(self) -> None:
        """Move one or two groups at a time while that improves the objective within the constraint."""
        other = self.owner[:, None] != self.owner
        while True:
            allows = other | np.isin(np.arange(len(self.owner)), self.at)  # the second step may change nothing
            size, both, lost = self._pairs()
            goal, now = (lost, self.loss()) if np.isfinite(self.most) else (both, size)
            goal = np.where(allows & (both <= self.most) & (lost <= self.allowed), goal, np.inf)
            first, second = np.unravel_index(goal.argmin(), goal.shape)
            if not goal[first, second] < now - 1e-9 * max(1e-3, abs(now)):
                return
            self._take(second)  # before the first: if it changes nothing, it may belong to the same group as the first
            self._take(first)

    def _take(self, choice: np.intp) -> None:
        self.at[self.owner[choice]] = choice


def _options(matrix: Matrix, group: Group) -> list[tuple[float, float]]:
    """Return (sparsity, loss) of no pruning and of each measured sparsity that prunes the group; losses never decrease."""
    options = [(0.0, 0.0)]
    for sparsity in matrix.sparsities:
        cell = matrix.cells.get((group.name, sparsity))
        if cell is not None and cell.prunes:
            options.append((sparsity, max(options[-1][1], cell.loss)))
    return options
