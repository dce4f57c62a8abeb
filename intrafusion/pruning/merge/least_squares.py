"""Fitting merges: solve for the layers behind pruned channels so that they reproduce the dense network's outputs.

Fitting needs unlabelled images only, and no gradients. The pruned network runs beside the dense one, layer by layer from input
to output. Each layer is fitted on its actual inputs in the pruned network, whose earlier layers are fitted already.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.models.fx.partition import not_once
from intrafusion.pruning.groups.feature_maps import maps_of, normalised
from intrafusion.pruning.groups.group import CHANNELWISE, CONSUMER, PRODUCER, Group, Layer
from intrafusion.pruning.merge.drop_and_fusion import averaging
from intrafusion.pruning.merge.lockstep import InStep
from intrafusion.pruning.merge.matrix_product import (
    add_bias,
    coverage,
    inputs_of,
    no_products,
    product,
    rows_of,
    scale_outputs,
    set_weight,
    weight_of,
    width_of,
)
from intrafusion.pruning.merge.ridge import Moments, Regression
from intrafusion.runtime.devices import doubled, float64_device

_BATCH = 64  # images in a batch


@dataclass(frozen=True, eq=False)
class Merged:
    """Merge of one group.

    matrix: (k, n), maps the dense channels to the merged ones. kept: int64 (k,), the positions of the merged channels.
    """

    group: Group
    matrix: Tensor
    kept: Tensor


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """Linear map by which a consumer predicts the dense channels from the kept ones.

    matrix: (n, k), intercept: (n,), float64. explained: (n,), the share of each channel's variance on the images that the map
    predicts, at most 1.
    """

    group: str
    consumer: str
    matrix: Tensor
    intercept: Tensor
    explained: Tensor


@dataclass(eq=False)
class Fit:
    """A network `small`, merged and cut down from `dense` (BN folded), whose layers are to be fitted in place.

    data: calibration images. maps: the channel maps found so far. odd: layers that cannot be fitted, because their outputs are
    not their weight times their (possibly padded) input; for example, layers that standardise their weight. norms: norms of the
    small network that run and have running statistics. Both networks are put into eval mode.
    """

    dense: nn.Module
    small: nn.Module
    merged: Sequence[Merged]
    data: ImageData
    maps: list[ChannelMap] = field(default_factory=list)

    def __post_init__(self) -> None:
        for network in (self.dense, self.small):
            network.eval()
        batches = [images for images, _ in normalised(self.dense, self.data, _BATCH)]
        self.walk = InStep(self.dense, self.small, batches)
        self.odd = no_products(self.dense, batches[0][:1])
        norms = inputs_of(self.small, (_NormBase,), batches[0][:1])
        self.norms = {name for name in norms if self.small.get_submodule(name).running_mean is not None}

    def once(self, names: Collection[str], *kinds: type[nn.Module]) -> list[str]:
        """Return these layers in their order. Raises IntrafusionError if one does not run exactly once in a forward pass.

        kinds: types of the layers, if they are not only convolutions and linear layers.
        """
        found = [name for name in self.walk.cuts.layers(*kinds) if name in names]
        if missing := sorted(set(names) - set(found)):
            raise not_once(missing[0])
        return found

    def calibrate(self, name: str) -> None:
        """Make a layer apply its dense weights to `M A`, the dense channels predicted from the kept ones `A`: `W' = W M^T`.

        Raises IntrafusionError for a layer that is odd.
        """
        self._check(name)
        source, _, _ = self.walk.cuts.around(name)
        for merged in self.merged:
            for layer in merged.group.role(CONSUMER):
                if layer.name == name:
                    self._calibrate(name, source, merged, layer)

    def _calibrate(self, name: str, source: str, merged: Merged, layer: Layer) -> None:
        was, now = self.dense.get_submodule(name), self.small.get_submodule(name)
        narrow, regression = self._narrow(layer, merged.kept), Regression()
        for dense, small in self.walk.at(name):
            wanted, known = maps_of(self.dense, layer, dense[source]), maps_of(self.small, narrow, small[source])
            regression.add(_samples(known), _samples(wanted))
            like = dense[source][:1]
        matrix, intercept = regression.solve()
        explained = regression.explained(matrix, intercept)
        self.maps.append(ChannelMap(merged.group.name, name, matrix.T.cpu(), intercept.cpu(), explained.cpu()))
        held, present = layer.present(), narrow.present()
        places = layer.positions[held].to(matrix.device)  # (n, m)
        columns = torch.tensordot(self.rows(name), doubled(weight_of(was)), dims=1)[:, places]  # (o, n, m, taps)
        mixed = torch.tensordot(matrix[present][:, held], columns, dims=([1], [1])).movedim(0, 1)  # (o, k, m, taps)
        weight, reached = doubled(weight_of(now)), doubled(coverage(was, like))[places]
        weight[:, narrow.positions[present].to(matrix.device)] = mixed
        set_weight(now, weight)
        add_bias(now, torch.einsum("onmt,n,nmt->o", columns, intercept[held], reached))

    def refit(self, name: str) -> None:
        """Solve for a layer's whole weight, so that the sum it writes into, or else its output, matches the dense network's.

        Raises IntrafusionError for a layer that is odd. Convolutions with several groups are not supported.
        """
        self._check(name)
        source, output, added = self.walk.cuts.around(name)
        layer: Any = self.small.get_submodule(name)
        others, regression = (added[1],) if added else (), Regression()
        rows = self.rows(name)
        for dense, small in self.walk.at(name, (output, *others), others):
            wanted = _times(rows_of(layer, dense[output]), rows)
            for other in others:
                wanted = wanted + _times(rows_of(layer, dense[other]), rows) - rows_of(layer, small[other])
            regression.add(product(layer, small[source]).seen.squeeze(1), wanted)  # type: ignore[union-attr]
        weight = weight_of(layer).flatten(1)
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.data
        found, intercept = regression.solve(doubled(torch.cat([weight, bias[:, None]], 1)).T)
        set_weight(layer, found.T.unflatten(1, weight_of(layer).shape[1:]))
        add_bias(layer, intercept - doubled(bias))

    def restate(self, name: str, mean: Tensor | None = None, std: Tensor | None = None) -> None:
        """Scale and shift a layer's outputs, channel by channel, so that they have the wanted statistics on the images.

        mean, std: of the dense layer's channels, float64 (o,); None for those measured on the images. A channel merged from
        several gets the average of their statistics. Raises IntrafusionError for a layer that is odd.
        """
        self._check(name)
        _, output, _ = self.walk.cuts.around(name)
        layer, ours, theirs = self.small.get_submodule(name), Moments(), Moments()
        for dense, small in self.walk.at(name, () if mean is not None else (output,), (output,)):
            ours.add(rows_of(layer, small[output]))
            if mean is None:
                theirs.add(rows_of(layer, dense[output]))
        if mean is None or std is None:
            mean, std = theirs.mean(), theirs.std()
        rows = averaging(self.rows(name))
        mean, std, now = rows @ mean.to(rows), rows @ std.to(rows), ours.std()
        scale = torch.where(now > 1e-6 * (1 + ours.mean().abs()), std / now, 1.0)
        scale_outputs(layer, scale, mean - scale * ours.mean())

    def measure(self, name: str) -> None:
        """Measure the running statistics of a norm again, on its inputs in the small network."""
        source, _, _ = self.walk.cuts.around(name)
        norm: Any = self.small.get_submodule(name)
        values, variances = Moments(), Moments()
        for _, small in self.walk.at(name):
            if isinstance(norm, _InstanceNorm):  # the mean of the statistics of each image
                pixels = doubled(small[source].flatten(2))
                values.add(pixels.mean(2))
                variances.add(pixels.var(2))
            else:
                values.add(rows_of(norm, small[source]))
        unbiased = values.std().square() * values.count / max(values.count - 1, 1)
        norm.running_mean = values.mean().to(norm.running_mean)
        norm.running_var = (variances.mean() if variances.count else unbiased).to(norm.running_var)

    def _check(self, name: str) -> None:
        if name in self.odd:
            kind = type(self.dense.get_submodule(name)).__name__
            raise IntrafusionError(
                f"cannot fit layer {name} ({kind}): its output is not a product of its weight and its input; "
                "choose drop or fusion, without bn-reset and repair, or leave out the groups that it reads"
            )

    def rows(self, name: str) -> Tensor:
        """Return the matrix (o', o), float64, that maps a layer's outputs in the dense network to those in the small one.

        It is on the `float64_device` of the networks.
        """
        size = width_of(self.dense.get_submodule(name))
        rows, stays = torch.eye(size, dtype=torch.float64), torch.ones(size, dtype=torch.bool)
        for merged in self.merged:
            for layer in merged.group.role(PRODUCER, CHANNELWISE):
                if layer.name == name:
                    held = layer.present()
                    kept = merged.kept[held[merged.kept]]
                    matrix = merged.matrix[held[merged.kept]][:, held]
                    stays[layer.positions[held]], rows[layer.positions[held].flatten()] = False, 0
                    for places, at in zip(layer.positions[held].T, layer.positions[kept].T, strict=True):
                        stays[at] = True
                        rows[at[:, None], places] = matrix
        return rows[stays].to(float64_device(next(self.dense.parameters()).device))

    def _narrow(self, layer: Layer, kept: Tensor) -> Layer:
        """Return the layer's part in the small network, with the positions of the kept channels there."""
        gone = [
            other.positions[_rest(merged) & other.present()].flatten()
            for merged in self.merged
            for other in merged.group.role(CONSUMER)
            if other.name == layer.name
        ]
        before = torch.cat(gone).sort().values
        positions = layer.positions[kept]
        return replace(layer, positions=torch.where(positions < 0, -1, positions - torch.searchsorted(before, positions)))


def _rest(merged: Merged) -> Tensor:
    """Return which channels were removed: bool (n,)."""
    away = torch.ones(merged.group.size, dtype=torch.bool)
    away[merged.kept] = False
    return away


def _samples(maps: Tensor) -> Tensor:
    """Reshape maps (B, n, h, w) to samples (B h w, n)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _times(values: Tensor, rows: Tensor) -> Tensor:
    """Map values (N, o) of the dense network to those of the small one: (N, o'), in float32 at least."""
    kind = torch.promote_types(values.dtype, torch.float32)
    return values.to(kind) @ rows.T.to(values.device, kind)
