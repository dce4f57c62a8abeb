"""Coupled channels from Torch-Pruning's dependency graph, with corrections.

Zero-padded shortcuts (option A) couple a stage's channels to a slice of the next stage's, and grouped convolutions couple
whole groups. Torch-Pruning handles neither, so this module joins the channels that it finds by union-find.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from intrafusion.models.architectures import PadShortcut
from intrafusion.pruning.groups.group import CHANNELWISE, CONSUMER, PAD, PRODUCER, Group, Layer
from intrafusion.runtime.light_imports import without

_POSITIONS = 1 << 18  # limit on the positions of a layer's channels on the flattened axis of another layer
_STEPS = 4000  # limit on the layer-to-layer steps in the walk over one group
_MAPPED = 1 << 22  # limit on the positions that reshapes produce in that walk
_CUT = (_ConvNd, nn.Linear, _BatchNorm, nn.PReLU, PadShortcut)  # layers that can be made smaller
_walk = threading.local()  # mapped: number of positions produced so far


class Graph:
    """Torch-Pruning's graph of one network, with its groups joined wherever it misses a coupling."""

    def __init__(self, model: nn.Module, example: Tensor):
        with without("timm"):
            import torch_pruning as tp

        class PadPruner(tp.pruner.function.BasePruningFunc):
            """Pruner that makes the zero-padded shortcut a node with separate input and output channels."""

            def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
                return layer

            def prune_in_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
                return layer

            def get_out_channels(self, layer: PadShortcut) -> int:
                return layer.channels + layer.before + layer.after

            def get_in_channels(self, layer: PadShortcut) -> int:
                return layer.channels

        self.model = model
        self.name_of = {module: name for name, module in model.named_modules()}
        self.owner_of = {id(p): name for name, p in model.named_parameters()}
        self.calls = self._count_calls(example)
        self.users: dict[int, set[str]] = defaultdict(set)  # id of a parameter -> names of the modules that run and hold it
        for name in self.calls:
            for parameter in model.get_submodule(name).parameters(recurse=False):
                self.users[id(parameter)].add(name)
        self.graph = tp.DependencyGraph()
        _tame_reshapes()
        self.graph.build_dependency(model, example, customized_pruners={PadShortcut: PadPruner()}, verbose=False)

    def _count_calls(self, example: Tensor) -> dict[str, int]:
        """Return module name -> number of calls in one forward pass, in the order of the first call."""
        calls: dict[str, int] = defaultdict(int)

        def count(module: nn.Module, *_: object) -> None:
            calls[self.name_of[module]] += 1

        hooks = [m.register_forward_hook(count) for m in self.model.modules()]
        try:
            self.model(example)
        finally:
            for hook in hooks:
                hook.remove()
        return dict(calls)

    def groups(self) -> list[Group]:
        parts = list(self._parts())
        joined = _join([part.axes for part in parts], self.model)
        norms = self._foldable_norms()
        groups = []
        for members, channels in joined:
            reasons = [reason for i in members if (reason := parts[i].reason)]
            groups.append(self._group([parts[i].root for i in members], channels, reasons, norms))
        order = {name: i for i, name in enumerate(self.calls)}
        return sorted(groups, key=lambda group: order[group.name])

    def _parts(self) -> Iterator["_Part"]:
        """Yield Torch-Pruning's groups, one for each set of layers that write the same channels."""
        covered: set[str] = set()
        for name in self.calls:
            module = self.model.get_submodule(name)
            if name in covered or not isinstance(module, _ConvNd | nn.Linear) or _is_depthwise(module):
                continue
            if module not in self.graph.module2node:
                continue
            size = module.weight.shape[0]
            pruner = self.graph.get_pruner_of_module(module)
            if reason := self._obstacle(module, pruner.prune_out_channels):
                yield _Part(name, {(name, "out"): {i: {i} for i in range(size)}}, reason)
                continue
            try:
                _walk.mapped = 0
                items = self.graph.get_pruning_group(module, pruner.prune_out_channels, list(range(size)))
                part = self._part(name, items)
            except (IndexError, ValueError, TypeError, AttributeError) as error:
                axes = {(name, "out"): {i: {i} for i in range(size)}}
                part = _Part(name, axes, _untraced(error))
            covered |= {axis for axis, side in part.axes if side == "out"}
            yield part

    def _obstacle(self, module: nn.Module, handler: Callable) -> str | None:
        """Return why a layer's channels cannot be pruned, as far as one-to-one dependencies show it; None if they do not.

        This saves Torch-Pruning's own walk, which follows channels through every sum and norm of a transformer's residual
        stream and takes minutes.
        """
        ahead, seen = [(self.graph.module2node[module], handler)], set()
        while ahead:
            node, handler = ahead.pop()
            if (node, handler) in seen:
                continue
            seen.add((node, handler))
            if reason := self._reason(node, self.graph.is_out_channel_pruning_fn(handler)):
                return reason
            for dep in node.dependencies:
                if dep.is_triggered_by(handler) and not any(dep.index_mapping):
                    ahead.append((dep.target, dep.handler))
        return None

    def _reason(self, node: Any, is_out: bool) -> str | None:
        """Return why channels on the output or input side of this node cannot be pruned; None if they can."""
        module = node.module
        name = self.name_of.get(module, "") if isinstance(module, nn.Module) else ""
        if is_out and not node.outputs:
            return "these channels are the network's outputs"
        if isinstance(module, nn.Parameter):
            if module.numel() == 1:  # the same for all channels
                return None
            return f"its channels are combined with the parameter {self.owner_of.get(id(module))}, which cannot be pruned"
        if not name:
            return None
        if isinstance(module, _ConvTransposeNd):
            return f"{name} is a transposed convolution"
        if isinstance(module, _BatchNorm) and module.running_var is None:
            return f"{name} normalises by the statistics of each batch"
        if _is_scalar(module):
            return None
        if isinstance(module, _CUT):
            if self.calls[name] > 1:
                return f"{name} is used more than once in a forward pass"
            return self._shared(name, module)
        if any(True for _ in module.parameters(recurse=True)):
            return f"its channels pass through {type(module).__name__} ({name}), which cannot be pruned"
        return None

    def _shared(self, name: str, module: nn.Module) -> str | None:
        """Return why a layer cannot be cut if another layer that runs has the same parameter; None if none has."""
        users = {user for p in module.parameters(recurse=False) for user in self.users[id(p)]} - {name}
        other = next((user for user in self.calls if user in users), None)
        return f"{name} and {other} share their weights" if other else None

    def _part(self, root: str, items: list) -> "_Part":
        axes: dict[tuple[str, str], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        reason = None
        for item in items:
            module, is_out = item.dep.target.module, self.graph.is_out_channel_pruning_fn(item.dep.handler)
            reason = reason or self._reason(item.dep.target, is_out)
            if module in self.name_of and isinstance(module, _CUT) and not _is_scalar(module):
                channelwise = isinstance(module, _BatchNorm | nn.PReLU) or _is_depthwise(module)
                side = "both" if channelwise else "out" if is_out else "in"
                width = _width(module, side)
                if item.idxs and max(item.idxs) >= width:
                    raise _Untraced(
                        f"its coupling cannot be traced: {self.name_of[module]} reads a part of its channels, after a"
                        " split or a reshape"
                    )
                for position, channel in zip(item.idxs, item.root_idxs, strict=True):
                    axes[self.name_of[module], side][position].add(channel)
        return _Part(root, {axis: dict(rows) for axis, rows in axes.items()}, reason)

    def _foldable_norms(self) -> dict[str, str]:
        """Return layer name -> the BatchNorm that directly follows the layer and is the only reader of its output."""
        norms = {}
        for module, node in self.graph.module2node.items():
            if not isinstance(module, _BatchNorm) or len(node.inputs) != 1 or module.running_var is None:
                continue
            before = node.inputs[0]
            folds = isinstance(before.module, _ConvNd | nn.Linear) and not isinstance(before.module, _ConvTransposeNd)
            if folds and len(before.outputs) == 1:
                fits = before.module.weight.shape[0] == module.num_features
                if fits and self.calls[self.name_of[before.module]] == self.calls[self.name_of[module]] == 1:
                    norms[self.name_of[before.module]] = self.name_of[module]
        return norms

    def _group(
        self,
        roots: list[str],
        channels: list[dict[tuple[str, str], list[int]]],
        reasons: list[str],
        norms: dict[str, str],
    ) -> Group:
        axes = list(dict.fromkeys(axis for channel in channels for axis in channel))
        whole = [axis for axis in axes if all(axis in channel for channel in channels)]
        if whole:
            channels = sorted(channels, key=lambda channel: channel[whole[0]])
        layers: list[Layer] = []
        for name, side in axes:
            rows = [sorted(channel.get((name, side), [])) for channel in channels]
            widths = {len(row) for row in rows} - {0}
            if len(widths) > 1:
                reasons = [
                    *reasons,
                    f"because of a reshape, some of its channels are more inputs of {name} than others",
                ]
                continue
            positions = torch.tensor([row or [-1] * max(widths) for row in rows])
            role = self._role(name, side)
            if role:
                layers.append(Layer(name, role, positions, norms.get(name)))
        if len(channels) < 2:
            reasons = [*reasons, "it has only one channel"]
        order = list(self.calls)
        root = min(roots, key=order.index)
        presence = torch.stack([layer.present() for layer in layers], 1)
        block = torch.unique(presence, dim=0, return_inverse=True)[1]
        return Group(root, len(channels), tuple(layers), block, reasons[0] if reasons else None)

    def _role(self, name: str, side: str) -> str | None:
        module = self.model.get_submodule(name)
        if isinstance(module, PadShortcut):
            return PAD if side == "out" else None
        if side == "both" or getattr(module, "groups", 1) > 1:
            return None if side == "in" else CHANNELWISE
        return PRODUCER if side == "out" else CONSUMER


@dataclass(frozen=True)
class _Part:
    """One Torch-Pruning group: axis (layer name, side) -> position -> the root's channels at that position."""

    root: str
    axes: dict[tuple[str, str], dict[int, set[int]]]
    reason: str | None


class _Untraced(ValueError):
    """Error for channels that cannot be traced; the message says why."""


def _untraced(error: Exception) -> str:
    if isinstance(error, _Untraced):
        return str(error)
    if isinstance(error, IndexError):
        return "its coupling cannot be traced: a reshape reorders its channels"
    return "its coupling cannot be traced: an unknown operation moves its channels"


@cache
def _tame_reshapes() -> None:
    """Keep Torch-Pruning from failing or looping forever where a reshape splits channels, as in channel shuffles.

    Torch-Pruning then assumes that the channels keep their order. If they do not, the group fails the test that every group
    must pass.
    """
    from torch_pruning.dependency import Group as Walk
    from torch_pruning.dependency import index_mapping

    spread, add = index_mapping._FlattenIndexMapping.__call__, Walk.add_dep

    def tolerant(rule: Callable) -> Callable:
        def follow(graph: Any, node: Any) -> None:
            with suppress(ZeroDivisionError, TypeError):  # for sizes that Torch-Pruning could not infer
                rule(graph, node)

        return follow

    def bounded(self: Any, positions: list) -> list:
        _walk.mapped += len(positions) * (1 if self.reverse else self._stride)
        if _walk.mapped > _MAPPED or (not self.reverse and len(positions) * self._stride > _POSITIONS):
            raise IndexError("reshapes that lead to one another")
        return spread(self, positions)

    def counted(self: Any, dep: Any, idxs: list) -> None:
        if len(self) >= _STEPS:
            raise IndexError("reshapes that lead to one another")
        add(self, dep, idxs)

    index_mapping.update_reshape_index_mapping = tolerant(index_mapping.update_reshape_index_mapping)
    index_mapping.update_concat_index_mapping = tolerant(index_mapping.update_concat_index_mapping)
    index_mapping._FlattenIndexMapping.__call__ = bounded
    Walk.add_dep = counted


def _width(module: nn.Module, side: str) -> int:
    """Return how many channels a layer reads (side "in") or writes."""
    if isinstance(module, PadShortcut):
        return module.channels + (0 if side == "in" else module.before + module.after)
    if isinstance(module, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    if isinstance(module, _ConvNd):
        return module.in_channels if side == "in" else module.out_channels
    return module.num_parameters if isinstance(module, nn.PReLU) else module.num_features  # type: ignore[return-value]


def _is_scalar(module: nn.Module) -> bool:
    """Return whether a layer has a single value for all channels, as PReLU has by default."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def _join(
    parts: list[dict[tuple[str, str], dict[int, set[int]]]], model: nn.Module
) -> list[tuple[list[int], list[dict[tuple[str, str], list[int]]]]]:
    """Join the channels of all parts by union-find; return each joined group's parts and its channels' positions."""
    sets = _DisjointSets()
    holders: dict[tuple[str, str], dict[int, tuple[int, int]]] = defaultdict(dict)
    for number, axes in enumerate(parts):
        for axis, rows in axes.items():
            for position, channels in rows.items():
                for channel in channels:
                    sets.union((number, channel), holders[axis].setdefault(position, (number, channel)))
    for (name, side), rows_in in list(holders.items()):
        module = model.get_submodule(name)
        rows_out = holders.get((name, "out"))
        if side != "in" or rows_out is None:
            continue
        if isinstance(module, PadShortcut):
            for position, node in rows_in.items():
                sets.union(node, rows_out[position + module.before])
        elif isinstance(module, _ConvNd) and module.groups > 1:
            for axis_rows, width in ((rows_in, module.in_channels), (rows_out, module.out_channels)):
                for position, node in axis_rows.items():
                    unit = position // (width // module.groups)
                    sets.union(node, (name, unit))
    found: dict[Hashable, dict[tuple[str, str], list[int]]] = defaultdict(lambda: defaultdict(list))
    parts_of: dict[Hashable, set[int]] = defaultdict(set)
    for axis, rows_ in holders.items():
        for position, node in rows_.items():
            found[sets.find(node)][axis].append(position)
            parts_of[sets.find(node)].add(node[0])
    owners = _DisjointSets()
    for numbers in parts_of.values():
        first, *others = sorted(numbers)
        for other in others:
            owners.union(first, other)
    joined: dict[Hashable, tuple[set[int], list]] = defaultdict(lambda: (set(), []))
    for key, axes_ in found.items():
        numbers, members = joined[owners.find(min(parts_of[key]))]
        numbers |= parts_of[key]
        members.append(dict(axes_))
    return [(sorted(numbers), members) for numbers, members in joined.values()]


class _DisjointSets:
    def __init__(self) -> None:
        self.parent: dict[Hashable, Hashable] = {}

    def find(self, node: Hashable) -> Hashable:
        root = node
        while (above := self.parent.get(root, root)) != root:
            root = above
        while (above := self.parent.get(node, node)) != root:
            self.parent[node], node = root, above
        return root

    def union(self, a: Hashable, b: Hashable) -> None:
        root_a, root_b = self.find(a), self.find(b)
        if root_a != root_b:
            self.parent[root_a] = root_b
