"""A store for a server: while its file cannot be used, results wait in memory, and the work goes on."""

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
    """A `Store` whose results, claims and failures never raise once it is open; those of studies do.

    A result that cannot be written (the disk is full, read-only or locked, the file was removed) waits in memory, and goes
    to the file when that can be used again, with the next thing that is asked of this object. Until then it is known here
    alone, and claims hold nobody off. problem: why the file could not be used last, in one line; None once nothing waits.
    """

    def __init__(self, path: Path | str | None = None, wait: float = 2.0):
        self.problem: str | None = None
        self._results: dict[str, tuple[Result, Origin]] = {}  # that wait, by key
        self._given_up: set[str] = set()  # claims whose release waits
        self._next = 0.0  # when the file is tried again, by time.monotonic()
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

    def put(self, result: Result, origin: Origin) -> None:
        with self._lock:
            self._results[key := point_key(result.spec, origin)] = result, origin
        self.measured[key] = result.count
        self._catch_up()

    def fail(self, spec: PruneSpec, origin: Origin, reason: str) -> None:
        with self._or_later():
            super().fail(spec, origin, reason)

    def claim(self, spec: PruneSpec, origin: Origin, owner: str | None = None) -> bool:
        self._catch_up()
        if time.monotonic() >= self._next:
            with self._or_later():
                return super().claim(spec, origin, owner)
        return True

    def beat(self) -> None:
        if time.monotonic() >= self._next:
            with self._or_later():
                super().beat()

    def _release(self, keys: set[str]) -> None:
        with self._lock:
            self._given_up |= keys & self._held
        self._catch_up()

    def _catch_up(self) -> None:
        """Bring to the file what waits, unless it could not be used a moment ago."""
        with self._lock, self._or_later():
            if time.monotonic() < self._next:
                return
            if not self.is_there():
                removed = self._db, self._lister
                with self._listing:
                    self._open()
                for db in removed:
                    db.close()
            for key, (result, origin) in list(self._results.items()):
                super().put(result, origin)
                del self._results[key]
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
