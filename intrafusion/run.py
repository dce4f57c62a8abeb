"""The single road, walked once: a spec in, its measured result out."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from intrafusion.cards import ModelCard
from intrafusion.channels import Group
from intrafusion.data import ImageData, load_calibration, load_data
from intrafusion.errors import IntrafusionError, check_choice
from intrafusion.evaluate import Evaluation, Size, evaluate, logits, size
from intrafusion.geometry import ANCHORS, Geometry, check_measure, measure
from intrafusion.groups import find_groups
from intrafusion.importance import needs_images, score
from intrafusion.memo import Memo
from intrafusion.prune import choose_groups, prune_groups
from intrafusion.registry import CRITERIA, MERGES, RECOVERIES, SOLVERS
from intrafusion.spec import MEASURE_KNOBS, PLAN_KNOBS, SOLVE_KNOBS, PruneSpec
from intrafusion.transport import MARGINALS, NORMALISATIONS, TransportPlan, group_counts, solve
from intrafusion.zoo import load_model


@RECOVERIES.register("none", "the merged network as it is")
def none(model: nn.Module, spec: PruneSpec, data: ImageData | None) -> nn.Module:
    return model


@dataclass(frozen=True)
class Result:
    """One measured spec. accuracy, interval (95 %) and dense_accuracy are fractions on the same `count` images.

    channels: how many of the chosen groups' channels stayed, of channels_before. macs: of one image. seconds: wall time.
    """

    spec: PruneSpec
    accuracy: float
    interval: tuple[float, float]
    count: int
    dense_accuracy: float
    params: int
    params_before: int
    macs: int
    macs_before: int
    channels: int
    channels_before: int
    seconds: float

    def to_row(self) -> dict[str, Any]:
        """A flat, JSON-able row; the spec's dataset is called `data`, as on the command line."""
        spec = self.spec.to_dict()
        rest = {k: v for k, v in self.__dict__.items() if k != "spec"}
        low, high = rest.pop("interval")
        return {"model": spec.pop("model"), "data": spec.pop("dataset"), **spec, **rest, "low": low, "high": high}


@dataclass(frozen=True)
class Scores:
    """values: float64 (n,), larger stays. seconds: what they took to compute."""

    values: torch.Tensor
    seconds: float


@dataclass(eq=False)
class Bench:
    """What every point of a study shares: the dense model, its groups and size, the images, and what is known of them.

    Scores, distances and plans of single groups, on the network as it is, are computed once.
    """

    model: nn.Module
    groups: list[Group]
    size: Size
    data: ImageData | None = None
    _known: Memo = field(default_factory=Memo)
    _geometries: Memo = field(default_factory=lambda: Memo(8))  # tens of megabytes each in wide layers, as plans
    _plans: Memo = field(default_factory=lambda: Memo(32))
    _accuracies: Memo = field(default_factory=Memo)

    @property
    def card(self) -> ModelCard:
        return self.model.card  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def example(self) -> torch.Tensor:
        """A zero input on the model's device, float (1, C, H, W)."""
        return self.card.example().to(self.device)

    def images(self) -> ImageData:
        """The evaluation images. Raises IntrafusionError when none were loaded."""
        if self.data is None:
            raise IntrafusionError(f"no {self.card.dataset} images are loaded: give a data path, or download them")
        return self.data

    def on(self, data: ImageData) -> "Bench":
        """This bench with other evaluation images, sharing what is known of the groups."""
        return replace(self, data=data, _accuracies=Memo())

    def dense(self, limit: int | None, seed: int = 0) -> Evaluation:
        """The dense model's accuracy, measured once for each choice of images."""
        return self._accuracies.get((limit, seed), lambda: evaluate(self.model, self.images(), limit, seed))

    def known_dense(self, limit: int | None, seed: int = 0) -> Evaluation | None:
        """What `dense` gave for these images, or None when nobody has asked yet."""
        return self._accuracies.peek((limit, seed))

    def calibration(self, spec: PruneSpec) -> ImageData:
        """The images that the spec's criterion and cost may look at. Raises IntrafusionError where there are none."""
        size = self.card.input_size[-1]
        return self._known.get(
            _sight(spec),
            lambda: load_calibration(
                spec.dataset, spec.data_path, self.device, spec.calibration, spec.seed, input_size=size
            ),
        )

    def scores(self, spec: PruneSpec, group: Group) -> Scores:
        """Importance of a group's channels in the network as it is."""

        def compute() -> Scores:
            data = self.calibration(spec) if sees else None
            start = time.perf_counter()
            values = score(self.model, group, spec.criterion, data, spec.seed, spec.calibration)
            return Scores(values, time.perf_counter() - start)

        sees = CRITERIA[spec.criterion].needs != "nothing"
        return self._known.get((group.name, spec.criterion, _sight(spec) if sees else spec.seed), compute)

    def geometry(self, spec: PruneSpec, group: Group) -> Geometry:
        """Distances between a group's channels in the network as it is, for every sparsity, criterion and solver."""
        sees = spec.cost == "activations"
        return self._geometries.get(
            (group.name, spec.cost, spec.distance, spec.p, spec.bias, _sight(spec) if sees else None),
            lambda: measure(
                self.model, group, data=self.calibration(spec) if sees else None, **spec.only(MEASURE_KNOBS)
            ),
        )

    def plan(self, spec: PruneSpec, group: Group) -> TransportPlan:
        """The plan of one group in the network as it is."""
        key = (group.name, spec.but(merge="", recovery="", limit=None, groups="all"))
        return self._plans.get(
            key,
            lambda: solve(
                self.geometry(spec, group),
                self.scores(spec, group).values,
                spec.sparsity,
                **spec.only(SOLVE_KNOBS),
            ),
        )

    def output_distance(self, spec: PruneSpec, group: Group) -> torch.Tensor:
        """How far pruning this group alone moves the logits of each calibration image: L2 distances (N,)."""

        def compute() -> torch.Tensor:
            small = pruned(spec.but(groups=(group.name,)), self)
            return (logits(small, data) - dense).norm(dim=1).cpu()

        data = self.calibration(spec)
        dense = self._known.get(("logits", _sight(spec)), lambda: logits(self.model, data))
        return self._known.get(("distance", group.name, spec.but(limit=None, groups="all")), compute)


