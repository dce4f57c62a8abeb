"""The pruning method on a toy network that can be inspected completely: two inputs, a few neurons, two classes.

The method itself is computed by `score`, `plan` and `prune`, as for any network. This module holds the network, and the
terms of which those results are sums, so that a reader can check them by hand.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from intrafusion._registry import CRITERIA
from intrafusion.errors import IntrafusionError
from intrafusion.evaluation.accuracy import Evaluation, wilson
from intrafusion.models.architectures import mlp
from intrafusion.pruning.groups.find import find_groups
from intrafusion.pruning.groups.group import Group
from intrafusion.pruning.importance import score
from intrafusion.pruning.pruner import prune
from intrafusion.pruning.transport.planning import TransportPlan, plan
from intrafusion.pruning.transport.provenance import moves

CLASSES = ("outer", "inner")
WEIGHTS = ("w1", "w2", "b", "v1", "v2")
LIMIT = 3.0  # weights set by hand must be in [-LIMIT, LIMIT]
SEED = 14
_EXAMPLE = torch.zeros(1, 2)
_CHANGE = re.compile(r"(\d+)\.(\w+)=(\S+)")


def toy_points(count: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return points of two noisy rings around the origin, float64 (count, 2), and their class in CLASSES, int64 (count,)."""
    from sklearn.datasets import make_circles

    X, y = make_circles(count, noise=0.08, factor=0.5, random_state=seed)
    return torch.from_numpy(X) * 1.2, torch.from_numpy(y)


def train_toy(seed: int = SEED, hidden: int = 6, changes: str = "") -> nn.Sequential:
    """Train Linear(2, hidden), ReLU, Linear(hidden, 2) in float64 on `toy_points()`; round its weights to two decimals.

    Weights start small and decay, so that some neurons become similar. changes: weights to set by hand after training, in
    the format of `parse_changes`.
    """
    model, generator = mlp((2, hidden, 2)).double(), torch.Generator().manual_seed(seed)
    X, y = toy_points()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.01)
    for _ in range(200):
        optimiser.zero_grad()
        cross_entropy(model(X), y).backward()
        optimiser.step()
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(parameter.round(decimals=2))
    return changed(model, parse_changes(changes, hidden))


def numbers(model: nn.Module) -> Tensor:
    """Return a row for each neuron with a column for each of WEIGHTS: float64 (n, 5).

    w1, w2 and b compute the neuron; v1 and v2 are its weights in the two outputs.
    """
    writes, reads = _layers(model)
    return torch.cat([writes.weight, writes.bias[:, None], reads.weight.T], 1).detach()


def toy_activations(model: nn.Sequential, place: tuple[float, float]) -> Tensor:
    """Return the activation of each neuron, after ReLU, at a point of the plane: (n,)."""
    with torch.no_grad():
        return model[:-1](torch.tensor([place], dtype=torch.float64))[0]


def toy_outputs(model: nn.Module, place: tuple[float, float]) -> Tensor:
    """Return the network's logits at a point of the plane, one for each class: (2,)."""
    with torch.no_grad():
        return model(torch.tensor([place], dtype=torch.float64))[0]


def output_bias(model: nn.Module) -> Tensor:
    """Return the biases of the two outputs, which pruning does not change: (2,)."""
    return _layers(model)[1].bias


def _layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def parse_changes(text: str, hidden: int) -> dict[tuple[int, str], float]:
    """Parse weights set by hand: "3.w1=0.5 3.b=-1" -> {(3, "w1"): 0.5, (3, "b"): -1.0}.

    Raises IntrafusionError for a malformed change, a neuron that is not one of `hidden`, a name that is not in WEIGHTS, or a
    number outside [-LIMIT, LIMIT].
    """
    changes = {}
    for word in text.split():
        found, shown = _CHANGE.fullmatch(word), repr(word[:20])
        try:
            if found is None:
                raise ValueError
            neuron, name, value = int(found[1]), found[2], float(found[3])
        except ValueError:
            raise IntrafusionError(f"invalid change {shown}; write neuron.weight=number, such as 3.w1=0.5") from None
        if neuron >= hidden:
            raise IntrafusionError(f"invalid change {shown}; neurons are 0 to {hidden - 1}")
        if name not in WEIGHTS:
            raise IntrafusionError(f"invalid change {shown}; weights are {', '.join(WEIGHTS)}")
        if not abs(value) <= LIMIT:
            raise IntrafusionError(f"invalid change {shown}; weights are between {-LIMIT:g} and {LIMIT:g}")
        changes[neuron, name] = value
    return changes


