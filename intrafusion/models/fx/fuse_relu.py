"""Fusion of a convolution with the following sum and ReLU into one operation.

It makes fewer passes over memory and gives the same numbers.
"""

import operator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_RELUS = (F.relu, torch.relu, "relu")
_ADDS = (operator.add, torch.add, "add")
# oneDNN operators that torch.compile calls; if the PyTorch build lacks them, the steps run one by one
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None) if torch.backends.mkldnn.is_available() else None


def join_relus(graph: fx.Graph, model: nn.Module) -> None:
    """Fuse `relu(conv(x))` and `relu(conv(x) + other)` in place, if nothing else reads the intermediate values."""
    for relu in [node for node in graph.nodes if _calls(node, _RELUS) and node.args]:
        conv, other, between = relu.args[0], None, []
        if _calls(conv, _ADDS) and len(conv.users) == 1 and not conv.kwargs and len(conv.args) == 2:
            between = [conv]
            conv, other = conv.args if _is_private_conv(conv.args[0], model) else reversed(conv.args)
        if not _is_private_conv(conv, model) or not isinstance(other, fx.Node | None) or other is conv:
            continue
        with graph.inserting_before(relu):
            layer = graph.get_attr(conv.target)
            joined = graph.call_function(conv_relu, (layer, conv.args[0], other))
        relu.replace_all_uses_with(joined)
        for node in (relu, *between, conv):
            graph.erase_node(node)


def _calls(node: fx.Node, functions: tuple) -> bool:
    return node.op in ("call_function", "call_method") and node.target in functions


def _is_private_conv(node: object, model: nn.Module) -> bool:
    """Return whether a value is the output of a plain convolution and has exactly one reader."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return False
    layer = model.get_submodule(str(node.target))
    return is_plain(layer) and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a layer is a convolution defined by its weight and bias: no custom forward and no hooks."""
    kind = type(layer)
    own = getattr(kind, "forward", None), getattr(kind, "_conv_forward", None)
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return own == (nn.Conv2d.forward, nn.Conv2d._conv_forward) and not hooks


def conv_relu(layer: nn.Conv2d, x: Tensor, other: Tensor | None = None) -> Tensor:
    """Compute relu(layer(x) + other): (B, C, H, W) -> (B, C', H', W')."""
    joins = _ONEDNN is not None and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    if other is not None:
        joins = joins and layer.groups == 1 and other.shape == _shape(layer, x)  # oneDNN fuses no sum with a grouped conv
    if not joins:
        y = layer(x)
        return (y if other is None else y + other).relu_()
    numbers = layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups
    if other is None:
        return _ONEDNN(x, *numbers, "relu", [], "")
    return _ONEDNN.binary(x, other, *numbers, "add", 1.0, "relu", [], "")


def _shape(layer: nn.Conv2d, x: Tensor) -> tuple[int, ...]:
    """Return the shape of layer(x), so that sums that need broadcasting are not fused."""

    def side(axis: int) -> int:
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        return (x.shape[2 + axis] + 2 * int(layer.padding[axis]) - reach) // layer.stride[axis] + 1

    return len(x), layer.out_channels, side(0), side(1)
