"""The state dicts in the content of a weights file: training scripts wrap them in tables, beside settings and counters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from intrafusion.errors import IntrafusionError, shown
from intrafusion.models.safe_unpickling import Beside

PREFIXES = ("module", "model", "net", "network", "_orig_mod", "backbone")  # wrappers add these before keys or inside them
_PLAIN = (
    "state_dict", "model_state_dict", "model_state", "net_state_dict", "model", "net", "network", "module", "weights",
    "params", "student",
)  # fmt: skip
AVERAGED = (
    "model_ema", "ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "model_state_dict_ema",
    "ema_state", "params_ema", "averaged_model", "teacher",
)  # fmt: skip
WRAPPERS = (*_PLAIN, *AVERAGED)  # keys under which files store a state dict, in order of preference
_DEEP = 4  # maximum nesting of wrappers
_MOST_TABLES = 100


def state_dicts(content: Any, path: Path, key: str | None = None) -> dict[str, dict[str, Any]]:
    """Find the state dicts in a file's content, most likely first.

    The keys of the result are locations in the file ("" for the whole content). Values that are not tensors are included.
    key: search only here, such as "model_ema" or "model.state_dict"; it may also be a key prefix.
    Raises IntrafusionError if nothing is found.
    """
    if isinstance(content, Beside):
        raise IntrafusionError(f"{path} contains a {content.of}, not a state dict (names to tensors)")
    found = dict(_found(content))
    if key is not None:
        chosen = _at(content, key)
        known = [name for name in found if name]
        if chosen is None:
            raise IntrafusionError(
                f"{path} has no weights under {shown(key)}; "
                + (f"choose one of {', '.join(known)}" if known else "it has one state dict, which needs no key")
            )
        found = dict(_found(chosen, key))
    if len(found) > _MOST_TABLES:
        raise IntrafusionError(f"{path} has {len(found):,} state dicts; the limit is {_MOST_TABLES}; save only the one to use")
    if not found:
        holds = ", ".join(map(_text, list(content)[:6])) if isinstance(content, dict) else ""
        if _has_arrays(content):
            holds += "; NumPy arrays are not supported; save them as tensors"
        raise IntrafusionError(f"{path} has no state dict (names to tensors)" + (f", only {holds}" if holds else ""))
    return found


def _has_arrays(content: Any, depth: int = 0, seen: set[int] | None = None) -> bool:
    seen = set() if seen is None else seen
    if isinstance(content, dict) and depth <= _DEEP and id(content) not in seen:
        seen.add(id(content))
        return any(_has_arrays(value, depth + 1, seen) for value in dict.values(content))
    return isinstance(content, Beside) and content.of.endswith("._reconstruct")


def _found(
    content: Any, place: str = "", depth: int = 0, seen: list[int] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (location, state dict) pairs: wrapped tables, or else the whole table and then its parts by key prefix.

    The depth of nesting and the number of tables are limited.
    """
    seen = [] if seen is None else seen
    if not isinstance(content, dict) or depth > _DEEP or len(seen) > 10 * _MOST_TABLES:
        return
    seen.append(depth)
    table = {_text(key): value for key, value in dict.items(content)}  # dict.items, because a file may override .items
    within = [one for name in WRAPPERS for one in _found(table.get(name), _joined(place, name), depth + 1, seen)]
    if within:
        yield from within
    elif any(isinstance(value, Tensor) for value in table.values()):
        yield place, table
        for name in dict.fromkeys((*WRAPPERS, *PREFIXES)):
            if part := _below(table, name):
                yield _joined(place, name), part


def _at(content: Any, key: str) -> Any:
    """Return the content under a key: a nested table, or the part of a table with that key prefix. None if there is none."""
    if not isinstance(content, dict):
        return None
    table = {_text(name): value for name, value in dict.items(content)}
    if isinstance(table.get(key), dict):
        return table[key]
    for name, value in table.items():
        if key.startswith(f"{name}.") and (found := _at(value, key[len(name) + 1 :])) is not None:
            return found
    return _below(table, key) or None


def _below(table: dict[str, Any], name: str) -> dict[str, Any]:
    return {key[len(name) + 1 :]: value for key, value in table.items() if key.startswith(f"{name}.")}


def _text(key: Any) -> str:
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else shown(key) if not isinstance(key, str) else key


def _joined(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