def _sight(spec: PruneSpec) -> tuple:
    """What tells one choice of calibration images from another."""
    return "images", spec.dataset, spec.data_path, spec.calibration, spec.seed


def open_model(name: str, weights: str | None = None, device: str = "cpu", **options: Any) -> Bench:
    """Load a model and find its groups; `options` go to `load_model`."""
    model = load_model(name, weights, device, **options)
    example = model.card.example().to(device)  # type: ignore[union-attr,operator]
    return Bench(model, find_groups(model, example), size(model, example))


def open_bench(spec: PruneSpec, device: str = "cpu", **options: Any) -> Bench:
    """Load what `spec` names, once, for any number of runs; `options` go to `load_data`."""
    bench = open_model(spec.model, spec.weights, device)
    bench.data = load_data(
        spec.dataset, path=spec.data_path, device=device, input_size=bench.card.input_size[-1], **options
    )
    return bench


def check(spec: PruneSpec, bench: Bench) -> None:
    """Refuse, before any work, a spec that cannot run: IntrafusionError for unknown names and missing groups."""
    choose_groups(bench.groups, spec.groups)
    kinds = (CRITERIA, spec.criterion), (MERGES, spec.merge), (SOLVERS, spec.solver), (RECOVERIES, spec.recovery)
    for registry, name in kinds:
        _ = registry[name]
    check_measure(spec.cost, spec.distance, spec.p, spec.bias)
    check_choice("source marginal", spec.source, MARGINALS)
    check_choice("target marginal", spec.target, MARGINALS)
    check_choice("anchors", spec.anchors, ANCHORS)
    check_choice("normalise", spec.normalise, NORMALISATIONS)


def pruned(spec: PruneSpec, bench: Bench) -> nn.Module:
    """The network of `spec`: pruned, merged and recovered."""
    data = bench.calibration(spec) if needs_images(spec) else None
    last = choose_groups(bench.groups, spec.groups)[-1]
    small = prune_groups(
        bench.model,
        bench.groups,
        spec.sparsity,
        spec.criterion,
        spec.merge,
        spec.groups,
        data,
        first=lambda: bench.plan(spec, last),
        **spec.only(PLAN_KNOBS),
    )
    return RECOVERIES[spec.recovery](small, spec, data)


def run(spec: PruneSpec, bench: Bench) -> Result:
    """Prune, recover and measure one spec on an open bench (whose model and data must be the spec's)."""
    start = time.perf_counter()
    dense = bench.dense(spec.limit, spec.seed)
    small = pruned(spec, bench)
    measured = evaluate(small, bench.images(), spec.limit, spec.seed)
    after, chosen = size(small, bench.example), choose_groups(bench.groups, spec.groups)
    before, stays = (
        sum(group.size for group in chosen),
        sum(sum(group_counts(group, spec.sparsity)) for group in chosen),
    )
    return Result(
        spec, measured.accuracy, measured.interval, measured.count, dense.accuracy, after.params, bench.size.params,
        after.macs, bench.size.macs, stays, before, time.perf_counter() - start,
    )  # fmt: skip
