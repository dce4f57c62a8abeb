"""Compare recoveries of the same pruned networks: the training progress and the result of each method."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion._registry import RECOVERIES
from intrafusion.evaluation.accuracy import stratified
from intrafusion.evaluation.incremental import Meter
from intrafusion.pruning.groups.feature_maps import normalised, private
from intrafusion.runtime.log import explain
from intrafusion.spec import PruneSpec
from intrafusion.studies.measurement import Result
from intrafusion.studies.session import Session, merged, pruned, recovery
from intrafusion.studies.store.sqlite import Store
from intrafusion.studies.sweeps import Failure, checked_specs, digest, sweep
from intrafusion.training.loop import TrainingProgress
from intrafusion.training.recovery import TrainingCost, image_similarity
from intrafusion.training.recovery.cache import read_recovery
from intrafusion.training.recovery.distillation import stages, watching


@dataclass(frozen=True)
class Run:
    """The training of one spec's recovery: what it costs, and its moments so far."""

    spec: PruneSpec
    facts: TrainingCost
    moments: tuple[TrainingProgress, ...] = ()

    @property
    def share(self) -> float:
        """The share of the training that is done, in [0, 1]."""
        return self.moments[-1].step / self.moments[-1].steps if self.moments else 0.0


def compare_recoveries(
    specs: Iterable[PruneSpec], session: Session, store: Store | None = None
) -> Iterator[Run | Result | Failure]:
    """Recover and measure each spec; yields its run repeatedly while it trains, then its result.

    A recovery that was trained before is not trained again, and a result in the store is not measured again. A spec that
    fails is yielded as a Failure, and the other specs go on. Raises IntrafusionError if any spec cannot run.
    """
    meters: dict[tuple, Meter] = {}
    for spec in checked_specs(specs, session):
        if RECOVERIES[spec.recovery].needs == "labels":
            try:
                yield from _watched(spec, session)
            except Exception as error:
                yield Failure(spec, *explain(error, "recovery", key=digest(spec)))
                continue
        yield from sweep([spec], session, store, meters=meters)


def _watched(spec: PruneSpec, session: Session) -> Iterator[Run]:
    if (known := known_run(spec, session)) is not None:
        yield known
        return
    facts, moments = None, ()  # type: TrainingCost | None, tuple[TrainingProgress, ...]
    for told in recovery(spec, session, merged(spec, session)):
        if isinstance(told, TrainingCost):
            facts, moments = told, ()
        else:
            moments = *moments, told
        assert facts is not None
        yield Run(spec, facts, moments)


def known_run(spec: PruneSpec, session: Session) -> Run | None:
    """Return the saved run of a spec's recovery, or None if it does not train or was not trained before."""
    if RECOVERIES[spec.recovery].needs != "labels":
        return None
    found = read_recovery(session.kept_path(spec))
    return None if found is None else Run(spec, found.facts, found.moments)


@dataclass(frozen=True)
class Row:
    """The result of one recovery.

    accuracy: mean over the seeds, as a fraction. interval: its 95 % interval; Wilson's over the images for one seed,
    Student's t over the seeds for several. run: that of the last seed.
    """

    recovery: str
    budget: str
    accuracy: float
    interval: tuple[float, float]
    seeds: int
    count: int
    run: Run | None

    def to_row(self) -> dict[str, Any]:
        """Return a flat, JSON-serialisable row."""
        facts = self.run.facts.to_dict() if self.run else {}
        moments = self.run.moments if self.run else ()
        return {
            "recovery": self.recovery,
            "budget": self.budget,
            "accuracy": self.accuracy,
            "low": self.interval[0],
            "high": self.interval[1],
            "seeds": self.seeds,
            "images": self.count,
            **facts,
            "steps": moments[-1].step if moments else 0,
            "seconds": moments[-1].seconds if moments else 0.0,
        }


def rows(results: Sequence[Result], runs: Sequence[Run]) -> list[Row]:
    """Return a row for each recovery and budget over all measured seeds, in order of appearance."""
    measured: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        measured[result.spec.recovery, result.spec.budget].append(result)
    last = {(run.spec.recovery, run.spec.budget): run for run in runs}
    return [
        Row(*key, *_summary(found), len(found), min(result.count for result in found), last.get(key))
        for key, found in measured.items()
    ]


def _summary(results: Sequence[Result]) -> tuple[float, tuple[float, float]]:
    if len(results) == 1:
        return results[0].accuracy, results[0].interval
    from scipy.stats import t

    values = [result.accuracy for result in results]
    mean, half = fmean(values), stdev(values) / math.sqrt(len(values)) * float(t.ppf(0.975, len(values) - 1))
    return mean, (max(0.0, mean - half), min(1.0, mean + half))


@dataclass(frozen=True)
class Alike:
    """The similarities of images in one layer of three networks.

    dense, before, after: G (b, b) with rows of unit length. labels: int64 (b,).
    """

    layer: str
    labels: Tensor
    dense: Tensor
    before: Tensor
    after: Tensor

    def loss(self, which: Tensor) -> float:
        """Return L_SP of one of the networks against the dense one."""
        return float((which - self.dense).square().sum() / len(self.labels) ** 2)


def layers_to_compare(session: Session) -> list[str]:
    """Return the layers whose similarities the losses compare: the last layer at each image size."""
    return stages(private(session.folded), session.example)


def compare_image_similarity(spec: PruneSpec, session: Session, layer: str, images: int = 48) -> Alike:
    """Return the similarities before and after a recovery, on some training images sorted by class."""
    data = session.training(spec) if RECOVERIES[spec.recovery].needs == "labels" else session.calibration(spec)
    rows = stratified(data.labels.cpu(), spec.seed)[:images]
    rows = rows[data.labels.cpu()[rows].argsort(stable=True)].to(data.labels.device)
    chosen = replace(data, images=data.images[rows], labels=data.labels[rows])
    inputs, labels = next(normalised(session.model, chosen))

    def seen(network: nn.Module) -> Tensor:
        with torch.inference_mode(), watching(network, [layer]) as outputs:
            network(inputs)
        return image_similarity(outputs[layer]).cpu()

    plain = spec.but(recovery="none")
    networks = private(session.folded), private(pruned(plain, session)), private(pruned(spec, session))
    return Alike(layer, labels.cpu(), *map(seen, networks))
