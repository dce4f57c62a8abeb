"""Coupled channel groups of any network: which rows, columns and norms must change together when a channel goes.

Torch-Pruning's dependency graph supplies the couplings. It is corrected where it is wrong: zero-padded shortcuts (option
A) tie a stage's channels to a slice of the next stage's, and grouped convolutions tie whole groups together. Then every
group must pass a test that a right group cannot fail: permuting its channels leaves the logits unchanged.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from intrafusion.errors import IntrafusionError
from intrafusion.networks import PadShortcut

PRODUCER, CONSUMER, CHANNELWISE, PAD = "producer", "consumer", "channelwise", "pad"


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's part in a group.

    role: "producer" (its output channels), "consumer" (its input channels), "channelwise" (depthwise and grouped
    convolutions, norms) or "pad" (a zero-padded shortcut's output).
    positions: int64 (n, m), where channel j lies on that axis; m > 1 after a flatten or in a grouped convolution; a row
    of -1 where the layer does not hold the channel. norm: the BatchNorm that folds into this layer, if any.
    """

    name: str
    role: str
    positions: Tensor
    norm: str | None = None

    def present(self) -> Tensor:
        """bool (n,): whether the layer holds each channel."""
        return self.positions[:, 0] >= 0

    def views(self, model: nn.Module) -> dict[str, Tensor]:
        """The layer's tensors in `model`, as views with this group's axis first; empty for a norm folded away."""
        module = model.get_submodule(self.name)
        if isinstance(module, _BatchNorm):
            names = ("weight", "bias", "running_mean", "running_var")
            return {n: t.data for n in names if (t := getattr(module, n)) is not None}
        if not isinstance(module, _ConvNd | nn.Linear):
            return {}
        if self.role == CONSUMER:
            return {"weight": module.weight.data.transpose(0, 1)}
        return {n: t.data for n in ("weight", "bias") if (t := getattr(module, n)) is not None}


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that must be pruned together.

    name: dotted name of the first layer that writes them. size: n, the number of channels (or of whole convolution
    groups). reason: why it cannot be pruned, None when it can. block: int64 (n,); channels of one block are held by the
    same layers, and only they may be fused (one block everywhere but behind zero-padded shortcuts).
    """

    name: str
    size: int
    layers: tuple[Layer, ...]
    block: Tensor
    reason: str | None = None

    def role(self, *roles: str) -> list[Layer]:
        """The layers with one of these roles."""
        return [layer for layer in self.layers if layer.role in roles]


def coupling(group: Group) -> str:
    """Why these layers belong together, in words."""
    writers, readers = group.role(PRODUCER), group.role(CONSUMER)
    parts = [f"written by {_names(writers)}" + (", whose outputs are summed" if len(writers) > 1 else "")]
    if through := [layer for layer in group.role(CHANNELWISE) if layer.positions.shape[1] > 1]:
        parts.append(f"in whole convolution groups through {_names(through)}")
    if readers:
        parts.append(f"read by {_names(readers)}")
    if spread := [layer for layer in readers if layer.positions.shape[1] > 1]:
        parts.append(f"each channel is {spread[0].positions.shape[1]} inputs of {spread[0].name} after the flatten")
    if pads := group.role(PAD):
        parts.append(f"stages joined by zero-padded shortcuts {_names(pads)}")
    return "; ".join(parts)


def _names(layers: list[Layer]) -> str:
    names = [layer.name for layer in layers]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def find_groups(model: nn.Module, example: Tensor) -> list[Group]:
    """All channel groups of `model`, from input to output; those that cannot be pruned carry their reason.

    example: one input, float (1, C, H, W); only its shape matters. The model is not touched.
    Raises IntrafusionError when the network cannot be traced at all.
    """
    traced = copy.deepcopy(model).eval().requires_grad_(True)
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example.device)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Graph(traced, noise)
            groups = graph.groups()
    except IntrafusionError:
        raise
    except Exception as error:  # a user's forward can fail in any way
        raise IntrafusionError(
            f"the network cannot be traced on an input of shape {tuple(example.shape)}: {str(error).splitlines()[0]}"
        ) from error
    return _verified(traced.requires_grad_(False), noise, groups)


class _Graph:
    """Torch-Pruning's graph of one network, with its groups joined where channels are tied and it does not say so."""

    def __init__(self, model: nn.Module, example: Tensor):
        import torch_pruning as tp

        class PadPruner(tp.pruner.function.BasePruningFunc):
            """Makes the zero-padded shortcut a node whose input and output channels are separate."""

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
        self.calls = self._count_calls(example)
        self.graph = tp.DependencyGraph().build_dependency(
            model, example, customized_pruners={PadShortcut: PadPruner()}, verbose=False
        )

    def _count_calls(self, example: Tensor) -> dict[str, int]:
        """Module name -> number of calls in one forward pass, in the order of the first call."""
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
        """Torch-Pruning's groups, one for each set of layers that write the same channels."""
        covered: set[str] = set()
        for name in self.calls:
            module = self.model.get_submodule(name)
            if name in covered or not isinstance(module, _ConvNd | nn.Linear) or _is_depthwise(module):
                continue
            if module not in self.graph.module2node:
                continue
            size = module.weight.shape[0]
            pruner = self.graph.get_pruner_of_module(module)
            try:
                items = self.graph.get_pruning_group(module, pruner.prune_out_channels, list(range(size)))
                part = self._part(name, items)
            except (IndexError, ValueError, TypeError, AttributeError) as error:
                axes = {(name, "out"): {i: {i} for i in range(size)}}
                part = _Part(name, axes, f"its coupling cannot be traced ({error})")
            covered |= {axis for axis, side in part.axes if side == "out"}
            yield part

    def _part(self, root: str, items: list) -> "_Part":
        axes: dict[tuple[str, str], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        reason = None
        for item in items:
            module, is_out = item.dep.target.module, self.graph.is_out_channel_pruning_fn(item.dep.handler)
            if is_out and not item.dep.target.outputs:
                reason = reason or "these channels are the network's outputs"
            if isinstance(module, nn.Parameter):
                reason = reason or "its channels meet a bare parameter, which no rule here prunes"
            elif module in self.name_of and isinstance(module, _ConvNd | nn.Linear | _BatchNorm | PadShortcut):
                name = self.name_of[module]
                if isinstance(module, _ConvTransposeNd):
                    reason = reason or f"{name} is a transposed convolution"
                if self.calls[name] > 1:
                    reason = reason or f"{name} is used more than once in a forward pass"
                channelwise = isinstance(module, _BatchNorm) or _is_depthwise(module)
                side = "both" if channelwise else "out" if is_out else "in"
                for position, channel in zip(item.idxs, item.root_idxs, strict=True):
                    axes[name, side][position].add(channel)
            elif module in self.name_of and any(True for _ in module.parameters(recurse=True)):
                reason = reason or f"its channels pass through {type(module).__name__} ({self.name_of[module]})"
        return _Part(root, {axis: dict(rows) for axis, rows in axes.items()}, reason)

    def _foldable_norms(self) -> dict[str, str]:
        """Layer name -> the BatchNorm that reads this layer's output, alone and directly."""
        norms = {}
        for module, node in self.graph.module2node.items():
            if not isinstance(module, _BatchNorm) or len(node.inputs) != 1 or module.running_var is None:
                continue
            before = node.inputs[0]
            if isinstance(before.module, _ConvNd | nn.Linear) and len(before.outputs) == 1:
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
                reasons = [*reasons, f"{name} holds {min(widths)} to {max(widths)} positions a channel"]
                continue
            positions = torch.tensor([row or [-1] * max(widths) for row in rows])
            role = self._role(name, side)
            if role:
                layers.append(Layer(name, role, positions, norms.get(name)))
        if len(channels) < 2:
            reasons = [*reasons, "it has a single channel"]
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
    """One Torch-Pruning group: axis (layer name, side) -> position -> the root's channels found there."""

    root: str
    axes: dict[tuple[str, str], dict[int, set[int]]]
    reason: str | None


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def _join(
    parts: list[dict[tuple[str, str], dict[int, set[int]]]], model: nn.Module
) -> list[tuple[list[int], list[dict[tuple[str, str], list[int]]]]]:
    """Union-find over every part's channels; returns for each joined group its parts and its channels' positions."""
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


def _verified(model: nn.Module, example: Tensor, groups: list[Group]) -> list[Group]:
    """Groups whose random permutation changes the logits get a reason; `model` is a copy, restored after each trial."""
    prunable = [group for group in groups if group.reason is None]
    with torch.inference_mode():
        before = model(example)
        if _survives(model, example, before, prunable):
            return groups
        wrong = {g.name for g in prunable if not _survives(model, example, before, [g])}
    reason = "permuting its channels changes the logits: the layers between mix channels in a way that cannot be traced"
    return [replace(group, reason=reason) if group.name in wrong else group for group in groups]


def _survives(model: nn.Module, example: Tensor, before: Tensor, groups: list[Group]) -> bool:
    saved = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        order = torch.arange(group.size)
        for block in group.block.unique():
            members = (group.block == block).nonzero()[:, 0]
            order[members] = members[torch.randperm(len(members), generator=generator)]
        for layer in group.layers:
            held = layer.present()
            for view in layer.views(model).values():
                view[layer.positions[held].flatten()] = view[layer.positions[order][held].flatten()].clone()
    after = model(example)
    model.load_state_dict(saved)
    return bool(torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())))
