"""Measure one spec: prune, recover and evaluate a network, and return the result."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from intrafusion._registry import CRITERIA, MERGES, RECOVERIES, SOLVERS
from intrafusion.errors import check_choice
from intrafusion.evaluation.accuracy import size, wilson
from intrafusion.evaluation.incremental import Meter
from intrafusion.models.fx.sharing import differing
from intrafusion.models.precision import PRECISIONS, check_bf16
from intrafusion.pruning.pruner import choose_groups
from intrafusion.pruning.transport.planning import group_counts
from intrafusion.runtime.cancellation import clock
from intrafusion.spec import PruneSpec
from intrafusion.studies.session import Session, pruned


@dataclass(frozen=True)
class Width:
    """The number of channels of one group before and after pruning."""

    group: str
    before: int
    after: int


@dataclass(frozen=True)
class Result:
    """The measured result of one spec.

    accuracy, interval (95 %) and dense_accuracy are fractions on the same `count` images. total: number of images that the
    spec requests; if count is smaller, the images are a stratified prefix of them. channels: channels kept in the chosen
    groups, out of channels_before. macs: multiply-accumulates for one image. seconds: wall time. correct: which of the
    `count` images were classified correctly, in the order of `accuracy.stratified`, packed by np.packbits. older_code:
    whether another version of the code stored this result, so that it is not valid for the present code.
    """

    spec: PruneSpec
    accuracy: float
    interval: tuple[float, float]
    count: int
    total: int
    dense_accuracy: float
    params: int
    params_before: int
    macs: int
    macs_before: int
    channels: int
    channels_before: int
    seconds: float
    correct: bytes = field(repr=False)
    older_code: bool = field(default=False, compare=False)

    @property
    def dense_interval(self) -> tuple[float, float]:
        """The 95 % interval of the dense accuracy."""
        return wilson(round(self.dense_accuracy * self.count), self.count)

    @property
    def complete(self) -> bool:
        """Whether all images that the spec requests were evaluated."""
        return self.count == self.total

    @property
    def prunes(self) -> bool:
        """Whether any channel was removed: small groups lose none at a low sparsity."""
        return self.channels < self.channels_before

    def to_row(self) -> dict[str, Any]:
        """Return a flat, JSON-serialisable row; the spec's dataset is named `data`, as on the command line."""
        spec = self.spec.to_dict()
        rest = {k: v for k, v in self.__dict__.items() if k not in ("spec", "correct")}
        low, high = rest.pop("interval")
        return {"model": spec.pop("model"), "data": spec.pop("dataset"), **spec, **rest, "low": low, "high": high}


def check_spec(spec: PruneSpec, session: Session) -> None:
    """Check before any work that a spec can run. Raises IntrafusionError for unknown names and missing groups."""
    choose_groups(session.groups, spec.groups)
    check_choice("precision", spec.precision, PRECISIONS)
    if spec.precision == "fast":
        check_bf16(session.device)
    kinds = (CRITERIA, spec.criterion), (MERGES, spec.merge), (SOLVERS, spec.solver), (RECOVERIES, spec.recovery)
    for registry, name in kinds:
        _ = registry[name]
    spec.check_together()


def run_spec(spec: PruneSpec, session: Session) -> Result:
    """Prune, recover and measure one spec on an open session, whose model and data must be those of the spec."""
    meter = session.meter(spec)
    return measure(spec, session, meter, pruned(spec, session), len(meter))


def measure(
    spec: PruneSpec,
    session: Session,
    meter: Meter,
    small: nn.Module,
    stop: int,
    before: Result | None = None,
    patience: float = float("inf"),
) -> Result:
    """Measure the spec's network `small` on the first `stop` images, or on fewer once `patience` seconds have passed.

    before: a result on fewer images, from which to continue. A network that lost no channel and was not recovered gets the
    dense network's answers on all images.
    """
    start = clock()
    if before is None:
        before = _unmeasured(spec, session, meter, small)
    if not before.prunes and spec.recovery == "none":
        correct = meter.dense(len(meter))
    else:
        more = meter.correct(small, differing(session.folded, small), before.count, stop, patience)
        correct = torch.cat([_unpacked(before), more])
    count, hits = len(correct), int(correct.sum())
    return replace(
        before,
        accuracy=hits / count,
        interval=wilson(hits, count),
        count=count,
        dense_accuracy=float(meter.dense(count).double().mean()),
        seconds=before.seconds + clock() - start,
        correct=np.packbits(correct.numpy()).tobytes(),
    )


def _unmeasured(spec: PruneSpec, session: Session, meter: Meter, small: nn.Module) -> Result:
    """Return the result of a network before the first image is evaluated: its sizes and channel counts."""
    chosen = choose_groups(session.groups, spec.groups)
    stays = sum(sum(group_counts(group, spec.sparsity_of(group.name), spec.round_to)) for group in chosen)
    after = size(small, session.example)
    return Result(
        spec,
        0.0,
        (0.0, 1.0),
        0,
        len(meter),
        0.0,
        after.params,
        session.size.params,
        after.macs,
        session.size.macs,
        stays,
        sum(group.size for group in chosen),
        0.0,
        b"",
    )


def _unpacked(result: Result) -> torch.Tensor:
    """Return which images were classified correctly: bool (count,)."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(result.correct, np.uint8), count=result.count).astype(bool))
