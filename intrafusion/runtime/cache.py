"""A thread-safe LRU cache in which each key is computed once, bounded in number and bytes; and how many bytes results hold."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from intrafusion.runtime.cancellation import checkpoint


class Cache:
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
                while len(self._results) > 1 and (len(self._results) > self._limit or sum(self._bytes.values()) > self._memory):
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


def held_bytes(thing: object) -> int:
    """Bytes of the tensors, arrays and byte strings in something, through containers, dataclasses and modules.

    What lies in one place is counted once.
    """
    ahead: list[object] = [thing]
    seen: dict[int, object] = {}
    places: dict[int, int] = {}
    while ahead:
        one = ahead.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one  # held on to, as the next object could get its number
        if isinstance(one, Tensor):
            places[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, np.ndarray):
            while isinstance(one.base, np.ndarray):  # a view holds all that it looks into
                one = one.base
            places[id(one)] = one.nbytes
        elif isinstance(one, bytes | bytearray):
            places[id(one)] = len(one)
        elif isinstance(one, nn.Module):
            ahead += [*one.parameters(), *one.buffers()]
        elif isinstance(one, Mapping):
            ahead += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            ahead += one
        elif is_dataclass(one) and not isinstance(one, type):
            ahead += vars(one).values()
    return sum(places.values())
