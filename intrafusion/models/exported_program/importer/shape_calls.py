"""Calls that reshape, reorder, select or fill."""

from collections.abc import Sequence
from typing import Any

import torch

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.importer.aliases import current
from intrafusion.models.exported_program.importer.aten import as_ints, as_tuple
from intrafusion.models.exported_program.importer.draft import Call, Draft
from intrafusion.models.exported_program.operators.checks import axis
from intrafusion.models.exported_program.program import Weight
from intrafusion.models.exported_program.shapes import Batch, fitted, numel, total, whole_number

_LAST = (1 << 63) - 1  # marks an open end of a slice


def _reshaped(draft: Draft, x: Any, sizes: Any) -> Any:
    shape, told = draft.shape(x), current(as_tuple(sizes))
    if draft.static is not None and shape.sizes[:1] == (Batch(1),) and told[:1] == (draft.static,):
        told = (Batch(1), *told[1:])  # the file is only valid for this batch size
    after = fitted(shape, told)
    if len(shape.sizes) > 2 and after == (shape.sizes[0], numel(shape.sizes[1:])):  # works for any number of channels
        return draft.step("flatten", x, 1)
    return draft.step("reshape", x, told)


def _flattened(draft: Draft, x: Any, start: int, end: int) -> Any:
    shape = draft.shape(x)
    first, last = axis(shape, start), axis(shape, end)
    if first == 1 and last == len(shape.sizes) - 1:
        return draft.step("flatten", x, 1)
    joined = numel(shape.sizes[first : last + 1])
    return draft.step("reshape", x, (*shape.sizes[:first], joined, *shape.sizes[last + 1 :]))


def _unflattened(draft: Draft, x: Any, dim: int, sizes: Any) -> Any:
    shape = draft.shape(x)
    place = axis(shape, dim)
    return draft.step("reshape", x, (*shape.sizes[:place], *as_tuple(sizes), *shape.sizes[place + 1 :]))


def _sliced(draft: Draft, x: Any, dim: int, start: Any, end: Any, step: int) -> Any:
    shape = draft.shape(x)
    place = axis(shape, dim)
    size = shape.sizes[place]
    begin = 0 if start is None else start
    if begin == 0 and step == 1 and (end in (None, _LAST) or end == size):
        return x
    if isinstance(size, Batch) or not all(type(one) is int for one in (begin, step)) or step < 1:
        raise IntrafusionError(f"it slices {shape} along the batch, which is not supported")
    stop = size if end in (None, _LAST) else whole_number(end)
    begin, stop = (max(0, one + size) if one < 0 else min(one, size) for one in (whole_number(begin), stop))
    return draft.step("slice", x, place, begin, stop, step)


def _split(draft: Draft, x: Any, length: int, dim: int) -> Any:
    size = draft.shape(x).sizes[axis(draft.shape(x), dim)]
    if isinstance(size, Batch) or type(length) is not int or length < 1 or size > length * 1024:
        raise IntrafusionError(f"it splits {draft.shape(x)} into parts of {str(length)[:20]}, which is not supported")
    lengths = tuple(min(length, size - start) for start in range(0, size, length))
    return draft.step("split", x, lengths, dim)


def _transposed(draft: Draft, x: Any, first: int, second: int) -> Any:
    made, shape, weight = draft.step("transpose", x, first, second), draft.shape(x), current(x)
    if isinstance(weight, Weight) and len(shape.sizes) == 2 and axis(shape, first) != axis(shape, second):
        draft.turned[made] = weight
    return made


def _permuted(draft: Draft, x: Any, dims: Sequence[int]) -> Any:
    if len(dims) == len(draft.shape(x).sizes) == 2 and [axis(draft.shape(x), dim) for dim in dims] == [1, 0]:
        return _transposed(draft, x, 0, 1)
    return draft.step("permute", x, tuple(dims))


def _filled(draft: Draft, x: Any, value: Any) -> Any:
    """Return a tensor of x's shape filled with one number, which may be a constant of the file."""
    number = current(value)
    if isinstance(number, Weight) and draft.tensors[number.path].numel() == 1 and number.path not in draft.learned:
        number = draft.tensors[number.path].item()
    return draft.step("full", x, draft.shape(x).sizes, number)


