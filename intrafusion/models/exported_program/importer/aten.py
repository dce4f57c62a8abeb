"""The calls that `torch.export` writes: which of them change no numbers, and their arguments by name.

A call has a name and an overload, such as "softmax.int". PyTorch's schemas give the argument names, and the defaults for
arguments that the file omits. No PyTorch operator is run by its name.
"""

from typing import Any

import torch

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.shapes import whole_number

CHECKS = (
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size", "sym_constrain_range",
)  # fmt: skip
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")
NOTHING = ("alias", "detach", "contiguous", "to", "type_as", "_to_copy", "clone", "lift_fresh_copy", "lift_fresh")
COPIES = ("_to_copy", "clone", "lift_fresh_copy")
SAME_TENSOR = ("alias", "detach", "lift_fresh")
SIZES = ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
EVAL = "call model.eval() before torch.export.export"
INSTEAD = {  # advice for unsupported operators that networks often use
    "_weight_norm": "remove the weight norm before torch.export.export, by remove_parametrizations or remove_weight_norm",
    "conv_transpose2d": "replace it by F.interpolate and a convolution",
}
_IDLE = (  # arguments that have no effect here
    "device", "pin_memory", "layout", "memory_format", "cudnn_enabled", "cudnn_enable", "non_blocking",
)  # fmt: skip


def arguments(name: str, overload: str, told: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name, with PyTorch's defaults. Raises IntrafusionError for an unknown argument."""
    found = getattr(getattr(torch.ops.aten, name, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise IntrafusionError(f"it uses the operator aten.{name}.{overload}, which this version of PyTorch does not have")
    schema = found._schema.arguments
    if "self" in told and "self" not in {one.name for one in schema}:  # for an in-place operator
        told = {schema[0].name: told["self"], **{key: value for key, value in told.items() if key != "self"}}
    if unknown := told.keys() - {one.name for one in schema}:
        raise IntrafusionError(f"it passes aten.{name}.{overload} an unknown argument {sorted(unknown)[0][:80]!r}")
    for one in schema:
        if one.name not in told and not one.has_default_value() and one.name not in _IDLE:
            raise IntrafusionError(f"it calls aten.{name}.{overload} without its {one.name}")
    return {one.name: told.get(one.name, one.default_value) for one in schema}


def check_idle(name: str, overload: str, told: dict[str, Any], used: tuple[str, ...]) -> None:
    """Refuse arguments other than those in `used`, unless they have PyTorch's default effect."""
    schema = {one.name: one for one in getattr(getattr(torch.ops.aten, name), overload)._schema.arguments}
    for key, value in told.items():
        without = not schema[key].has_default_value() and value in (None, False)
        if key in used or key in _IDLE or value == schema[key].default_value or without:
            continue
        if key != "dtype" or value != torch.float32:
            raise IntrafusionError(f"it calls aten.{name}.{overload} with {key}={str(value)[:40]}, which is not supported")


def as_taken(given: Any, hint: Any) -> Any:
    """Convert an argument to the table's form: repeat a single number for a pair, and wrap one dimension in a tuple."""
    if hint == tuple[int, int]:
        return as_pair(given)
    if hint == tuple[int, ...] and type(given) is int:
        return (given,)
    return given


def as_tuple(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def as_ints(given: Any) -> tuple[int, ...]:
    return tuple(whole_number(one) for one in as_tuple(given))


def as_pair(given: Any) -> tuple[int, int]:
    numbers = as_ints(given)
    numbers = numbers * 2 if len(numbers) == 1 else numbers
    if len(numbers) != 2:
        raise IntrafusionError(f"it has {str(given)[:40]} instead of one or two integers")
    return numbers[0], numbers[1]
