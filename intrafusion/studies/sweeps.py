"""Sweeps: measure many specs on one session.

Every point is first measured on a small stratified sample, then on all images. Computations that points share are done
once. Results are stored as they arrive, and stored results are not computed again.
"""

import gc
import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from intrafusion.errors import IntrafusionError, is_out_of_memory
from intrafusion.evaluation.incremental import MEMORY, Meter
from intrafusion.pruning.pruner import choose_groups
from intrafusion.runtime.cancellation import checkpoint, clock
from intrafusion.runtime.devices import CPU, device_name
from intrafusion.runtime.log import event, explain
from intrafusion.spec import PruneSpec
from intrafusion.studies.measurement import Result, check_spec, measure
from intrafusion.studies.paired_comparison import is_decided
from intrafusion.studies.session import Session, pruned
from intrafusion.studies.store.sqlite import Origin, Store

FIRST = 100  # images in the first look at a point
_PATIENCE = 1.0  # seconds after which a point yields a partial result
_NETWORKS = 1 << 28  # bytes of pruned networks kept between looks
_RETRY = 0.2  # seconds between two checks of points that another process has claimed


@dataclass(frozen=True)
class Failure:
    """A point that could not be measured. reason: why, in one line. id: the log entry of an unexpected error, else None."""

    spec: PruneSpec
    reason: str
    id: str | None = field(default=None, compare=False)


