"""BatchNorm reinserted behind layers into which it was folded, while a network is trained."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from intrafusion.models.fx.sharing import replace_layers
from intrafusion.pruning.groups.norms import affine
from intrafusion.pruning.merge.matrix_product import no_products, rows_of, scale_outputs, set_weight, weight_of
from intrafusion.pruning.merge.ridge import Moments
from intrafusion.training.recovery.distillation import watching
from intrafusion.training.recovery.layers import lone_layers

_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}  # by the number of spatial axes


class Normed(nn.Sequential):
    """A layer and the norm behind it."""


class RowNorm(nn.BatchNorm1d):
    """BatchNorm for the output of a linear layer, channels last: (..., C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).reshape(x.shape)


def insert_norms(model: nn.Module, layers: Iterable[str], batches: Sequence[Tensor]) -> None:
    """Put a BatchNorm behind each of these convolutions and linear layers, in place; outputs in eval mode do not change.

    batches: inputs, float (B, C, H, W), on which the layers' means and deviations are measured. These become the norms'
    statistics, shifts and scales; the layers' biases are absorbed into them. A layer that shares its weight with another, or
    whose outputs are not its weight times its input, gets no norm, because the norm could not be folded back into it.
    """
    able = lone_layers(model, _ConvNd, nn.Linear).keys() - no_products(model, batches[0][:1])
    names = [name for name in layers if name in able]
    seen = {name: Moments() for name in names}
    with torch.inference_mode(), watching(model, names) as outputs:
        for images in batches:
            model(images)
            for name, output in outputs.items():
                seen[name].add(rows_of(model.get_submodule(name), output))
    for name, moments in seen.items():
        if moments.count:
            replace_layers(model, {name: _normed(model.get_submodule(name), moments)})


def balance(model: nn.Module, size: float = 2**0.5) -> None:
    """Scale the weights before each norm from `insert_norms`, in place, so that the filters' norms have a mean of `size`.

    The network computes the same, and one learning rate then suits all layers: before a norm, the effect of a step grows with
    the inverse square of the size of the weights.
    """
    for both in model.modules():
        if isinstance(both, Normed):
            layer, norm = both  # type: Any, Any
            factor = size / float(weight_of(layer).flatten(1).norm(dim=1).mean().clamp(min=1e-12))
            set_weight(layer, weight_of(layer) * factor)
            norm.running_mean *= factor
            norm.running_var *= factor**2
            norm.eps *= factor**2


def absorb_norms(model: nn.Module) -> None:
    """Fold every norm from `insert_norms` back into its layer, in place."""
    for name, both in list(model.named_modules()):
        if isinstance(both, Normed):
            scale_outputs(both[0], *affine(both[1]))  # type: ignore[arg-type]
            replace_layers(model, {name: both[0]})


def _normed(layer: Any, moments: Moments) -> Normed:
    kind = RowNorm if isinstance(layer, nn.Linear) else _NORMS[len(layer.kernel_size)]
    mean, var = (values.to(layer.weight.data) for values in (moments.mean(), moments.std().square()))
    norm = kind(len(mean)).to(layer.weight.data)
    norm.running_mean, norm.running_var = mean.clone(), var
    if layer.bias is not None:
        norm.running_mean -= layer.bias.data
        layer.bias = None
    norm.weight.data, norm.bias.data = (var + norm.eps).sqrt(), mean
    return Normed(layer, norm).train(layer.training)
