"""A thread-safe LRU cache that computes each key once, bounded in number and bytes, and the memory size of results."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from intrafusion.runtime.cancellation import checkpoint


class Cache:
    """Cache of at most `limit` results and `memory` bytes in total; the newest result is kept whatever its size.

    Two threads that request one key compute it once; other keys are not blocked.
    """

    def __init__(self, limit: int = 256, memory: float = float("inf")):
        self._results: OrderedDict[Hashable, Any] = OrderedDict()
        self._bytes: dict[Hashable, int] = {}
        self._memory = memory
        self._turns: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()
        self._limit = limit

    def get(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return the result of this key; compute it if it is not cached. An error is not cached."""
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        while not turn.acquire(timeout=0.1):
            checkpoint(idle=True)  # the job that computes it may need the turn
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
        """Return the cached result of this key, or None."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
            return self._results.get(key)


def held_bytes(thing: object) -> int:
    """Return the bytes of tensors, arrays and byte strings in an object, through containers, dataclasses and modules.

    Shared storage is counted once.
    """
    ahead: list[object] = [thing]
    seen: dict[int, object] = {}
    places: dict[int, int] = {}
    while ahead:
        one = ahead.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one  # keep a reference, because a new object could reuse the id
        if isinstance(one, Tensor):
            places[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, np.ndarray):
            while isinstance(one.base, np.ndarray):  # a view keeps its whole base alive
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
