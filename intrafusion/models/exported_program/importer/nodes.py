"""The nodes of an exported graph: the operator of each, its arguments and the names of its outputs."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.importer.aten import CHECKS, DROPOUTS, INSTEAD, NOTHING, SIZES
from intrafusion.models.exported_program.importer.calls import CALLS
from intrafusion.models.exported_program.operators import DIRECT_CALLS
from intrafusion.models.exported_program.shapes import Batch, Size, divided, remainder, scaled, total, whole_number

_PLAIN_KINDS = {"as_int": int, "as_bool": bool, "as_float": (int, float), "as_string": str, "as_none": bool}
_LISTS = {"as_ints": int, "as_bools": bool, "as_floats": (int, float)}
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}


def split_target(target: Any) -> tuple[str, str, bool]:
    """Split an operator's target into its name, its overload, and whether it works in place.

    For example, aten.relu_.default gives ("relu", "default", True). Arithmetic on sizes gives ("add", "", False). Raises
    IntrafusionError for an operator that programs may not use.
    """
    told = target if isinstance(target, str) else ""
    if told.startswith("_operator.") and told.removeprefix("_operator.") in SIZES:
        return told.removeprefix("_operator."), "", False
    if found := re.fullmatch(r"torch\.ops\.aten\.(\w{1,60})\.(\w{1,60})", told):
        name, overload = found.groups()
        in_place = name.endswith("_")
        name = name.removesuffix("_")
        if name in (*CHECKS, *DROPOUTS, *NOTHING) or f"{name}.{overload}" in DIRECT_CALLS or f"{name}.{overload}" in CALLS:
            return name, overload, in_place
    instead = next((f"; {advice}" for start, advice in INSTEAD.items() if told.startswith(f"torch.ops.aten.{start}")), "")
    raise IntrafusionError(f"it uses the operator {str(target)[:80]!r}, which is not supported{instead}")


def size_arithmetic(name: str, args: list[Any]) -> Size | None:
    """Evaluate the file's arithmetic on sizes. Return None for a comparison, whose result must not be read."""
    for one in args:
        whole_number(one.times if isinstance(one, Batch) else one)
    if name == "neg":
        return scaled(args[0], -1)
    first, second = args
    if name == "sub":
        return total(first, scaled(second, -1))
    does = {"add": total, "mul": scaled, "floordiv": divided, "mod": remainder}
    return does[name](first, second) if name in does else None


def argument(written: Mapping[str, Any], names: Mapping[str, Any]) -> Any:
    """Translate an argument of the file: a number, a binding, or a list of them. names: what each name of the file means."""
    ((kind, raw),) = written.items()
    if kind == "as_none":
        return None
    if kind in _PLAIN_KINDS and isinstance(raw, _PLAIN_KINDS[kind]) and len(str(raw)) < 40:  # type: ignore[arg-type]
        return raw
    if kind in _LISTS and isinstance(raw, list) and all(isinstance(one, _LISTS[kind]) for one in raw):  # type: ignore[arg-type]
        return list(raw)
    if kind in ("as_tensor", "as_optional_tensor"):
        return None if raw.get("as_none") else _named(raw.get("as_tensor", raw)["name"], names)
    if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
        return _named(raw["as_name"], names) if "as_name" in raw else argument(raw, names)
    if kind in ("as_sym_ints", "as_sym_floats"):
        return [_named(one["as_name"], names) if "as_name" in one else argument(one, names) for one in raw]
    if kind == "as_tensors":
        return [_named(one["name"], names) for one in raw]
    if kind == "as_optional_tensors":
        return [None if one.get("as_none") else _named(one["as_tensor"]["name"], names) for one in raw]
    if kind == "as_scalar_type" and raw in _DTYPES:
        return _DTYPES[raw]
    if kind == "as_memory_format" and raw in _FORMATS:
        return _FORMATS[raw]
    if kind == "as_layout" and raw == 7:
        return torch.strided
    if kind == "as_device":
        return str(raw)
    if kind == "as_float":
        raise IntrafusionError("it computes with NaN or infinity; write torch.finfo(torch.float32).min for -inf")
    raise IntrafusionError(f"it passes an argument of kind {str(kind)[:40]!r}, which is not supported")


def _named(name: str, names: Mapping[str, Any]) -> Any:
    if names.get(name) is None:
        raise IntrafusionError(f"it uses {str(name)[:80]!r} before it is defined")
    return names[name]


def output_names(outputs: list[Mapping[str, Any]]) -> list[str]:
    names: list[str] = []
    for output in outputs:
        ((kind, raw),) = output.items()
        if kind == "as_tensors":
            names += [one["name"] for one in raw]
        elif kind == "as_tensor":
            names.append(raw["name"])
        elif kind in ("as_sym_int", "as_sym_bool"):
            names.append(raw["as_name"])
        elif kind != "as_none":
            raise IntrafusionError(f"it returns a value of kind {str(kind)[:40]!r}, which is not supported")
    return names
