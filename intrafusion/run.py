"""The single road, walked once: a spec in, its measured result out."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from intrafusion.cards import ModelCard
from intrafusion.channels import Group
from intrafusion.data import ImageData, load_data
from intrafusion.errors import IntrafusionError, check_choice
from intrafusion.evaluate import Evaluation, Size, evaluate, size
from intrafusion.groups import find_groups
from intrafusion.prune import choose_groups, prune_groups
from intrafusion.registry import CRITERIA, MERGES, RECOVERIES, SOLVERS
from intrafusion.spec import PruneSpec
from intrafusion.transport import ANCHORS, MARGINALS, NORMALISATIONS, group_counts
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


@dataclass(eq=False)
class Bench:
    """What every point of a study shares: the dense model, its groups and size, the images, the dense accuracy."""

    model: nn.Module
    groups: list[Group]
    size: Size
    data: ImageData | None
    _dense: dict[tuple[int | None, int], Evaluation] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def card(self) -> ModelCard:
        return self.model.card  # type: ignore[return-value]

    @property
    def example(self) -> torch.Tensor:
        """A zero input on the model's device, float (1, C, H, W)."""
        return self.card.example().to(next(self.model.parameters()).device)

    def images(self) -> ImageData:
        """The evaluation images. Raises IntrafusionError when none were loaded."""
        if self.data is None:
            raise IntrafusionError(f"no {self.card.dataset} images are loaded: give a data path, or download them")
        return self.data

    def dense(self, limit: int | None, seed: int = 0) -> Evaluation:
        """The dense model's accuracy, measured once for each choice of images."""
        with self._lock:
            if (limit, seed) not in self._dense:
                self._dense[limit, seed] = evaluate(self.model, self.images(), limit, seed)
            return self._dense[limit, seed]

    def known_dense(self, limit: int | None, seed: int = 0) -> Evaluation | None:
        """What `dense` gave for these images, or None when nobody has asked yet."""
        return self._dense.get((limit, seed))


def open_model(name: str, weights: str | None = None, device: str = "cpu", **options: Any) -> Bench:
    """Load a model and find its groups; `options` go to `load_model`."""
    model = load_model(name, weights, device, **options)
    example = model.card.example().to(device)  # type: ignore[union-attr,operator]
    return Bench(model, find_groups(model, example), size(model, example), None)


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
    check_choice("source marginal", spec.source, MARGINALS)
    check_choice("target marginal", spec.target, MARGINALS)
    check_choice("anchors", spec.anchors, ANCHORS)
    check_choice("normalise", spec.normalise, NORMALISATIONS)


def pruned(spec: PruneSpec, bench: Bench) -> nn.Module:
    """The network of `spec`: pruned, merged and recovered."""
    small = prune_groups(
        bench.model,
        bench.groups,
        spec.sparsity,
        spec.criterion,
        spec.merge,
        spec.groups,
        bench.data,
        **spec.plan_knobs(),
    )
    return RECOVERIES[spec.recovery](small, spec, bench.data)


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
