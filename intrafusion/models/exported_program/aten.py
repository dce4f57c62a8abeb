"""Mapping of calls written by `torch.export` to operators of the table.

A call is looked up by its name and overload, such as "softmax.int". It becomes an operator with some of the call's arguments,
or needs a translation by `importer`. PyTorch's schemas give the argument names, and the defaults for arguments that the file
omits. No PyTorch operator is run by its name.
"""

import re
from typing import Any

import torch

from intrafusion.errors import IntrafusionError

_SAME = """
relu.default relu self | relu6.default relu6 self | sigmoid.default sigmoid self | tanh.default tanh self
silu.default silu self | mish.default mish self | selu.default selu self | hardswish.default hardswish self
hardsigmoid.default hardsigmoid self | log_sigmoid.default log_sigmoid self | exp.default exp self | log.default log self
sqrt.default sqrt self | rsqrt.default rsqrt self | abs.default abs self | neg.default neg self
reciprocal.default reciprocal self | square.default square self | erf.default erf self | gelu.default gelu self approximate
hardtanh.default hardtanh self min_val max_val
clamp.default clamp self min max | leaky_relu.default leaky_relu self negative_slope
elu.default elu self alpha | celu.default celu self alpha | softplus.default softplus self beta threshold
prelu.default prelu self weight | _prelu_kernel.default prelu self weight
mul.Tensor mul self other | div.Tensor div self other
add.Scalar add self other | sub.Scalar sub self other | mul.Scalar mul self other | div.Scalar div self other
rsub.Scalar sub other self | rsub.Tensor sub other self | maximum.default maximum self other
minimum.default minimum self other
eq.Scalar eq self other | ne.Scalar ne self other | gt.Scalar gt self other | ge.Scalar ge self other
lt.Scalar lt self other | le.Scalar le self other
pow.Tensor_Scalar pow self exponent | masked_fill.Scalar masked_fill self mask value
where.self where condition self other | where.ScalarOther where condition self other
where.ScalarSelf where condition self other
bmm.default matmul self mat2 | matmul.default matmul self other
adaptive_avg_pool2d.default adaptive_avg_pool2d self output_size
_adaptive_avg_pool2d.default adaptive_avg_pool2d self output_size
adaptive_max_pool2d.default adaptive_max_pool2d self output_size
mean.dim mean self dim keepdim | sum.dim_IntList sum self dim keepdim | amax.default amax self dim keepdim
amin.default amin self dim keepdim | softmax.int softmax self dim | _softmax.default softmax self dim
log_softmax.int log_softmax self dim | _log_softmax.default log_softmax self dim
swapaxes.default transpose self axis0 axis1
unsqueeze.default unsqueeze self dim | squeeze.dim squeeze self dim | repeat.default repeat self repeats
cat.default cat tensors dim | concat.default cat tensors dim | stack.default stack tensors dim
split_with_sizes.default split self split_sizes dim | chunk.default chunk self chunks dim | unbind.int unbind self dim
select.int select self dim index | roll.default roll self shifts dims | flip.default flip self dims
channel_shuffle.default channel_shuffle self groups | pixel_shuffle.default pixel_shuffle self upscale_factor
pixel_unshuffle.default pixel_unshuffle self downscale_factor | index_select.default index_select self dim index
layer_norm.default layer_norm input normalized_shape weight bias eps
native_layer_norm.default layer_norm input normalized_shape weight bias eps
group_norm.default group_norm input num_groups weight bias eps
upsample_nearest2d.default upsample_nearest self output_size
upsample_bilinear2d.default upsample_bilinear self output_size align_corners
"""
SAME: dict[str, tuple[str, tuple[str, ...]]] = {
    target: (name, tuple(args)) for target, name, *args in (line.split() for line in re.split(r"[\n|]+", _SAME) if line.strip())
}
CHECKS = (
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size", "sym_constrain_range",
)  # fmt: skip
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")
NOTHING = ("alias", "detach", "contiguous", "to", "type_as", "_to_copy", "clone", "lift_fresh_copy", "lift_fresh")
COPIES = ("_to_copy", "clone", "lift_fresh_copy")
SAME_TENSOR = ("alias", "detach", "lift_fresh")
SIZES = ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
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
