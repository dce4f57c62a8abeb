"""Calls whose weights belong to a layer: convolutions, linear layers, batch norms, and zero channels around an image.

A call becomes its layer again if its weights are those of the file and no other call uses them differently, so that it can be
pruned. Otherwise it becomes a step with weights.
"""

from typing import Any

import torch

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.importer.aliases import current
from intrafusion.models.exported_program.importer.aten import EVAL, INSTEAD, as_ints, as_pair
from intrafusion.models.exported_program.importer.draft import Call, Draft
from intrafusion.models.exported_program.layers import KINDS
from intrafusion.models.exported_program.program import Value, Weight


def _convolution(draft: Draft, told: dict[str, Any]) -> Any:
    groups, bias = told["groups"], current(told["bias"])
    if told.get("transposed"):
        raise IntrafusionError(f"it has a transposed convolution; {INSTEAD['conv_transpose2d']}")
    padding = told["padding"] if isinstance(told["padding"], str) else as_pair(told["padding"])
    numbers = (as_pair(told["stride"]), padding, as_pair(told["dilation"]), groups)
    weight = current(told["weight"])
    if _are_weights(draft, weight, bias):
        outputs, inputs, *kernel = _dims(draft, weight, 4)
        if type(groups) is not int or not 0 < groups <= outputs or outputs % groups:
            raise IntrafusionError(f"it has a convolution of {outputs} channels in {str(groups)[:20]} groups")
        config = dict(zip(KINDS["Conv2d"].numbers, (inputs * groups, outputs, tuple(kernel), *numbers), strict=True))
        layer = draft.layer("Conv2d", config, {"weight": weight, "bias": bias}, told["input"])
        if layer is not None:
            return layer
    return draft.step("conv2d", told["input"], weight, bias, *numbers)


def _linear(draft: Draft, x: Any, weight: Any, bias: Any) -> Any:
    weight, bias = current(weight), current(bias)
    if _are_weights(draft, weight, bias):
        outputs, inputs = _dims(draft, weight, 2)
        config = {"in_features": inputs, "out_features": outputs}
        layer = draft.layer("Linear", config, {"weight": weight, "bias": bias}, x)
        if layer is not None:
            return layer
    return draft.step("linear", x, weight, bias)


def _dims(draft: Draft, weight: Weight, rank: int) -> list[int]:
    sizes = draft.tensors[weight.path].shape
    if len(sizes) != rank:
        raise IntrafusionError(f"it has a layer whose weight {weight.path} has {len(sizes)} dimensions, not {rank}")
    return list(sizes)


def _addmm(draft: Draft, bias: Any, x: Any, weight: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    if beta != 1 or alpha != 1:
        raise IntrafusionError("it scales the terms of a matrix product (alpha, beta); write the scaling as separate steps")
    turned = draft.turned.get(current(weight))
    if turned is not None and _are_weights(draft, turned, current(bias)):
        return _linear(draft, x, turned, bias)
    made = draft.step("matmul", x, weight)
    return made if bias is None else draft.step("add", made, bias)


def _norm(draft: Draft, told: dict[str, Any]) -> Any:
    if told.get("training"):
        raise IntrafusionError(f"it normalises by each batch's own statistics; {EVAL}")
    parts = {name: current(told[name]) for name in ("running_mean", "running_var", "weight", "bias")}
    mean, var, weight, bias = parts.values()
    if mean is None or var is None:
        raise IntrafusionError(f"it normalises by each batch's own statistics; {EVAL}")
    if not _are_weights(draft, mean, var) or not _are_weights(draft, mean, weight) or not _are_weights(draft, mean, bias):
        raise IntrafusionError("it has a batch norm whose statistics and weights are not all stored in the file")
    if (weight is None) != (bias is None):
        raise IntrafusionError("it has a batch norm with only a weight or only a bias, which is not supported")
    kind = "BatchNorm2d" if len(draft.shape(told["input"]).sizes) == 4 else "BatchNorm1d"
    config = {"num_features": _dims(draft, mean, 1)[0], "eps": told["eps"], "momentum": told["momentum"]}
    ordered = {name: parts[name] for name in ("weight", "bias", "running_mean", "running_var")}
    layer = draft.layer(kind, config, ordered, told["input"])
    if layer is None:
        raise IntrafusionError("it has batch norms that share some of their weights and statistics, which is not supported")
    return layer


def _are_weights(draft: Draft, first: Any, second: Any) -> bool:
    """Return whether the first is a float32 weight, and the second a weight or None."""
    return isinstance(first, Weight) and draft.tensors[first.path].dtype == torch.float32 and isinstance(second, Weight | None)


def _pad(draft: Draft, told: dict[str, Any]) -> Any:
    x, around = told["self"], as_ints(told["pad"])
    mode, value = told.get("mode", "constant"), told["value"]
    if mode != "constant":
        return draft.step("pad_as", x, around, mode)
    sizes = draft.shape(x).sizes
    if (
        isinstance(current(x), Value)
        and len(sizes) == 4
        and len(around) == 6
        and value in (None, 0)
        and not any(around[:4])
        and min(around) >= 0
        and isinstance(sizes[1], int)
    ):
        return draft.zeros(x, sizes[1], around[4], around[5])
    return draft.step("pad", x, around, 0.0 if value is None else value)


CALLS: dict[str, Call] = {
    "addmm.default": lambda draft, t: _addmm(draft, t["self"], t["mat1"], t["mat2"], t["beta"], t["alpha"]),
    "batch_norm.default": _norm,
    "_native_batch_norm_legit_no_training.default": _norm,
    "conv2d.default": _convolution,
    "conv2d.padding": _convolution,
    "convolution.default": _convolution,
    "constant_pad_nd.default": _pad,
    "linear.default": lambda draft, t: _linear(draft, t["input"], t["weight"], t["bias"]),
    "mm.default": lambda draft, t: _addmm(draft, None, t["self"], t["mat2"]),
    "pad.default": _pad,
}
