"""Sweeps on a Ray cluster: `sweep` with its points distributed over worker processes on any number of machines.

Points that share a cut are sent together, as one task that runs the local sweep and streams its results back. The network
and the images are put into Ray's object store once, and each worker process opens them once. Only this process writes to
the store.
"""

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from intrafusion.errors import IntrafusionError, one_line, reason
from intrafusion.evaluation.incremental import MEMORY
from intrafusion.runtime.cancellation import checkpoint
from intrafusion.runtime.code_digest import code_version
from intrafusion.spec import PruneSpec
from intrafusion.studies.cluster.connection import SESSION
from intrafusion.studies.cluster.worker import Parts, measure_remotely
from intrafusion.studies.measurement import Result
from intrafusion.studies.session import Session
from intrafusion.studies.store.sqlite import Origin, Store
from intrafusion.studies.sweeps import Failure, checked_specs, cut_of, origin, tell

_log = logging.getLogger(__name__)
RETRIES = 3  # how often the remaining points of a lost worker are sent again
_SHARES = 3  # least number of tasks per worker, so that workers that finish early can take over work
_TOGETHER = 256  # most results that are stored, and most tasks that are sent, between two checks for cancellation
_POLL = 0.1  # seconds between two checks for cancellation
_AGAIN = 1.0  # seconds between two checks of points claimed by other processes, and of the cluster's resources
_BEAT = 10.0  # seconds between two heartbeats to the store
_PATIENCE = 300.0  # seconds to wait for a machine that can take a task: an autoscaling cluster may need minutes
_LEAVE = 5.0  # seconds that a cancelled task has to end by itself

Family = list[PruneSpec]  # points that differ only in their merge; `decide` compares them, so they stay together


def sweep_on_cluster(
    specs: Iterable[PruneSpec],
    session: Session,
    store: Store | None = None,
    *,
    decide: bool = False,
    memory: int = MEMORY,
    address: str | None = None,
    num_cpus: float = 1,
    num_gpus: float | None = None,
) -> Iterator[Result | Failure]:
    """Run `studies.sweeps.sweep` on a Ray cluster; yields results in the order in which they arrive.

    Points and stored results are the same as in the local sweep. memory: bytes of activations kept by each task. address: of
    the cluster ("auto", "host:6379"); None for $RAY_ADDRESS, or else for a cluster on this machine that lasts as long as the
    sweep. If Ray is initialised already, that cluster is used. num_cpus, num_gpus: the resources that a task requests, with
    one torch thread for each CPU; num_gpus None means one GPU if the session is on one. The remaining points of a lost worker
    are sent again up to three times, and then become Failures. Raises IntrafusionError also if Ray is missing, if no cluster
    answers, or if the cluster has no room for such tasks.
    """
    share = _Share(num_cpus, float(session.device.type == "cuda") if num_gpus is None else num_gpus)
    specs = checked_specs(specs, session)
    points = {spec: share.origin(spec, session) for spec in specs}
    reached = store.get(points.items()) if store else {}
    yield from reached.values()
    if all(spec in reached and reached[spec].complete for spec in specs):
        return
    tensors = [*session.model.state_dict().values(), session.images().images]
    with SESSION.ray(address, sum(tensor.nbytes for tensor in tensors)) as ray:
        yield from _Driver(ray, points, session, store, reached, decide, memory, share).steps()