def write_changes(changes: Mapping[tuple[int, str], float]) -> str:
    """Write changes as text for `parse_changes`."""
    return " ".join(f"{neuron}.{name}={value:g}" for (neuron, name), value in sorted(changes.items()))


def changed(model: nn.Sequential, changes: Mapping[tuple[int, str], float]) -> nn.Sequential:
    """Return a copy of the network with these weights set."""
    model = copy.deepcopy(model)
    (writes, reads), rows = _layers(model), numbers(model)
    for (neuron, name), value in changes.items():
        rows[neuron, WEIGHTS.index(name)] = value
    for parameter, values in ((writes.weight, rows[:, :2]), (writes.bias, rows[:, 2]), (reads.weight, rows[:, 3:].T)):
        parameter.copy_(values)
    return model


def sparsity(hidden: int, stay: int) -> float:
    """Return the sparsity, to two decimals, at which `stay` of `hidden` neurons are kept."""
    return (hidden - stay) * 100 // hidden / 100


@dataclass(frozen=True, eq=False)
class Lesson:
    """A network of n neurons, the pruning options, and the result of each step of the method."""

    dense: nn.Sequential
    group: Group
    criterion: str
    sparsity: float
    p: float
    scores: Tensor
    plan: TransportPlan
    dropped: nn.Module
    fused: nn.Module

    @property
    def kept(self) -> list[int]:
        """The neurons that are kept."""
        return self.plan.kept.tolist()

    @property
    def gone(self) -> list[int]:
        """The neurons that are removed."""
        return [neuron for neuron in range(self.group.size) if neuron not in self.kept]

    def home(self, neuron: int) -> int:
        """Return the kept neuron into which most of a neuron is fused; a kept neuron's home is itself."""
        return self.kept[int(self.plan.matrix[:, neuron].argmax())]

    def moves(self) -> list[dict[str, Any]]:
        """Return `provenance.moves` without mass that stays in place; masses times costs sum to the total cost."""
        return [move for move in moves(self.plan) if move["channel"] != move["target"]]

    def crowded_out(self) -> list[int]:
        """Return the neurons with mass that goes beyond the nearest kept neuron, because that has no capacity left."""
        nearest = self.plan.cost.min(1).values
        return sorted({move["channel"] for move in self.moves() if move["cost"] > nearest[move["channel"]] + 1e-9})


def open_lesson(dense: nn.Sequential, stay: int, criterion: str = "l1", p: float = 1) -> Lesson:
    """Score, plan and prune a trained toy network with the functions that prune any network."""
    group = find_groups(dense, _EXAMPLE)[0]
    share = sparsity(group.size, stay)
    scores = score(dense, group, criterion)
    made = plan(dense, group, scores, share, p=p)
    dropped, fused = (prune(dense, _EXAMPLE, share, criterion, merge, p=p) for merge in ("drop", "fusion"))
    return Lesson(dense, group, criterion, share, p, scores, made, dropped, fused)


def criteria(dense: nn.Module) -> list[str]:
    """Return the registered criteria that can score this network: they need no images and nothing that it lacks."""
    group, usable = find_groups(dense, _EXAMPLE)[0], []
    for name, entry in CRITERIA.items():
        if entry.needs == "nothing":
            try:
                score(dense, group, name)
            except IntrafusionError:
                continue
            usable.append(name)
    return usable


def measure_toy(model: nn.Module) -> Evaluation:
    """Measure the accuracy on 400 points outside the training set, the same for every network."""
    X, y = toy_points(400, seed=1)
    with torch.no_grad():
        correct = model(X).argmax(1) == y
    hits = int(correct.sum())
    return Evaluation(hits / len(y), wilson(hits, len(y)), len(y), correct)


