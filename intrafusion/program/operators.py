"""The operators that a program may use: pure functions of tensors and numbers. No file, no randomness, no custom object.

A program that asks for anything else is refused before any of it is looked up.
"""

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from intrafusion.errors import IntrafusionError

_ATEN = frozenset(
    re.findall(
        r"\w+",
        """
_adaptive_avg_pool2d _log_softmax _native_batch_norm_legit_no_training _softmax _to_copy _unsafe_view abs
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d add addmm alias alpha_dropout amax amin argmax avg_pool1d
avg_pool2d baddbmm batch_norm bmm broadcast_to cat celu channel_shuffle chunk clamp clamp_max clamp_min clone concat
constant_pad_nd contiguous conv1d conv2d conv3d convolution copy cos cumsum detach div dropout elu embedding eq exp
expand expand_as feature_dropout fill flatten flip floor_divide full_like ge gelu glu group_norm gt hardsigmoid
hardswish hardtanh index index_select instance_norm layer_norm le leaky_relu lift_fresh_copy linalg_vector_norm linear
log log_sigmoid log_softmax logical_and logical_not logical_or lt masked_fill matmul max max_pool1d max_pool2d
max_pool2d_with_indices maximum mean min minimum mish mm movedim mul narrow native_batch_norm native_group_norm
native_layer_norm ne neg new_ones new_zeros norm numpy_T ones_like pad permute pixel_shuffle pixel_unshuffle pow prelu
reciprocal reflection_pad1d reflection_pad2d relu relu6 remainder repeat repeat_interleave replication_pad2d reshape
roll rsqrt rsub scaled_dot_product_attention select selu sigmoid silu sin slice softmax softplus split
split_with_sizes sqrt square squeeze stack std sub sum swapaxes sym_size t tanh tensor_split threshold tile to
transpose tril triu type_as unbind unflatten unfold unsqueeze upsample_bilinear2d upsample_nearest2d var var_mean view
view_as where zeros_like
""",
    )
)
_INTS: dict[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
}
CHECKS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
)
VIEWS = frozenset(
    re.findall(
        r"\w+",
        """
alias broadcast_to chunk contiguous detach expand expand_as flatten movedim narrow numpy_T permute reshape select
slice split split_with_sizes squeeze swapaxes t tensor_split to transpose unbind unflatten unfold unsqueeze view
view_as
""",
    )
)
_PLAIN: dict[str, Callable[..., Any]] = {  # the same, as networks are written, so that the rest of the house knows them
    "relu.default": F.relu,
    "add.Tensor": operator.add,
    "mul.Tensor": operator.mul,
    "sub.Tensor": operator.sub,
}


def split_target(target: Any) -> tuple[str, str, bool]:
    """An operator's name, its overload, and whether it works in place, as ("relu", "default", True) of aten.relu_.default.

    ("_operator.add", "", False) for arithmetic on sizes. Raises IntrafusionError for one that programs may not use.
    """
    if isinstance(target, str) and target in _INTS:
        return target, "", False
    found = re.fullmatch(r"torch\.ops\.aten\.(\w{1,60})\.(\w{1,60})", target) if isinstance(target, str) else None
    if found:
        name, overload = found.groups()
        if name in CHECKS:
            return name, overload, False
        in_place = name not in _ATEN and name.endswith("_")
        name = name.removesuffix("_") if in_place else name
        if name in _ATEN and overload not in ("out", "dimname", "names"):
            return name, overload, in_place
    raise IntrafusionError(f"it uses the operator {str(target)[:80]!r}, which programs may not use here")


def look_up(name: str, overload: str) -> Callable[..., Any]:
    """The pure operator of an allowed name. Raises IntrafusionError where this PyTorch has none such."""
    if name in _INTS:
        return _INTS[name]
    found = getattr(getattr(torch.ops.aten, name, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload) or any(
        a.alias_info and a.alias_info.is_write for a in found._schema.arguments
    ):
        raise IntrafusionError(f"it uses the operator aten.{name}.{overload}, which this PyTorch does not have")
    return found


def plain(name: str, overload: str, args: list[Any], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """The function that people write for this call, where it takes the same arguments; else None."""
    function = _PLAIN.get(f"{name}.{overload}")
    fits = not kwargs and len(args) == (1 if name == "relu" else 2)
    return function if fits else None