@dataclass(frozen=True)
class _Share:
    """The resources that a task requests. Raises IntrafusionError for amounts that Ray does not support."""

    cpus: float
    gpus: float

    def __post_init__(self) -> None:
        for amount, what in ((self.cpus, "CPUs"), (self.gpus, "GPUs")):
            if not (0 <= amount <= 1 or (amount > 1 and float(amount).is_integer())):
                raise IntrafusionError(f"{what} of a task must be a fraction of one or a whole number, not {amount:g}")
        if not self.cpus and not self.gpus:
            raise IntrafusionError("a task must use CPUs or GPUs; otherwise all tasks would run at once")

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")

    def origin(self, spec: PruneSpec, session: Session) -> Origin:
        """Return the origin of a result of such a task: a GPU if it requests one, whatever the session's device."""
        here, gpu = origin(spec, session), bool(self.gpus)
        return here if gpu == (session.device.type == "cuda") else replace(here, device="cuda" if gpu else "cpu")

    def fits(self, resources: Mapping[str, float]) -> int:
        """Return how many such tasks a machine with these resources can run at once."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        return min((int(resources.get(name, 0) / amount) for name, amount in wanted.items() if amount))


@dataclass(eq=False)
class _Chunk:
    """The points of one task. lost: number of workers lost while running it. device: where it runs, "" before it starts."""

    families: list[Family]
    lost: int = 0
    device: str = ""

    @property
    def specs(self) -> list[PruneSpec]:
        return [spec for family in self.families for spec in family]


class _Driver:
    """The state of one sweep: the waiting chunks, the running chunks and the results so far."""

    def __init__(
        self,
        ray: Any,
        points: dict[PruneSpec, Origin],
        session: Session,
        store: Store | None,
        reached: dict[PruneSpec, Result],
        decide: bool,
        memory: int,
        share: _Share,
    ):
        self.ray, self.session, self.store, self.points, self.reached = ray, session, store, points, reached
        self.decide, self.memory, self.share = decide, memory, share
        self.failed: set[PruneSpec] = set()
        self.held: set[PruneSpec] = set()  # claimed by us
        self.ended: list[PruneSpec] = []  # points of ended tasks, whose claims are released with the next results
        self.waiting: deque[_Chunk] = deque()
        self.contested: list[_Chunk] = []  # claimed by other processes
        self.out: dict[Any, _Chunk] = {}  # running chunks, by their stream of results
        self.slots: int | None = None  # how many tasks the cluster can run at once
        self.welcome = False  # whether any worker has started
        self.looked = self.beaten = -math.inf
        self.served = time.monotonic()  # when the cluster last had a slot

    def steps(self) -> Iterator[Result | Failure]:
        try:
            self._look()
            left = [family for family in _families(self.points) if not all(map(self._is_done, family))]
            self.waiting.extend(_split(left, self.session, self.slots or 1))
            self._prepare()
            while self.waiting or self.contested or self.out:
                self._look()
                yield from self._send()
                yield from self._receive(self._ready())
                checkpoint()
        finally:
            self._store([], self.held)  # only these: other studies may share the store object
            self._cancel()

    def _prepare(self) -> None:
        """Put the data that all tasks need into the object store, once."""
        try:
            self.parts = self.ray.put(Parts.of(self.session, self.points))
            options = {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus, "max_retries": 0}
            self.task = self.ray.remote(measure_remotely).options(**options)
        except (TypeError, ValueError, self.ray.exceptions.RayError) as error:
            raise IntrafusionError(f"cannot send this study to a cluster: {one_line(error)}") from error

    def _look(self) -> None:
        """Send a heartbeat, requeue contested chunks and count the cluster's slots, each at its interval."""
        now = time.monotonic()
        if now - self.beaten > _BEAT and self.store:
            self.beaten = now
            self.store.beat()
        if now - self.looked < _AGAIN:
            return
        self.looked = now
        self.waiting.extend(self.contested)
        self.contested.clear()
        before, nodes = self.slots, self.ray.nodes()
        self.slots = sum(self.share.fits(node["Resources"]) for node in nodes if node["Alive"])
        if self.slots:
            self.served = now
            return
        lack = f"no machine of the Ray cluster has the {self.share} that a task needs"
        if SESSION.alone or now - self.served > _PATIENCE:
            raise IntrafusionError(f"{lack}; use less per task, or add a machine with `ray start --address=...`")
        if before != 0:
            _log.warning("%s; waiting for one", lack)

    def _room(self) -> int:
        """Return how many of the waiting chunks may be sent: up to twice as many run as at once, so that no worker waits.

        The rest is not claimed yet, so that other processes find points to claim.
        """
        return min(len(self.waiting), 2 * (self.slots or 1) - len(self.out))

    def _send(self) -> Iterator[Result]:
        chunks = [self.waiting.popleft() for _ in range(min(self._room(), _TOGETHER))]
        left = [spec for chunk in chunks for spec in chunk.specs if not self._is_done(spec)]
        refused = self._claim(left)
        yield from self._news(left)
        self._store([], [spec for chunk in chunks for spec in self._withheld(chunk, refused)])
        for chunk in chunks:
            if specs := [spec for spec in chunk.specs if spec not in self.failed]:
                known = {spec: self.reached[spec] for spec in specs if spec in self.reached}
                threads, device = max(1, int(self.share.cpus)), "cuda" if self.share.gpus else "cpu"
                stream = self.task.remote([self.parts], specs, known, self.decide, self.memory, threads, device, code_version())
                self.out[stream] = chunk

    def _withheld(self, chunk: _Chunk, refused: set[PruneSpec]) -> Family:
        """Take the families that are done, and those of which another process holds a point, out of a chunk.

        Returns their points. Families are claimed whole, because the comparison between merges needs all of their points.
        """
        ours, theirs, withheld = list[Family](), list[Family](), Family()
        for family in chunk.families:
            free = all(self._is_done(spec) for spec in family if spec in refused)
            if free and not all(map(self._is_done, family)):
                ours.append(family)
                continue
            withheld += family
            if not free:
                theirs.append(family)
        if theirs:
            self.contested.append(replace(chunk, families=theirs))
        chunk.families = ours
        return withheld

    def _claim(self, specs: list[PruneSpec]) -> set[PruneSpec]:
        """Claim points; return those that other processes hold."""
        if self.store is None:
            return set()
        self.held.update(specs)
        refused = self.store.claim_all((spec, self.points[spec]) for spec in specs)
        self.held -= refused
        return refused

    def _store(self, results: list[tuple[Result, Origin]], released: Iterable[PruneSpec]) -> None:
        """Store results and release the claims of points, in one transaction."""
        if self.store:
            gone = self.held.intersection(released)
            self.store.put_all(results, [(spec, self.points[spec]) for spec in gone])
            self.held -= gone

    def _news(self, specs: list[PruneSpec]) -> Iterator[Result]:
        """Yield results of these points that other processes have stored since the last check."""
        if self.store:
            for spec, stored in self.store.get((spec, self.points[spec]) for spec in specs).items():
                if spec not in self.reached or stored.count > self.reached[spec].count:
                    self.reached[spec] = stored
                    yield stored

    def _ready(self) -> list[Any]:
        """Return streams that have an item, at most `_TOGETHER`; wait for one for at most `_POLL` seconds.

        One call for all of them, because a call takes time for each stream that it is given. It does not wait while there are
        tasks to send.
        """
        if not self.out:
            time.sleep(_POLL)
            return []
        streams = list(self.out)
        ready = self.ray.wait(streams, num_returns=min(len(streams), _TOGETHER), timeout=0)[0]
        return ready if ready or self._room() > 0 else self.ray.wait(streams, num_returns=1, timeout=_POLL)[0]

    def _receive(self, streams: list[Any]) -> Iterator[Result | Failure]:
        """Take an item from each stream and store what came, and then yield it."""
        came, results = list[Result | Failure](), list[tuple[Result, Origin]]()
        try:
            for stream in streams:
                chunk = self.out[stream]
                for item in self._taken(stream, chunk):
                    came.append(item)
                    place = replace(self.points[item.spec], device=chunk.device)
                    if isinstance(item, Result):
                        results.append((item, place))
                    elif self.store:
                        self.store.fail(item.spec, place, item.reason)
                    self._keep(item)
        finally:
            self._store(results, self.ended)
            self.ended.clear()
        yield from came

    def _taken(self, stream: Any, chunk: _Chunk) -> Iterator[Result | Failure]:
        """Yield the next item of a stream, or the failures of the points that it leaves; drop a stream that has ended."""
        errors = self.ray.exceptions
        try:
            item = self.ray.get(next(stream))
        except StopIteration:
            self.ended += self.out.pop(stream).specs
        except errors.RayTaskError as error:
            self.out.pop(stream)
            yield from self._give_up(chunk, reason(error.cause or error))
        except errors.RayError as error:
            self.ray.cancel(stream)  # the task may still run if only its result was lost
            self.out.pop(stream)
            yield from self._lost(chunk, f"{type(error).__name__}: {one_line(error).split('. ')[0]}")
        else:
            if isinstance(item, str):
                chunk.device, self.welcome = item, True
            else:
                yield item

    def _keep(self, item: Result | Failure) -> None:
        if isinstance(item, Failure):
            self.failed.add(item.spec)
        else:
            self.reached[item.spec] = item
            if item.complete:
                tell(item)

    def _lost(self, chunk: _Chunk, reason: str) -> Iterator[Failure]:
        """Requeue the remaining points of a lost worker.

        From the second time on they are sent point by point, in case one of them causes the loss.
        """
        chunk.lost += 1
        left = [spec for spec in chunk.specs if not self._is_done(spec)]
        if chunk.lost > RETRIES:
            yield from self._give_up(chunk, f"its worker was lost {chunk.lost} times ({reason})")
            return
        _log.warning("a worker was lost (%s); retrying its %d points (%d of %d)", reason, len(left), chunk.lost, RETRIES)
        pieces = [chunk.families] if chunk.lost == 1 else [[[spec]] for spec in left]
        self.waiting.extendleft(_Chunk(piece, chunk.lost) for piece in reversed(pieces))

    def _give_up(self, chunk: _Chunk, reason: str) -> Iterator[Failure]:
        if not self.welcome:  # no worker has ever started, so no other will
            raise IntrafusionError(
                f"the workers cannot start ({reason.split('. ')[0]}); install the same version of intrafusion on all of them"
            )
        self.ended += chunk.specs
        yield from [Failure(spec, reason) for spec in chunk.specs if not self._is_done(spec)]

    def _is_done(self, spec: PruneSpec) -> bool:
        return spec in self.failed or (spec in self.reached and self.reached[spec].complete)

    def _cancel(self) -> None:
        """Cancel all running tasks, and kill those that do not end within `_LEAVE` seconds."""
        if not self.out:
            return
        ends, deadline = {stream.completed(): stream for stream in self.out}, time.monotonic() + _LEAVE
        still = list(ends)
        while still and time.monotonic() < deadline:  # a task that is just starting may miss the first request
            for end in still:
                self.ray.cancel(ends[end])
            _, still = self.ray.wait(still, num_returns=len(still), timeout=min(_AGAIN, _LEAVE))
        for end in still:
            self.ray.cancel(ends[end], force=True)
        self.out.clear()


def _families(specs: Iterable[PruneSpec]) -> list[Family]:
    families: dict[PruneSpec, Family] = {}
    for spec in specs:
        families.setdefault(spec.but(merge="drop"), []).append(spec)
    return list(families.values())


def _split(families: list[Family], session: Session, slots: int) -> Iterator[_Chunk]:
    """Split families into chunks; points with the same cut stay together, unless that leaves too few chunks for all workers."""
    most = max(1, sum(map(len, families)) // (_SHARES * slots))
    for _, group in itertools.groupby(families, key=lambda family: cut_of(family[0], session)):
        behind = list(group)
        pieces = math.ceil(sum(map(len, behind)) / most)
        size = math.ceil(len(behind) / pieces)
        yield from (_Chunk(behind[start : start + size]) for start in range(0, len(behind), size))