def decision(model: nn.Module, reach: float = 1.6, side: int = 65) -> tuple[Tensor, Tensor]:
    """Return a grid's coordinates (side,) and the margin of "inner" over "outer" at each point (side, side).

    The margin is a difference of logits; rows are y, columns are x.
    """
    axis = torch.linspace(-reach, reach, side, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    with torch.no_grad():
        outer, inner = model(torch.stack([x, y], -1).reshape(-1, 2)).unbind(1)
    return axis, (inner - outer).reshape(side, side)


@dataclass(frozen=True)
class ScoreTerms:
    """The terms of a neuron's score.

    writes, reads: |weight|^power of each weight. own: mean of their two sums. average: mean of `own` over all neurons.
    """

    writes: tuple[float, float]
    reads: tuple[float, float]
    own: float
    average: float
    score: float


def score_terms(model: nn.Module, neuron: int, power: int = 1) -> ScoreTerms:
    """Return the terms of the l1 score (power 1) or the l2 score (power 2) of a neuron."""
    sizes = numbers(model).abs() ** power
    own = (sizes[:, :2].sum(1) + sizes[:, 3:].sum(1)) / 2
    w1, w2, _, v1, v2 = sizes[neuron].tolist()
    mine, average = float(own[neuron]), float(own.mean())
    return ScoreTerms((w1, w2), (v1, v2), mine, average, mine / (average or 1))


@dataclass(frozen=True)
class DistanceTerms:
    """The terms of the distance between two neurons.

    lengths: of both vectors (w1, w2, v1, v2). units: both vectors divided by their lengths. gaps: |difference| of each entry.
    """

    lengths: tuple[float, float]
    units: tuple[tuple[float, ...], tuple[float, ...]]
    gaps: tuple[float, ...]
    distance: float


def distance_terms(model: nn.Module, neuron: int, other: int, p: float = 1) -> DistanceTerms:
    """Return the terms of the cost between two neurons: the p-norm distance of their unit vectors, without biases."""
    vectors = numbers(model)[[neuron, other]][:, [0, 1, 3, 4]]
    first, second = (float(vector.norm()) for vector in vectors)
    one, two = (tuple((vector / (vector.norm() or 1)).tolist()) for vector in vectors)
    gaps = tuple(abs(a - b) for a, b in zip(one, two, strict=True))
    return DistanceTerms((first, second), (one, two), gaps, sum(gap**p for gap in gaps) ** (1 / p))


def fused_terms(lesson: Lesson, target: int) -> list[tuple[int, float, Tensor]]:
    """Return the neurons fused into a kept neuron: (neuron, its weight in T, its WEIGHTS (5,)); the kept one is first."""
    shares = lesson.plan.matrix[lesson.kept.index(target)]
    parts = sorted(shares.nonzero()[:, 0].tolist(), key=lambda neuron: (neuron != target, neuron))
    return [(neuron, float(shares[neuron]), numbers(lesson.dense)[neuron]) for neuron in parts]


def doubled_costs(lesson: Lesson, neuron: int) -> Tensor:
    """Return the costs (n, k) after doubling every weight of a neuron."""
    row = zip(WEIGHTS, numbers(lesson.dense)[neuron].tolist(), strict=True)
    louder = changed(lesson.dense, {(neuron, name): 2 * value for name, value in row})
    return plan(louder, lesson.group, lesson.scores, lesson.sparsity, p=lesson.p).cost


def telling_point(lesson: Lesson) -> tuple[float, float]:
    """Find the point, to one decimal, where the dropped and the fused network disagree most clearly.

    If they agree everywhere, it is the point where the fused network is most confident.
    """
    axis = torch.arange(-12, 13, dtype=torch.float64) / 10
    places = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        dropped, fused = (torch.diff(model(places))[:, 0] for model in (lesson.dropped, lesson.fused))
    apart = torch.minimum(dropped.abs(), fused.abs()) * (dropped.sign() != fused.sign())
    x, y = places[int((apart if apart.any() else fused.abs()).argmax())].tolist()
    return x, y


def snippet(seed: int, hidden: int, changes: str, lesson: Lesson) -> str:
    """Return Python code that reproduces the lesson's numbers."""
    changes = f", changes={changes!r}" if changes else ""
    knobs = f"sparsity={lesson.sparsity!r}, criterion={lesson.criterion!r}"
    return "\n".join(
        [
            "import torch",
            "import intrafusion as itf",
            "from intrafusion.studies.toy_network import measure_toy, train_toy",
            "",
            f"model = train_toy(seed={seed!r}, hidden={hidden!r}{changes})",
            "example = torch.zeros(1, 2)",
            "group = itf.find_groups(model, example)[0]",
            f"scores = itf.score(model, group, criterion={lesson.criterion!r})",
            f"plan = itf.plan(model, group, scores, sparsity={lesson.sparsity!r}, p={lesson.p!r})",
            "print(scores, plan.cost, plan.coupling, plan.matrix, sep='\\n')",
            "for merge in ('drop', 'fusion'):",
            f"    small = itf.prune(model, example, {knobs}, merge=merge, p={lesson.p!r})",
            "    print(merge, measure_toy(small).accuracy, list(small.parameters()))",
        ]
    )
