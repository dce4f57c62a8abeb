"""Merges that fit: the layers behind pruned channels are solved for, so that they give what the dense network gave.

Unlabelled images only, no gradients. Layer by layer from input to output, the pruned network runs beside the dense one,
and each layer is fitted on what the pruned network really feeds it, the layers in front of it being fitted already.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from intrafusion.activations import maps_of, normalised
from intrafusion.channels import CONSUMER, PRODUCER, Group, Layer
from intrafusion.data import ImageData
from intrafusion.merge.base import averaging
from intrafusion.merge.instep import InStep
from intrafusion.merge.regression import Moments, Regression

_BATCH = 64  # images at once


@dataclass(frozen=True, eq=False)
class Merged:
    """What became of one group. matrix: (k, n), makes the channels of the dense ones; kept: int64 (k,), where they stand."""

    group: Group
    matrix: Tensor
    kept: Tensor


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """How a consumer makes the dense channels of the kept ones. matrix: (n, k), intercept: (n,), float64.

    explained: (n,), the share of each channel's variance on the images that this predicts, at most 1.
    """

    group: str
    consumer: str
    matrix: Tensor
    intercept: Tensor
    explained: Tensor


@dataclass(eq=False)
class Fit:
    """A network `small`, merged and cut down from `dense` (BN folded), whose layers are to be fitted in place.

    data: calibration images. maps: the channel maps found so far.
    """

    dense: nn.Module
    small: nn.Module
    merged: Sequence[Merged]
    data: ImageData
    maps: list[ChannelMap] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.walk = InStep(self.dense, self.small, [images for images, _ in normalised(self.dense, self.data, _BATCH)])

    def calibrate(self, name: str) -> None:
        """Give a layer the dense weights on `M A`, which predicts the dense channels from the kept ones: `W' = W M^T`."""
        source, _, _ = self.walk.cuts.around(name)
        for merged in self.merged:
            for layer in merged.group.role(CONSUMER):
                if layer.name == name:
                    self._calibrate(name, source, merged, layer)

    def _calibrate(self, name: str, source: str, merged: Merged, layer: Layer) -> None:
        narrow = self._narrow(layer, merged.kept)
        regression, size = Regression(), (1, 1)
        for dense, small in self.walk.at(name):
            wanted, known = maps_of(self.dense, layer, dense[source]), maps_of(self.small, narrow, small[source])
            regression.add(_samples(known), _samples(wanted))
            size = tuple(dense[source].shape[-2:])  # type: ignore[assignment]
        matrix, intercept = regression.solve()
        explained = regression.explained(matrix, intercept)
        self.maps.append(ChannelMap(merged.group.name, name, matrix.T.cpu(), intercept.cpu(), explained.cpu()))
        was, now = self.dense.get_submodule(name), self.small.get_submodule(name)
        assert isinstance(was, _ConvNd | nn.Linear)
        assert isinstance(now, _ConvNd | nn.Linear)
        held = layer.present()
        weight = torch.tensordot(self.rows(name), was.weight.data.double(), dims=1)  # (o, C, ...)
        columns = weight[:, layer.positions[held].to(weight.device)]  # (o, n, m, ...)
        matrix, intercept = matrix[:, held], intercept[held]
        mixed = torch.tensordot(matrix[narrow.present()], columns, dims=([1], [1])).movedim(0, 1)  # (o, k, m, ...)
        now.weight.data[:, narrow.positions[narrow.present()].to(weight.device)] = mixed.to(now.weight.dtype)
        shift = torch.tensordot(columns, intercept, dims=([1], [0])).sum(1)  # (o, taps)
        add_bias(now, shift.flatten(1) @ _coverage(now, size).to(shift) if isinstance(now, nn.Conv2d) else shift)

    def refit(self, name: str) -> None:
        """Solve for a layer's whole weight, so that the network's sum there, or else its output, is the dense one's."""
        source, output, added = self.walk.cuts.around(name)
        target, other = added or (output, None)
        layer = self.small.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        rows = self.rows(name).to(layer.weight.dtype)
        regression = Regression()
        for dense, small in self.walk.at(name, (target,), (other,) if other else ()):
            wanted = _positions(dense[target]) @ rows.T
            if other:
                wanted = wanted - _positions(small[other])
            regression.add(_unfolded(layer, small[source]), wanted)
        bias = layer.bias.data if layer.bias is not None else layer.weight.new_zeros(len(layer.weight))
        start = torch.cat([layer.weight.data.flatten(1), bias[:, None]], 1).double().T
        weight, intercept = regression.solve(start)
        layer.weight.data = weight.T.reshape(layer.weight.shape).to(layer.weight.dtype).contiguous()
        add_bias(layer, intercept - bias)

    def restate(self, name: str, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        """Scale and shift a layer's outputs, channel by channel, so that on the images they have the statistics wanted.

        mean, std: of the dense layer's channels, float64 (o,); None for what they have on the images. A channel made of
        several is given the average of theirs.
        """
        _, output, _ = self.walk.cuts.around(name)
        ours, theirs = Moments(), Moments()
        for dense, small in self.walk.at(name, () if mean is not None else (output,), (output,)):
            ours.add(_positions(small[output]))
            if mean is None:
                theirs.add(_positions(dense[output]))
        if mean is None or std is None:
            mean, std = theirs.mean(), theirs.std()
        rows = averaging(self.rows(name))
        layer: Any = self.small.get_submodule(name)
        mean, std, now = rows @ mean.to(rows), rows @ std.to(rows), ours.std()
        scale = torch.where(now > 1e-6 * (1 + ours.mean().abs()), std / now, 1.0)
        bias = 0 if layer.bias is None else layer.bias.data.double()
        weight = layer.weight.data
        layer.weight.data = (weight * scale.view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
        add_bias(layer, scale * bias + mean - scale * ours.mean() - bias)

    def rows(self, name: str) -> Tensor:
        """(o', o): makes a layer's outputs in the small network of those in the dense one. float64."""
        size = len(self.dense.get_submodule(name).weight)  # type: ignore[arg-type]
        rows, stays = torch.eye(size, dtype=torch.float64), torch.ones(size, dtype=torch.bool)
        for merged in self.merged:
            for layer in merged.group.role(PRODUCER):
                if layer.name == name:
                    held = layer.present()
                    kept = merged.kept[held[merged.kept]]
                    matrix = merged.matrix[held[merged.kept]][:, held]
                    stays[layer.positions[held]], rows[layer.positions[held].flatten()] = False, 0
                    for places, at in zip(layer.positions[held].T, layer.positions[kept].T, strict=True):
                        stays[at] = True
                        rows[at[:, None], places] = matrix
        return rows[stays].to(next(self.dense.parameters()).device)

    def _narrow(self, layer: Layer, kept: Tensor) -> Layer:
        """The layer's part in the small network: where the kept channels lie there."""
        gone = [
            other.positions[_rest(merged) & other.present()].flatten()
            for merged in self.merged
            for other in merged.group.role(CONSUMER)
            if other.name == layer.name
        ]
        before = torch.cat(gone).sort().values
        positions = layer.positions[kept]
        return replace(
            layer, positions=torch.where(positions < 0, -1, positions - torch.searchsorted(before, positions))
        )


def _rest(merged: Merged) -> Tensor:
    """bool (n,): the channels that went."""
    away = torch.ones(merged.group.size, dtype=torch.bool)
    away[merged.kept] = False
    return away


def add_bias(layer: _ConvNd | nn.Linear, more: Tensor) -> None:
    """Add to a layer's bias, which it is given where it has none. more: (o,)."""
    now = layer.bias.data if layer.bias is not None else torch.zeros_like(layer.weight[:, 0].flatten(1)[:, 0])
    layer.bias = nn.Parameter((now.double() + more).to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)


def _samples(maps: Tensor) -> Tensor:
    """(B, n, h, w) -> (B h w, n)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _positions(values: Tensor) -> Tensor:
    """A layer's outputs, channels last: (B, C, H, W) -> (B H W, C); (..., C) of a linear layer -> (N, C)."""
    return _samples(values) if values.ndim == 4 else values.reshape(-1, values.shape[-1])


def _unfolded(layer: nn.Conv2d | nn.Linear, values: Tensor) -> Tensor:
    """What each output of a layer sees: (N, inputs), in the order of its flattened weight."""
    if isinstance(layer, nn.Linear):
        return values.reshape(-1, values.shape[-1])
    columns = F.unfold(_padded(layer, values), layer.kernel_size, layer.dilation, 0, layer.stride)
    return columns.permute(0, 2, 1).flatten(0, 1)


def _padded(layer: nn.Conv2d, values: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(values, layer._reversed_padding_repeated_twice, mode=mode)


def _coverage(layer: nn.Conv2d, size: tuple[int, int]) -> Tensor:
    """At what share of the outputs each tap lies within the image, not on its zero padding: (taps,)."""
    ones = _padded(layer, torch.ones(1, 1, *size))
    return F.unfold(ones, layer.kernel_size, layer.dilation, 0, layer.stride).mean((0, 2))
