"""Cutting a network's graph: every pruned network shares the values in front of the first change.

The dense network (BN folded) is traced once with torch.fx. A cut in front of the first changed layers gives a head, which the
dense network runs once, and a tail, which any pruned network runs with its own layers.
"""

import copy
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.models.fx.fuse_relu import join_relus
from intrafusion.models.fx.graph import Replay, alike, graph_of
from intrafusion.runtime.log import event

Part = Callable[..., tuple[Tensor, ...]]  # (network, *values) -> values
FITTED = (_ConvNd, nn.Linear)
_ADDS = (operator.add, torch.add, "add")


class Cuts:
    """The graph of one network, and the parts of it between cuts. Cuts are given by the names of values.

    model: in eval mode. images: some inputs, float (B, C, H, W), run to classify the graph's values. Raises any kind of
    exception if torch.fx cannot trace the network or if the trace computes something else (see `trace`).
    """

    def __init__(self, model: nn.Module, images: Tensor):
        self._model, self._graph = model, graph_of(model)
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._output = next(node for node in self._graph.nodes if node.op == "output")
        self.input = tuple(node.name for node in self._graph.nodes if node.op == "placeholder")
        self._parts: dict[tuple, Part | None] = {}
        three, two = (images[torch.arange(count) % len(images)] for count in (3, 2))
        self._shapes, fewer = self._shapes_of(three), self._shapes_of(two)
        self._rows = {  # values that are tensors with one row per image
            node for node, shape in self._shapes.items() if shape[:1] == (3,) and fewer.get(node) == (2, *shape[1:])
        }
        if told := self.misfit(model, two):
            raise ValueError(told)

    def _shapes_of(self, images: Tensor) -> dict[fx.Node, tuple[int, ...]]:
        replay = Replay(self._model, self._graph)
        with torch.inference_mode():
            replay.run(images)
        return replay.shapes

    def misfit(self, network: nn.Module, images: Tensor) -> str | None:
        """Return the first layer at which the graph differs from this network, and how, as text.

        The graph may differ because it hard-codes a shape, for example. Return None if it computes the same as the network.
        """
        tail = self.tail(self.input)
        with torch.inference_mode():
            expected = network(images.clone())  # a copy, because some networks normalise their input in place
            with suppress(Exception):  # it can fail in any way; the failing layer is found below
                if tail is not None and alike(tail(network, images)[0], expected):
                    return None
            replay = Replay(network, self._graph)
            try:
                replay.reads = _reads(copy.deepcopy(network), images.clone())
                replay.run(images)
            except Exception as error:
                return f"{replay.place}: {one_line(error)}"
        return f"{replay.place}: the layers after it give a different output"

    def layers(self, *kinds: type[nn.Module]) -> list[str]:
        """Return the names of the layers of these kinds that run once, in graph order.

        Without kinds, return convolutions and linear layers.
        """
        runs = Counter(map(_module_of, self._graph.nodes))
        names = [str(node.target) for node in self._graph.nodes if node.op == "call_module"]
        return [n for n in names if runs[n] == 1 and isinstance(self._model.get_submodule(n), kinds or FITTED)]

    def around(self, layer: str) -> tuple[str, str, tuple[str, str] | None]:
        """Return the names of the values that a layer reads and writes, and of a sum that follows it.

        The last item is (sum, other term) if a sum is the only reader of the output, and None otherwise. Raises
        IntrafusionError unless the layer runs exactly once.
        """
        nodes = [n for n in self._graph.nodes if n.op == "call_module" and n.target == layer]
        if len(nodes) != 1 or not nodes[0].all_input_nodes:
            raise not_once(layer)
        (node,) = nodes
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        added = None
        if reader is not None and reader.op in ("call_function", "call_method") and reader.target in _ADDS:
            others = [i for i in reader.all_input_nodes if i is not node]
            alone = len(others) == 1 and len(reader.args) == 2 and not reader.kwargs
            if alone and len({self._shapes.get(i) for i in (node, reader, *others)}) == 1:
                added = reader.name, others[0].name
        return node.all_input_nodes[0].name, node.name, added

    def first_of(self, changed: Collection[str]) -> list[str]:
        """Return the layers of `changed` that run once and read the same inputs as in the dense network."""
        touched, nodes = self._touched(changed), [n for n in self._graph.nodes if _module_of(n) in changed]
        runs = Counter(map(_module_of, nodes))
        return [
            str(node.target)
            for node in nodes
            if node in self._rows
            and node.op == "call_module"
            and runs[node.target] == 1
            and not touched.intersection(node.all_input_nodes)
        ]

    def in_front_of(self, changed: Collection[str], again: Collection[str] = ()) -> tuple[str, ...]:
        """Return the names of the values nearest the change that a network with changed layers shares with the dense one.

        The tail needs only these. Each is a tensor with one row per image. Other values, such as shapes, are recomputed from
        them. again: layers, from `first_of`, that compute their outputs from the dense network's outputs instead of from their
        own inputs.
        """
        touched = self._touched(changed)
        mixed = {node for node in touched if node.op == "call_module" and node.target in again}
        waiting = [*mixed, *(i for node in touched - mixed for i in node.all_input_nodes if i not in touched)]
        seen: set[fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if node not in seen and node not in self._rows:
                waiting += node.all_input_nodes
            seen.add(node)
        return tuple(node.name for node in self._graph.nodes if node in seen & self._rows)

    def _touched(self, changed: Collection[str]) -> set[fx.Node]:
        touched: set[fx.Node] = set()
        for node in self._graph.nodes:
            place = _module_of(node)
            whole = node.op == "call_module" and any(name.startswith(f"{place}.") for name in changed)
            if whole or place in changed or touched.intersection(node.all_input_nodes):
                touched.add(node)
        return touched

    def head(self, start: tuple[str, ...], end: tuple[str, ...]) -> Part | None:
        """Return a function that computes the values `end` from the values `start`, or None if these do not suffice."""
        return self._part(start, [self._nodes[name] for name in end], ("head", start, end))

    def tail(self, start: tuple[str, ...], again: Collection[str] = ()) -> Part | None:
        """Return a function that computes the logits, as (logits,), from the values `start`, or None if these do not suffice.

        again: layers whose own outputs are among `start`; each is run on that value.
        """
        return self._part(start, list(self._output.all_input_nodes), ("tail", start, frozenset(again)), again)

    def _part(self, start: tuple[str, ...], ends: Sequence[fx.Node], key: tuple, again: Collection[str] = ()) -> Part | None:
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
        # the code refers to layers by name, so it runs on every network with these layers
        return type(fx.GraphModule(self._model, graph)).forward


def trace(model: nn.Module, images: Tensor) -> Cuts | None:
    """Trace a network in eval mode and return its cuts, or None if torch.fx cannot trace it.

    Data-dependent branches, for example, cannot be traced. images: some inputs, float (B, C, H, W).
    """
    try:
        return Cuts(model, images)
    except Exception as error:  # a user's forward can fail in any way; the whole network is run instead
        event("uncut", reason=one_line(error))
        return None


def not_once(layer: str) -> IntrafusionError:
    """Return the error to raise if a layer does not have exactly one input in a forward pass."""
    return IntrafusionError(f"cannot fit {layer}: it does not run exactly once in a forward pass; choose drop or fusion")


def _reads(network: nn.Module, images: Tensor) -> dict[str, list[Tensor]]:
    """Run a network and return the first tensor input of every call, by module name. The hooks are removed afterwards."""
    reads: dict[str, list[Tensor]] = defaultdict(list)

    def hear(name: str) -> Callable:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            reads[name] += [value.clone() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)][:1]

        return before

    hooks = [m.register_forward_pre_hook(hear(name), with_kwargs=True) for name, m in network.named_modules()]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return reads


def _module_of(node: fx.Node) -> str | None:
    """Return the layer that a node runs, or whose tensor it reads. None for other nodes."""
    if node.op == "call_module":
        return str(node.target)
    return str(node.target).rpartition(".")[0] if node.op == "get_attr" else None