def grid(base: PruneSpec, **choices: Sequence[Any]) -> list[PruneSpec]:
    """Return a copy of `base` for every combination of the given fields' choices; the last field varies fastest.

    Examples
    --------
    >>> import intrafusion as itf
    >>> specs = itf.grid(itf.PruneSpec(), merge=("drop", "fusion"), sparsity=(0.3, 0.5))
    >>> [(spec.merge, spec.sparsity) for spec in specs]
    [('drop', 0.3), ('drop', 0.5), ('fusion', 0.3), ('fusion', 0.5)]
    """
    return [base.but(**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]


def sweep(
    specs: Iterable[PruneSpec],
    session: Session,
    store: Store | None = None,
    *,
    decide: bool = False,
    memory: int = MEMORY,
    known: Mapping[PruneSpec, Result] | None = None,
    meters: dict[tuple, Meter] | None = None,
) -> Iterator[Result | Failure]:
    """Measure all specs on one session; yields each result as soon as it is available, and again on more images.

    A spec's last result counts. A point that fails is yielded as a Failure, and the other points are still measured.

    Parameters
    ----------
    specs : iterable of PruneSpec
        The points; all must be for the session's network and images.
    session : Session
        See `open_session`.
    store : Store, optional
        Stored results are yielded first and are not computed again, unless they are incomplete. New results are stored.
        Points that another process is computing are left to that process.
    decide : bool
        Stop measuring a point once it is decided whether its merge or dropping is better on all images: the 95 % interval of
        the difference between the two, valid at all times at once (`sequential_interval`), excludes zero.
    memory : int
        Bytes of activations that are kept between points.
    known : mapping, optional
        Results from which to continue, by spec; they are not yielded again.
    meters : dict, optional
        The meters of an earlier sweep on this session; they are reused, and new ones are added.

    Yields
    ------
    Result or Failure

    Raises
    ------
    IntrafusionError
        If any spec cannot run, or the store cannot be written.

    Examples
    --------
    >>> import intrafusion as itf
    >>> base = itf.PruneSpec(model="digits-mlp", limit=100)
    >>> last = {result.spec: result for result in itf.sweep(itf.grid(base, sparsity=(0.3, 0.6)), itf.open_session(base))}
    >>> [(spec.sparsity, result.count) for spec, result in last.items()]
    [(0.3, 100), (0.6, 100)]
    """
    yield from _Sweep(checked_specs(specs, session), session, store, decide, memory, known or {}, meters).steps()


def checked_specs(specs: Iterable[PruneSpec], session: Session) -> list[PruneSpec]:
    """Return the specs without duplicates, in processing order. Raises IntrafusionError if any cannot run."""
    specs = list(dict.fromkeys(specs))
    for spec in specs:
        check_spec(spec, session)
        for one in session.learned_from(spec):
            session.calibration(one)
    return sorted(specs, key=lambda spec: cut_of(spec, session))


def cut_of(spec: PruneSpec, session: Session) -> tuple:
    """Return a sort key that is equal for specs that share all layers in front of their first change.

    It orders specs by their images, and then by their first group from input to output, so that cached activations can be
    reused at the next cut.
    """
    first = choose_groups(session.groups, spec.groups)[0]
    return *_images(spec), session.groups.index(first)


def origin(spec: PruneSpec, session: Session) -> Origin:
    """Return the fingerprints and the device with which the store records the results of this spec."""
    return Origin(*session.fingerprints(spec), device_name(session.device))


class _Sweep:
    def __init__(
        self,
        specs: list[PruneSpec],
        session: Session,
        store: Store | None,
        decide: bool,
        memory: int,
        known: Mapping[PruneSpec, Result],
        meters: dict[tuple, Meter] | None,
    ):
        self.session, self.store, self.decide, self.memory, self.specs = session, store, decide, memory, specs
        self.families: dict[PruneSpec, list[PruneSpec]] = {}
        for spec in self.specs:
            self.families.setdefault(spec.but(merge="drop"), []).append(spec)
        self.reached = dict(known)
        self.failed: set[PruneSpec] = set()
        self.measured: set[PruneSpec] = set()
        self.meters: dict[tuple, Meter] = {} if meters is None else meters
        self.networks: dict[PruneSpec, nn.Module] = {}  # oldest first
        self.held = 0  # their bytes
        self.last: Meter | None = None
        self.ahead: dict[PruneSpec, Future[nn.Module]] = {}
        self.pruner = None if session.device == CPU else ThreadPoolExecutor(1)  # a CPU has no time to spare

    def steps(self) -> Iterator[Result | Failure]:
        try:
            yield from self._steps()
        finally:
            if self.pruner:
                self.pruner.shutdown(cancel_futures=True)

    def _steps(self) -> Iterator[Result | Failure]:
        if self.store:
            stored = self.store.get((spec, origin(spec, self.session)) for spec in self.specs)
            self.reached |= stored
            yield from stored.values()
        yield from self._unmeasurable()
        for spec in self.specs:
            yield from self._advance(spec, 1)
        for _, behind in itertools.groupby(self.specs, key=lambda spec: cut_of(spec, self.session)):
            yield from self._refined(list(behind))
        while left := [spec for spec in self.specs if not self._is_done(spec)]:  # claimed by other processes
            for spec in left:
                yield from self._advance(spec, self._count(spec) + 1)
            checkpoint(idle=True)
            time.sleep(_RETRY)
        for spec in self.specs:
            if spec in self.measured and not self.reached[spec].complete:
                tell(self.reached[spec])

    def _unmeasurable(self) -> Iterator[Failure]:
        """Fail the points whose meters cannot be made, for example for lack of memory, before their looks are counted."""
        for spec in self.specs:
            if spec in self.reached and self.reached[spec].complete:
                continue
            try:
                self._meter(spec)
            except IntrafusionError:
                raise
            except Exception as error:
                yield self._fails(spec, error)

    def _refined(self, specs: list[PruneSpec]) -> Iterator[Result | Failure]:
        """Measure points with the same cut, look by look together, until they are done or claimed by another process."""
        for target in self._looks(specs[0]) if not all(map(self._is_done, specs)) else ():
            for spec in specs:
                yield from self._advance(spec, target)

    def _advance(self, spec: PruneSpec, least: int) -> Iterator[Result | Failure]:
        """Measure one point up to its first look at `least` images or more, unless another process has claimed it."""
        if self._is_done(spec):
            return
        target = next(size for size in self._looks(spec) if size >= least)
        if self._count(spec) >= target:
            return
        if self.store and not self.store.claim(spec, origin(spec, self.session)):
            yield from self._news(spec)
            return
        try:
            yield from self._news(spec)
            while not self._is_done(spec) and self._count(spec) < target:
                yield self._measured(spec, target)
        finally:
            if self.store:
                self.store.release(spec, origin(spec, self.session))

    def _news(self, spec: PruneSpec) -> Iterator[Result]:
        """Yield the result of this point from the store if another process has added a better one."""
        if self.store:
            known, stored = self.reached.get(spec), self.store.get([(spec, origin(spec, self.session))]).get(spec)
            if stored and (known is None or stored.count > known.count):
                self.reached[spec] = stored
                yield stored

    def _measured(self, spec: PruneSpec, target: int) -> Result | Failure:
        """Measure a point on more images. An exception becomes a Failure of this point alone."""
        try:
            meter, began = self._meter(spec), clock()
            small = self._network(spec)
            took = clock() - began
            self._prune_ahead(spec)
            result = measure(spec, self.session, meter, small, target, self.reached.get(spec), _PATIENCE)
            result = replace(result, seconds=result.seconds + took)
        except Exception as error:
            return self._fails(spec, error)
        if self.store:
            self.store.put(result, origin(spec, self.session))
        self.reached[spec] = result
        self.measured.add(spec)
        if result.complete:
            self._let_go(spec)
            tell(result)
        return result

    def _fails(self, spec: PruneSpec, error: Exception) -> Failure:
        for meter in self.meters.values():  # free memory, which may have run out
            meter.forget()
        self.networks.clear()
        self.held = 0
        if is_out_of_memory(error):
            gc.collect()  # pruned networks are in reference cycles, and the next point needs their memory
        failure = Failure(spec, *explain(error, "point", key=digest(spec)))
        self.failed.add(spec)
        if self.store:
            self.store.fail(spec, origin(spec, self.session), failure.reason)
        return failure

    def _count(self, spec: PruneSpec) -> int:
        """Return the number of images that a point is measured on so far."""
        return self.reached[spec].count if spec in self.reached else 0

    def _is_done(self, spec: PruneSpec) -> bool:
        if spec in self.failed or (spec in self.reached and self.reached[spec].complete):
            return True
        return self.decide and self._is_decided(spec)

    def _is_decided(self, spec: PruneSpec) -> bool:
        """Return whether every difference between merges that involves this point is decided."""
        family = self.families[spec.but(merge="drop")]
        base = next((other for other in family if other.merge == "drop"), family[0])
        others = [other for other in family if other is not base] if spec is base else [spec]
        results = [self.reached[one] for one in (base, *others) if one in self.reached]
        if len(family) < 2 or len(results) <= len(others):
            return False
        return all(is_decided(other, results[0]) for other in results[1:])

    def _looks(self, spec: PruneSpec) -> list[int]:
        """Return the number of images of each look at a point, ascending: whole batches, or all images.

        From look to look, the ratio of images seen to images left triples, because it is this ratio, and not the number seen,
        that grows with how much is known about the images left. More looks would stop 5 % earlier and cost more than that.
        """
        meter = self._meter(spec)
        total, sizes = len(meter), [meter.up_to(FIRST)]
        while self.decide and sizes[-1] < total:
            seen = sizes[-1]
            sizes.append(meter.up_to(max(seen + 1, round(3 * seen * total / (2 * seen + total)))))
        return sorted({*sizes, total})

    def _meter(self, spec: PruneSpec) -> Meter:
        """Return the meter for this spec's images; only the last used meter keeps activations."""
        key = _images(spec)
        if key not in self.meters:
            self.meters[key] = self.session.meter(spec, self.memory)
        if self.last is not None and self.last is not self.meters[key]:
            self.last.forget()
        self.last = self.meters[key]
        return self.last

    def _network(self, spec: PruneSpec) -> nn.Module:
        if spec not in self.networks:
            waiting = self.ahead.pop(spec, None)
            self.networks[spec] = small = waiting.result() if waiting else pruned(spec, self.session)
            self.held += _bytes(small)
            while len(self.networks) > 1 and self.held > _NETWORKS:
                self._let_go(next(iter(self.networks)))
            return small
        return self.networks[spec]

    def _prune_ahead(self, spec: PruneSpec) -> None:
        """Prune the point behind this one in a thread, while a GPU evaluates this one."""
        place = self.specs.index(spec) + 1
        if self.pruner and place < len(self.specs):
            following = self.specs[place]
            known = following in self.networks or following in self.ahead or following in self.reached
            if not known and following.recovery == "none":
                self.ahead[following] = self.pruner.submit(pruned, following, self.session)

    def _let_go(self, spec: PruneSpec) -> None:
        if spec in self.networks:
            self.held -= _bytes(self.networks.pop(spec))


def tell(result: Result) -> None:
    """Log a measured point."""
    spec = result.spec
    event(
        "point",
        key=digest(spec),
        model=spec.model,
        criterion=spec.criterion,
        merge=spec.merge,
        sparsity=spec.sparsity,
        accuracy=result.accuracy,
        count=result.count,
        seconds=round(result.seconds, 3),
    )


def digest(spec: PruneSpec) -> str:
    """Return a short hash of a spec, which does not reveal its paths."""
    return hashlib.sha256(spec.key().encode()).hexdigest()[:12]


def _images(spec: PruneSpec) -> tuple:
    """Return a key of how a spec is measured: precision, seed and number of images."""
    return spec.precision, spec.seed, spec.limit or 0


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())
