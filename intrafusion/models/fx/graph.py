"""Networks as graphs of torch.fx that keep every value as it is and run on every network of the same architecture.

A module without a layer that pruning changes inside is kept whole: the trace would write the dense network's sizes out.
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
_IDLE = (nn.Identity.forward, nn.Dropout.forward, nn.Dropout2d.forward)  # in eval mode
_INFIX = ("add", "and_", "floordiv", "lshift", "matmul", "mod", "mul", "or_", "pow", "rshift", "sub", "truediv", "xor")
_PURE = {getattr(operator, "i" + name.rstrip("_")): getattr(operator, name) for name in _INFIX}


def graph_of(model: nn.Module) -> fx.Graph:
    """The graph of a network in eval mode, as a function of its images; all other arguments have their defaults.

    Raises an exception of any kind where torch.fx cannot follow the network.
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
        """Whether the model has this tensor; of any other the base class would make an attribute."""
        return tensor in self.tensor_attrs or any(tensor is buffer for buffer in self.root.buffers())


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    """A tensor that the forward made, as a function, which code can call on any network."""

    def constant() -> Tensor:
        return tensor

    return constant


def _pure(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """Without what does nothing in eval mode, and with nothing done in place: a kept value must stay as it is."""
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
        if replaced and isinstance(before := node.args[0], fx.Node):  # what reads the value later reads the result
            later = {user for user in before.users if order.get(user, -1) > order[node]}
            before.replace_all_uses_with(result, later.__contains__)
        if result is not node:
            node.replace_all_uses_with(result)
            graph.erase_node(node)
    return graph


def _purify(node: fx.Node) -> bool:
    """Keep a node from doing its work in place; whether it did. Raises ValueError or AttributeError where that cannot be."""
    if node.kwargs.get("out") is not None:
        raise ValueError(f"{node} writes into a tensor that may be kept")
    replaced = bool(node.kwargs.get("inplace"))
    if replaced:
        node.kwargs = {**node.kwargs, "inplace": False}
    if node.op == "call_function":
        assert callable(node.target)
        pure = _pure_function(node.target)
        replaced, node.target = replaced or pure is not node.target, pure
    elif node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
        replaced, node.target = True, str(node.target).removesuffix("_")
        getattr(Tensor, node.target)  # copy_ and fill_ have no pure twin
    return replaced


def _pure_function(function: Callable) -> Callable:
    """The twin of a function that does its work in place, as torch.relu of torch.relu_; any other as it is."""
    name = getattr(function, "__name__", "")
    if not name.endswith("_") or name.endswith("__") or function in _PURE.values():
        return _PURE.get(function, function)
    pure = name.removesuffix("_")
    return getattr(torch, pure, None) or getattr(F, pure)


class Replay(fx.Interpreter):
    """Runs a graph on a network, node by node. shapes: of the values that are tensors. place: the layer that it is at.

    reads: what each layer reads in the network itself, call by call, where that is to be compared. Raises ValueError where it
    differs, and where a node changes in place what others read.
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
                raise ValueError(f"{n} changes {i} in place, which others read")
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result

    def _compare(self, found: Tensor | None) -> None:
        """Raises ValueError unless the layer that is next reads what it does in the network."""
        if found is None or not self.reads.get(self.place):
            return
        expected = self.reads[self.place].pop(0)
        if found.shape != expected.shape:
            raise ValueError(f"it reads {tuple(found.shape)} in the trace, and {tuple(expected.shape)} in the network")
        if not alike(found, expected):
            raise ValueError("it reads other numbers in the trace than in the network")


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two computations of the same values agree, as far as their precision goes."""
    tolerance = 0.1 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
