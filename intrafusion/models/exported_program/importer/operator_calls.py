"""Calls that become an operator after their arguments are checked and put into its form, or several operators."""

from typing import Any

import torch

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.importer.aten import as_ints, as_pair
from intrafusion.models.exported_program.importer.draft import Call, Draft
from intrafusion.models.exported_program.operators.checks import axis
from intrafusion.models.exported_program.shapes import at, whole_number


def _sum(draft: Draft, name: str, told: dict[str, Any]) -> Any:
    other = told["other"] if told["alpha"] == 1 else draft.step("mul", told["other"], told["alpha"])
    return draft.step(name, told["self"], other)


def _addcmul(draft: Draft, x: Any, first: Any, second: Any, value: Any) -> Any:
    made = draft.step("mul", first, second)
    made = made if value == 1 else draft.step("mul", made, value)
    return draft.step("add", x, made)


def _gated(draft: Draft, x: Any, dim: int) -> Any:
    half = at(draft.shape(x).sizes[axis(draft.shape(x), dim)], 1) // 2
    first, second = draft.step("split", x, (half, half), dim)
    return draft.step("mul", first, draft.step("sigmoid", second))


def _all_of(draft: Draft, x: Any, dims: Any) -> tuple[int, ...]:
    return tuple(range(len(draft.shape(x).sizes))) if dims is None or dims == [] else as_ints(dims)


def _deviation(draft: Draft, told: dict[str, Any], root: bool) -> Any:
    correction = 1 if told["correction"] is None else told["correction"]
    if correction not in (0, 1):
        raise IntrafusionError(f"it has a variance with correction={str(correction)[:20]}; only 0 and 1 are supported")
    made = draft.step("var", told["self"], _all_of(draft, told["self"], told["dim"]), int(correction), told["keepdim"])
    return draft.step("sqrt", made) if root else made


def _length(draft: Draft, told: dict[str, Any]) -> Any:
    if told["ord"] != 2 or told["dtype"] not in (None, torch.float32):
        raise IntrafusionError("it has a norm other than the Euclidean norm in float32, which is not supported")
    return draft.step("norm", told["self"], _all_of(draft, told["self"], told["dim"]), told["keepdim"])


def _einsum(draft: Draft, equation: Any, tensors: list[Any]) -> Any:
    """Translate a batched matrix product: "..id, ..jd -> ..ij" or "..ij, ..jd -> ..id"."""
    left, _, right = str(equation).replace(" ", "").partition("->")
    first, _, second = left.partition(",")
    stack, (row, inner) = first[:-2], (first[-2:-1], first[-1:])
    if len(tensors) == 2 and len({*first, *second}) == len(stack) + 3 and second[:-2] == stack == right[:-2]:
        if second[-1] == inner and right[-2:] == row + second[-2]:
            return draft.step("matmul", tensors[0], draft.step("transpose", tensors[1], -2, -1))
        if second[-2] == inner and right[-2:] == row + second[-1]:
            return draft.step("matmul", *tensors)
    raise IntrafusionError(f"it uses the einsum {str(equation)[:40]!r}, which is not supported")


def _attention(draft: Draft, told: dict[str, Any]) -> Any:
    if told["dropout_p"] or told["is_causal"] or told.get("enable_gqa"):
        raise IntrafusionError("it has attention with dropout, a causal mask or shared heads, which is not supported")
    return draft.step("attention", *(told[name] for name in ("query", "key", "value", "attn_mask", "scale")))


def _pool(draft: Draft, name: str, told: dict[str, Any]) -> Any:
    kernel, stride = as_pair(told["kernel_size"]), as_pair(told["stride"] or told["kernel_size"])
    if name == "max_pool2d":
        rest = (as_pair(told["dilation"]), told["ceil_mode"])
    elif told["divisor_override"] is not None:
        raise IntrafusionError("it has pooling with divisor_override, which is not supported")
    else:
        rest = (told["ceil_mode"], told["count_include_pad"])
    return draft.step(name, told["self"], kernel, stride, as_pair(told["padding"]), *rest)


