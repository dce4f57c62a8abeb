"""The single road, walked once: a spec in, its measured result out."""

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
    """One group: its channels before and after."""

    group: str
    before: int
    after: int


@dataclass(frozen=True)
class Result:
    """One measured spec. accuracy, interval (95 %) and dense_accuracy are fractions on the same `count` images.

    total: images that the spec asks for; where count is less, they are a stratified beginning of them. channels: how many
    of the chosen groups' channels stayed, of channels_before. macs: of one image. seconds: wall time. correct: which of
    the `count` images were right, in the order of `accuracy.stratified`, as np.packbits packs them. older_code: whether it
    was stored by another version of the code, and so is no answer to what is asked of this one.
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
        """95 % interval of the dense accuracy."""
        return wilson(round(self.dense_accuracy * self.count), self.count)

    @property
    def complete(self) -> bool:
        """Whether all images that the spec asks for were looked at."""
        return self.count == self.total

    @property
    def prunes(self) -> bool:
        """Whether any channel went: small groups lose none at a low sparsity."""
        return self.channels < self.channels_before

    def to_row(self) -> dict[str, Any]:
        """A flat, JSON-able row; the spec's dataset is called `data`, as on the command line."""
        spec = self.spec.to_dict()
        rest = {k: v for k, v in self.__dict__.items() if k not in ("spec", "correct")}
        low, high = rest.pop("interval")
        return {"model": spec.pop("model"), "data": spec.pop("dataset"), **spec, **rest, "low": low, "high": high}


def check(spec: PruneSpec, session: Session) -> None:
    """Refuse, before any work, a spec that cannot run: IntrafusionError for unknown names and missing groups."""
    choose_groups(session.groups, spec.groups)
    check_choice("precision", spec.precision, PRECISIONS)
    if spec.precision == "fast":
        check_bf16(session.device)
    kinds = (CRITERIA, spec.criterion), (MERGES, spec.merge), (SOLVERS, spec.solver), (RECOVERIES, spec.recovery)
    for registry, name in kinds:
        _ = registry[name]
    spec.check_together()


def run(spec: PruneSpec, session: Session) -> Result:
    """Prune, recover and measure one spec on an open session (whose model and data must be the spec's)."""
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
    """The result of the spec's network `small` on the first `stop` images, or on fewer once `patience` seconds are over.

    before: the result on fewer images, from which to go on. A network that lost nothing is the dense one, on all images.
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
    """What is known of a network before the first image."""
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
    """Which images were right: bool (count,)."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(result.correct, np.uint8), count=result.count).astype(bool))
