"""A network as a graph that can be cut: what lies in front of a change is the same for every pruned network.

The dense network (BN folded) is traced once with torch.fx. Cutting it in front of the first changed layers gives a head,
which the dense network runs once, and a tail, which any pruned network runs with its own layers.
"""

import operator
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from intrafusion.epilogue import join_relus
from intrafusion.networks import PadShortcut

Part = Callable[..., tuple[Tensor, ...]]  # (network, *values) -> values
_ADDS = (operator.add, torch.add, "add")
_PURE = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}


class Cuts:
    """The graph of one network, and its parts by the names of the values at which it is cut.

    model: in eval mode. Raises an exception of any kind where torch.fx cannot trace it (see `trace`).
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._graph = _pure(_Tracer().trace(model), model)
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._output = next(node for node in self._graph.nodes if node.op == "output")
        self.input = tuple(node.name for node in self._graph.nodes if node.op == "placeholder")
        self._parts: dict[tuple, Part | None] = {}

    def layers(self, *kinds: type[nn.Module]) -> list[str]:
        """The layers of these kinds that run once, in their order; convolutions and linear layers where none is named."""
        names = [str(node.target) for node in self._graph.nodes if node.op == "call_module"]
        runs, kinds = Counter(names), kinds or (_ConvNd, nn.Linear)
        return [n for n in names if runs[n] == 1 and isinstance(self._model.get_submodule(n), kinds)]

    def around(self, layer: str) -> tuple[str, str, tuple[str, str] | None]:
        """The values that a layer reads and writes; the sum that alone reads the latter, and what it is added to there."""
        node = next(n for n in self._graph.nodes if n.op == "call_module" and n.target == layer)
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        added = None
        if reader is not None and reader.op in ("call_function", "call_method") and reader.target in _ADDS:
            others = [i for i in reader.all_input_nodes if i is not node]
            if len(others) == 1 and len(reader.args) == 2 and not reader.kwargs:
                added = reader.name, others[0].name
        return node.args[0].name, node.name, added

    def first_of(self, changed: Collection[str]) -> list[str]:
        """Those of these layers that read the same in a network in which these are changed, and run once."""
        touched, nodes = self._touched(changed), [n for n in self._graph.nodes if _module_of(n) in changed]
        runs = Counter(map(_module_of, nodes))
        return [
            str(node.target)
            for node in nodes
            if node.op == "call_module" and runs[node.target] == 1 and not touched.intersection(node.all_input_nodes)
        ]

    def in_front_of(self, changed: Collection[str], again: Collection[str] = ()) -> tuple[str, ...]:
        """The values that a network with these layers changed shares with the dense one, as far back as it needs them.

        again: layers, from `first_of`, that make their outputs of the dense network's, not of what they read there.
        """
        touched = self._touched(changed)
        mixed = {node for node in touched if node.op == "call_module" and node.target in again}
        needed = mixed | {i for node in touched - mixed for i in node.all_input_nodes if i not in touched}
        return tuple(node.name for node in self._graph.nodes if node in needed and node.op != "get_attr")

    def _touched(self, changed: Collection[str]) -> set[fx.Node]:
        touched: set[fx.Node] = set()
        for node in self._graph.nodes:
            if _module_of(node) in changed or touched.intersection(node.all_input_nodes):
                touched.add(node)
        return touched

    def head(self, start: tuple[str, ...], end: tuple[str, ...]) -> Part | None:
        """Computes the values `end` from the values `start` of a network; None where they do not suffice."""
        return self._part(start, [self._nodes[name] for name in end], ("head", start, end))

    def tail(self, start: tuple[str, ...], again: Collection[str] = ()) -> Part | None:
        """Computes a network's logits, (logits,), from the values `start`; None where they do not suffice.

        again: layers that run on their own values among `start`.
        """
        return self._part(start, list(self._output.all_input_nodes), ("tail", start, frozenset(again)), again)

    def _part(
        self, start: tuple[str, ...], ends: Sequence[fx.Node], key: tuple, again: Collection[str] = ()
    ) -> Part | None:
        if key not in self._parts:
            self._parts[key] = self._compiled(start, ends, again)
        return self._parts[key]

    def _compiled(self, start: tuple[str, ...], ends: Sequence[fx.Node], again: Collection[str]) -> Part | None:
        needed, waiting = set(), [node for node in ends if node.name not in start]
        while waiting:
            node = waiting.pop()
            if node.op == "placeholder":
                return None
            if node not in needed:
                needed.add(node)
                waiting += [i for i in node.all_input_nodes if i.name not in start]
        graph, made = fx.Graph(), {}
        for name in start:
            node = self._nodes[name]
            made[node] = graph.placeholder(name)
            if node.target in again:
                made[node] = graph.call_module(str(node.target), (made[node],))
        for node in self._graph.nodes:
            if node in needed:
                made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(tuple(made[node] for node in ends))
        join_relus(graph, self._model)
        # the code refers to layers by name, so it runs on every network that has them
        return type(fx.GraphModule(self._model, graph)).forward


def trace(model: nn.Module) -> Cuts | None:
    """The cuts of a network in eval mode, None where torch.fx cannot follow it (as through data-dependent branches)."""
    try:
        return Cuts(model)
    except Exception:  # a user's forward can fail in any way; the whole network is run then
        return None


class _Tracer(fx.Tracer):
    """Keeps layers whole whose numbers pruning changes: the trace would write them out."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PadShortcut) or super().is_leaf_module(m, module_qualified_name)


def _module_of(node: fx.Node) -> str | None:
    """The layer that a node runs, or whose tensor it reads."""
    if node.op == "call_module":
        return str(node.target)
    return str(node.target).rpartition(".")[0] if node.op == "get_attr" else None


def _pure_function(function: Callable) -> Callable:
    """The twin of a function that does its work in place, as torch.relu of torch.relu_; any other as it is."""
    name = getattr(function, "__name__", "")
    pure = name.removesuffix("_") if name.endswith("_") else ""
    return _PURE.get(function) or getattr(torch, pure, None) or getattr(F, pure, None) or function


def _pure(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """Without what does nothing in eval mode, and with nothing done in place: a kept value must stay as it is."""
    for node in list(graph.nodes):
        if node.op == "call_function":
            node.target = _pure_function(node.target)
        elif node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
            node.target = node.target.removesuffix("_")
            getattr(Tensor, node.target)  # copy_ and fill_ have no pure twin
        if "out" in node.kwargs:
            raise ValueError(f"{node} writes into a tensor that may be kept")
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_module":
            layer = model.get_submodule(str(node.target))
            if isinstance(layer, nn.Identity | nn.Dropout):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
            elif isinstance(layer, nn.ReLU):
                with graph.inserting_after(node):
                    node.replace_all_uses_with(graph.call_function(F.relu, (node.args[0],)))
                graph.erase_node(node)
    return graph