def _upsampled(draft: Draft, name: str, told: dict[str, Any], *corners: bool) -> Any:
    """Translate an upsampling to a given size, or by factors that give integer sizes."""
    sides, factors = told["output_size"], told.get("scale_factors")
    if sides is None and isinstance(factors, list):
        now = draft.shape(told["input"]).sizes[2:]
        sides = [_enlarged(at(size, 1), float(one)) for size, one in zip(now, factors, strict=True)]
    return draft.step(name, told["input"], as_pair(sides), *corners)


def _enlarged(side: int, factor: float) -> int:
    """Return side * factor.

    Raises IntrafusionError if it is not an integer, or if interpolation by this factor and to this size would differ.
    """
    made = side * factor
    scales = torch.tensor([1 / factor if factor else 0.0, side / made if made else 1.0], dtype=torch.float32)
    if not made.is_integer() or scales[0] != scales[1]:
        raise IntrafusionError(f"it scales a side of {side} by {factor:g}; pass F.interpolate a size instead of scale_factor")
    return whole_number(int(made))


def _instance_norm(draft: Draft, told: dict[str, Any]) -> Any:
    if told["running_mean"] is not None or told["running_var"] is not None or not told["use_input_stats"]:
        raise IntrafusionError("it has an instance norm with running statistics, which is not supported")
    channels = draft.shape(told["input"]).sizes[1]
    return draft.step("group_norm", told["input"], channels, told["weight"], told["bias"], told["eps"])


def _native_group_norm(draft: Draft, told: dict[str, Any]) -> Any:
    return draft.step("group_norm", told["input"], told["group"], told["weight"], told["bias"], told["eps"])


CALLS: dict[str, Call] = {
    "add.Tensor": lambda draft, t: _sum(draft, "add", t),
    "sub.Tensor": lambda draft, t: _sum(draft, "sub", t),
    "glu.default": lambda draft, t: _gated(draft, t["self"], t["dim"]),
    "std.dim": lambda draft, t: _deviation(draft, t | {"correction": int(t["unbiased"])}, root=True),
    "var.dim": lambda draft, t: _deviation(draft, t | {"correction": int(t["unbiased"])}, root=False),
    "addcmul.default": lambda draft, t: _addcmul(draft, t["self"], t["tensor1"], t["tensor2"], t["value"]),
    "avg_pool2d.default": lambda draft, t: _pool(draft, "avg_pool2d", t),
    "clamp_max.default": lambda draft, t: draft.step("clamp", t["self"], None, t["max"]),
    "clamp_min.default": lambda draft, t: draft.step("clamp", t["self"], t["min"], None),
    "embedding.default": lambda draft, t: draft.step("index", t["weight"], t["indices"]),
    "einsum.default": lambda draft, t: _einsum(draft, t["equation"], t["tensors"]),
    "instance_norm.default": _instance_norm,
    "linalg_vector_norm.default": _length,
    "max.dim": lambda draft, t: draft.step("amax", t["self"], (t["dim"],), t["keepdim"]),
    "max_pool2d.default": lambda draft, t: _pool(draft, "max_pool2d", t),
    "max_pool2d_with_indices.default": lambda draft, t: _pool(draft, "max_pool2d", t),
    "min.dim": lambda draft, t: draft.step("amin", t["self"], (t["dim"],), t["keepdim"]),
    "native_group_norm.default": _native_group_norm,
    "scaled_dot_product_attention.default": _attention,
    "std.correction": lambda draft, t: _deviation(draft, t, root=True),
    "upsample_bilinear2d.vec": lambda draft, t: _upsampled(draft, "upsample_bilinear", t, t["align_corners"]),
    "upsample_nearest2d.vec": lambda draft, t: _upsampled(draft, "upsample_nearest", t),
    "var.correction": lambda draft, t: _deviation(draft, t, root=False),
}