def _copied(draft: Draft, x: Any, source: Any) -> Any:
    if draft.shape(source) == draft.shape(x):
        return current(source)
    return draft.step("expand", source, draft.shape(x).sizes)


def _squeezed(draft: Draft, x: Any, dims: Sequence[int]) -> Any:
    shape = draft.shape(x)
    for place in sorted({axis(shape, dim) for dim in dims}, reverse=True):
        x = draft.step("squeeze", x, place)
    return x


def _index(draft: Draft, x: Any, indices: list[Any]) -> Any:
    if len(indices) != 1 or indices[0] is None:
        raise IntrafusionError("it indexes along other dimensions than the first, which is not supported")
    return draft.step("index", x, indices[0])


def _new(draft: Draft, told: dict[str, Any], sizes: Any, value: Any) -> Any:
    if told["dtype"] not in (None, torch.float32):
        raise IntrafusionError(f"it creates a tensor of {told['dtype']}; export the network in float32")
    return draft.step("full", told["self"], as_tuple(sizes), value)


CALLS: dict[str, Call] = {
    "copy.default": lambda draft, t: _copied(draft, t["self"], t["src"]),
    "expand.default": lambda draft, t: draft.step("expand", t["self"], as_tuple(t["size"])),
    "expand_as.default": lambda draft, t: draft.step("expand", t["self"], draft.shape(t["other"]).sizes),
    "fill.Scalar": lambda draft, t: _filled(draft, t["self"], t["value"]),
    "fill.Tensor": lambda draft, t: _filled(draft, t["self"], t["value"]),
    "flatten.using_ints": lambda draft, t: _flattened(draft, t["self"], t["start_dim"], t["end_dim"]),
    "index.Tensor": lambda draft, t: _index(draft, t["self"], t["indices"]),
    "narrow.default": lambda draft, t: _sliced(draft, t["self"], t["dim"], t["start"], total(t["start"], t["length"]), 1),
    "new_zeros.default": lambda draft, t: _new(draft, t, t["size"], 0),
    "zeros_like.default": lambda draft, t: _new(draft, t, draft.shape(t["self"]).sizes, 0),
    "ones_like.default": lambda draft, t: _new(draft, t, draft.shape(t["self"]).sizes, 1),
    "full_like.default": lambda draft, t: _new(draft, t, draft.shape(t["self"]).sizes, t["fill_value"]),
    "numpy_T.default": lambda draft, t: _permuted(draft, t["self"], range(len(draft.shape(t["self"]).sizes))[::-1]),
    "permute.default": lambda draft, t: _permuted(draft, t["self"], as_ints(t["dims"])),
    "reshape.default": lambda draft, t: _reshaped(draft, t["self"], t["shape"]),
    "slice.Tensor": lambda draft, t: _sliced(draft, t["self"], t["dim"], t["start"], t["end"], t["step"]),
    "split.Tensor": lambda draft, t: _split(draft, t["self"], t["split_size"], t["dim"]),
    "squeeze.dims": lambda draft, t: _squeezed(draft, t["self"], t["dim"]),
    "sym_size.int": lambda draft, t: draft.shape(t["self"]).sizes[axis(draft.shape(t["self"]), t["dim"])],
    "t.default": lambda draft, t: _transposed(draft, t["self"], 0, 1),
    "transpose.int": lambda draft, t: _transposed(draft, t["self"], t["dim0"], t["dim1"]),
    "unflatten.int": lambda draft, t: _unflattened(draft, t["self"], t["dim"], t["sizes"]),
    "_unsafe_view.default": lambda draft, t: _reshaped(draft, t["self"], t["size"]),
    "view.default": lambda draft, t: _reshaped(draft, t["self"], t["size"]),
    "view_as.default": lambda draft, t: _reshaped(draft, t["self"], draft.shape(t["other"]).sizes),
    "zero.default": lambda draft, t: _filled(draft, t["self"], 0),
}
