"""A store for a server: while its file is unusable, results are held in memory, so that work can continue."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from intrafusion.errors import IntrafusionError
from intrafusion.spec import PruneSpec
from intrafusion.studies.measurement import Result
from intrafusion.studies.store.sqlite import Origin, Store, point_key

_AGAIN = 5.0  # seconds before a file that could not be used is tried again


class StoreOrMemory(Store):
    """A `Store` whose methods for results, claims and failures never raise once it is open; those for studies do.

    A result that cannot be written (the disk is full, read-only or locked, or the file was removed) is held in memory. It is
    written by the next method call after the file has become usable again. Until then only this object knows the result, and
    claims do not stop other processes. problem: the latest reason why the file was unusable, in one line; None once nothing
    waits to be written.
    """

    def __init__(self, path: Path | str | None = None, wait: float = 2.0):
        self.problem: str | None = None
        self._results: dict[str, tuple[Result, Origin]] = {}  # results not yet written, by key
        self._given_up: set[str] = set()  # keys of claims not yet released in the file
        self._next = 0.0  # time.monotonic() at which to try the file again
        super().__init__(path, wait)

    def get(self, points: Iterable[tuple[PruneSpec, Origin]]) -> dict[PruneSpec, Result]:
        self._catch_up()
        asked, found = list(points), dict[PruneSpec, Result]()
        with self._or_later():
            found = super().get(asked)
        with self._lock:
            waiting = {spec: self._results.get(point_key(spec, origin)) for spec, origin in asked if self._results}
        for spec, entry in waiting.items():
            if entry and (spec not in found or entry[0].count > found[spec].count):
                found[spec] = replace(entry[0], spec=spec)
        return found

    def put_all(self, results: Iterable[tuple[Result, Origin]], released: Iterable[tuple[PruneSpec, Origin]] = ()) -> None:
        held = {point_key(result.spec, origin): (result, origin) for result, origin in results}
        with self._lock:
            self._results |= held
            self._given_up |= self._ours({point_key(spec, origin) for spec, origin in released})
        self.measured |= {key: result.count for key, (result, _) in held.items()}
        self._catch_up()

    def fail(self, spec: PruneSpec, origin: Origin, reason: str) -> None:
        with self._or_later():
            super().fail(spec, origin, reason)

    def claim_all(self, points: Iterable[tuple[PruneSpec, Origin]], owner: str | None = None) -> set[PruneSpec]:
        self._catch_up()
        if time.monotonic() >= self._next:
            with self._or_later():
                return super().claim_all(points, owner)
        return set()

    def beat(self) -> None:
        if time.monotonic() >= self._next:
            with self._or_later():
                super().beat()

    def _release(self, keys: set[str]) -> None:
        with self._lock:
            self._given_up |= keys & self._held
        self._catch_up()

    def _catch_up(self) -> None:
        """Write held results and releases to the file, unless it was found unusable within the last `_AGAIN` seconds."""
        with self._lock, self._or_later():
            if time.monotonic() < self._next:
                return
            if not self.is_there():
                removed = self._db, self._lister
                with self._listing:
                    self._open()
                for db in removed:
                    db.close()
            super().put_all(self._results.values())
            self._results.clear()
            super()._release(self._given_up)
            self._given_up.clear()
            self.problem = None

    @contextmanager
    def _or_later(self) -> Iterator[None]:
        try:
            yield
        except IntrafusionError as error:
            self.problem = str(error)
            self._next = time.monotonic() + _AGAIN
