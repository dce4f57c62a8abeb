"""How much memory results hold, so that those who keep them for later can say when it is enough."""

from collections.abc import Mapping
from dataclasses import is_dataclass

import numpy as np
from torch import Tensor, nn


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
