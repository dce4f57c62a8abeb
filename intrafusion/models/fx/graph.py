"""torch.fx graphs of networks that never modify a value in place and run on every network of the same architecture.

A module that contains no layer that pruning changes stays a single node: tracing into it would hard-code the dense network's
sizes.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from intrafusion.models.architectures import PadShortcut

_CHANGING = (_ConvNd, nn.Linear, _NormBase, PadShortcut)
_IDLE = (nn.Identity.forward, nn.Dropout.forward, nn.Dropout2d.forward)  # no effect in eval mode
_INFIX = ("add", "and_", "floordiv", "lshift", "matmul", "mod", "mul", "or_", "pow", "rshift", "sub", "truediv", "xor")
_PURE = {getattr(operator, "i" + name.rstrip("_")): getattr(operator, name) for name in _INFIX}


def graph_of(model: nn.Module) -> fx.Graph:
    """Trace a network in eval mode as a function of its images. All other arguments take their defaults.

    Raises any kind of exception if torch.fx cannot trace the network.
    """
    return _pure(_Tracer().trace(model), model)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Sequential):
            return False
        inside = any(isinstance(inner, _CHANGING) for inner in m.modules() if inner is not m)
        return not inside or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        return root_fn, [self.root, self.create_proxy("placeholder", "images", (), {})]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_attribute(a):
            return self.create_node("call_function", _constant(a.detach()), (), {})
        return super().create_arg(a)

    def _is_attribute(self, tensor: Tensor) -> bool:
        """Return whether the model owns this tensor. The base class would add any other tensor as an attribute."""
        return tensor in self.tensor_attrs or any(tensor is buffer for buffer in self.root.buffers())


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    """Wrap a tensor created in the forward pass in a function, so that generated code can call it on any network."""

    def constant() -> Tensor:
        return tensor

    return constant


def _pure(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """Remove nodes that do nothing in eval mode, and make in-place nodes out of place, because kept values must not change."""
    nodes = list(graph.nodes)
    order = {node: number for number, node in enumerate(nodes)}
    for node in nodes:
        result, replaced = node, _purify(node)
        if node.op == "call_module" and node.all_input_nodes:
            layer = model.get_submodule(str(node.target))
            if type(layer).forward is nn.ReLU.forward:
                replaced = bool(layer.inplace)
                with graph.inserting_after(node):
                    result = graph.call_function(F.relu, (node.all_input_nodes[0],))
            elif type(layer).forward in _IDLE and not layer.training:
                result = node.all_input_nodes[0]
        if replaced and isinstance(before := node.args[0], fx.Node):  # later readers of the value now read the result
            later = {user for user in before.users if order.get(user, -1) > order[node]}
            before.replace_all_uses_with(result, later.__contains__)
        if result is not node:
            node.replace_all_uses_with(result)
            graph.erase_node(node)
    return graph


def _purify(node: fx.Node) -> bool:
    """Make a node work out of place. Return whether it worked in place before.

    Raises ValueError or AttributeError if this is impossible.
    """
    if node.kwargs.get("out") is not None:
        raise ValueError(f"{node} writes into a tensor that may be reused")
    replaced = bool(node.kwargs.get("inplace"))
    if replaced:
        node.kwargs = {**node.kwargs, "inplace": False}
    if node.op == "call_function":
        assert callable(node.target)
        pure = _pure_function(node.target)
        replaced, node.target = replaced or pure is not node.target, pure
    elif node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
        replaced, node.target = True, str(node.target).removesuffix("_")
        getattr(Tensor, node.target)  # raises for copy_ and fill_, which have no out-of-place version
    return replaced


def _pure_function(function: Callable) -> Callable:
    """Return the out-of-place version of an in-place function, such as torch.relu for torch.relu_. Return others as is."""
    name = getattr(function, "__name__", "")
    if not name.endswith("_") or name.endswith("__") or function in _PURE.values():
        return _PURE.get(function, function)
    pure = name.removesuffix("_")
    return getattr(torch, pure, None) or getattr(F, pure)


class Replay(fx.Interpreter):
    """Interpreter that runs a graph on a network node by node.

    shapes: shapes of the values that are tensors. place: the current layer. reads: the inputs of each layer in the network
    itself, call by call, to compare with; may be empty. Raises ValueError if the inputs differ, or if a node modifies in place
    a value that others read.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph):
        super().__init__(network, graph=graph)
        self.place, self.shapes = "the input", {}  # type: str, dict[fx.Node, tuple[int, ...]]
        self.reads: dict[str, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        inputs = {i: value for i in n.all_input_nodes if isinstance(value := self.env[i], Tensor)}
        if n.op == "call_module":
            self.place = str(n.target)
            self._compare(next(iter(inputs.values()), None))
        before = {i: value.clone() for i, value in inputs.items()}
        result = super().run_node(n)
        for i, value in inputs.items():
            if (len(i.users) > 1 or i.op in ("placeholder", "get_attr")) and not torch.equal(value, before[i]):
                raise ValueError(f"{n} changes {i} in place, which other nodes read")
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result

    def _compare(self, found: Tensor | None) -> None:
        """Raise ValueError unless the current layer reads the same as in the network."""
        if found is None or not self.reads.get(self.place):
            return
        expected = self.reads[self.place].pop(0)
        if found.shape != expected.shape:
            raise ValueError(f"its input is {tuple(found.shape)} in the trace, but {tuple(expected.shape)} in the network")
        if not alike(found, expected):
            raise ValueError("its input values differ between the trace and the network")


def alike(found: Tensor, expected: Tensor) -> bool:
    """Return whether two results of the same computation agree within their precision."""
    tolerance = 0.1 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
