"""Results by key: each computed once, whoever asks, and the least recently used forgotten."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from intrafusion.runtime.cancellation import checkpoint
from intrafusion.runtime.memory import held_bytes


class Memo:
    """At most `limit` results, of at most `memory` bytes in all, but for the last one, which is kept whatever it holds.

    Two threads that ask for one key compute it once; other keys do not wait for it.
    """

    def __init__(self, limit: int = 256, memory: float = float("inf")):
        self._results: OrderedDict[Hashable, Any] = OrderedDict()
        self._bytes: dict[Hashable, int] = {}
        self._memory = memory
        self._turns: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()
        self._limit = limit

    def get(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The result of this key, computed now if nobody has before. An error is not remembered."""
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        while not turn.acquire(timeout=0.1):
            checkpoint(idle=True)  # who computes it may need the turn
        try:
            if (known := self.peek(key)) is not None:
                return known
            result = compute()
            size = held_bytes(result) if self._memory < float("inf") else 0
            with self._lock:
                self._results[key], self._bytes[key] = result, size
                while len(self._results) > 1 and (
                    len(self._results) > self._limit or sum(self._bytes.values()) > self._memory
                ):
                    del self._bytes[self._results.popitem(last=False)[0]]
            return result
        finally:
            turn.release()
            with self._lock:
                self._turns.pop(key, None)

    def peek(self, key: Hashable) -> Any | None:
        """The result of this key, None when nobody has computed it."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
            return self._results.get(key)
