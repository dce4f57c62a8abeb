"""Networks in which DeepLIFT sees every nonlinearity: each one becomes a separate module with a rule that fits it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.pruning.groups.feature_maps import examined

_RELU: set[Any] = {nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ELEMENTWISE: set[Any] = {
    nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softsign, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.softplus,
    F.sigmoid, F.tanh, F.hardsigmoid, F.hardswish, F.hardtanh,
    torch.sigmoid, torch.tanh, "sigmoid", "tanh",
}  # fmt: skip
_POOLING: set[Any] = {nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d}


def read_alone(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Give the layer a copy of its input (a forward pre-hook), so that gradients there are of this reader alone."""
    return inputs[0].clone()


def separated(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in which every nonlinearity is a separate module that is called once; layers keep their names.

    Captum's DeepLIFT sees modules but not functions, and cannot tell the calls of one module apart.
    Raises IntrafusionError if torch.fx cannot trace the network.
    """
    from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR, nonlinear

    SUPPORTED_NON_LINEAR.update({_Elementwise: nonlinear, _MaxPool: _max_pool_rule})
    twin = examined(model)
    try:
        traced = fx.GraphModule(twin, _Tracer().trace(twin))
    except Exception as error:  # a user's forward can fail in any way
        raise IntrafusionError(f"deep-lift needs a network that torch.fx can trace: {one_line(error)}") from error
    for number, node in enumerate(traced.graph.nodes):
        module = _nonlinearity(twin, node)
        if module is not None:
            name = f"_nonlinearity_{number}"
            traced.add_submodule(name, module)
            node.op, node.target, node.args, node.kwargs = "call_module", name, (node.all_input_nodes[0],), {}
    traced.recompile()
    if hasattr(model, "card"):
        traced.card = model.card
    return traced


class _Tracer(fx.Tracer):
    """Tracer that keeps every layer whole, also layers of user-defined subclasses."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _ConvNd | nn.Linear | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


class _Nonlinearity(nn.Module):
    """A function of one tensor as a separate module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function
        self.register_forward_pre_hook(read_alone)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Elementwise(_Nonlinearity):
    """An elementwise function. Captum's rescale rule holds for all of them, but its table lists only a few."""


class _MaxPool(_Nonlinearity):
    """Max pooling with another rule than Captum's, which unpools and so keeps only one of several overlapping windows."""


def _nonlinearity(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the nonlinearity that a node calls as a separate module; None if the node calls something else."""
    if not node.op.startswith("call_"):
        return None
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    called: Any = node.target if module is None else type(module)
    if called in _RELU:  # the class that Captum's ReLU-specific methods look for
        relu = nn.ReLU()
        relu.register_forward_pre_hook(read_alone)
        return relu
    kind = _Elementwise if called in _ELEMENTWISE else _MaxPool if called in _POOLING else None
    if kind is None:
        return None
    if module is not None:
        return kind(module.forward)
    function = getattr(Tensor, called) if isinstance(called, str) else called
    more, options = node.args[1:], {name: value for name, value in node.kwargs.items() if name != "input"}
    return kind(lambda x: function(x, *more, **options))


def _max_pool_rule(
    module: _MaxPool, inputs: Tensor, outputs: Tensor, slope_in: Tensor, slope_out: Tensor, eps: float
) -> Tensor:
    """Return multipliers (2B, C, ...), images then baselines: a window's change is due to the pixel with the larger maximum."""
    (x, x0), (y, y0) = inputs.chunk(2), outputs.chunk(2)
    top = torch.maximum(y, y0)
    with torch.enable_grad():
        pixels = inputs.detach().requires_grad_()
        pooled = module.function(pixels)
    (change,) = torch.autograd.grad(pooled, pixels, slope_out * torch.cat([top - y0, y - top]))
    multipliers = torch.stack(change.chunk(2)).sum(0) / (x - x0)
    return torch.where(torch.cat([x - x0] * 2).abs() < eps, slope_in, torch.cat([multipliers] * 2))
