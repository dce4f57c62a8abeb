"""BatchNorm put back behind layers into which it was folded, for as long as a network is trained."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.merge.regression import Moments
from intrafusion.norms import affine
from intrafusion.recover.teach import watching


class Normed(nn.Sequential):
    """A layer and the norm behind it."""


def insert_norms(model: nn.Module, layers: Iterable[str], batches: Iterable[Tensor]) -> None:
    """Put a BatchNorm behind each of these convolutions and linear layers, in place; in eval mode nothing changes.

    batches: inputs, float (B, C, H, W), on which the layers' means and deviations are measured: the norms' statistics, and
    their shifts and scales. The layers' biases become part of them.
    """
    names = list(layers)
    seen = {name: Moments() for name in names}
    with torch.inference_mode(), watching(model, names) as outputs:
        for images in batches:
            model(images)
            for name, output in outputs.items():
                seen[name].add(output.movedim(1, -1).flatten(0, -2))
    for name, moments in seen.items():
        model.set_submodule(name, _normed(model.get_submodule(name), moments))


def balance(model: nn.Module, size: float = 2**0.5) -> None:
    """Scale the weights before each norm that `insert_norms` put in so that filters have a mean norm of `size`, in place.

    The network computes the same, and one learning rate moves all layers alike: behind a norm a step counts by the square
    of how small the weights are.
    """
    for both in model.modules():
        if isinstance(both, Normed):
            layer, norm = both  # type: Any, Any
            factor = size / float(layer.weight.data.flatten(1).norm(dim=1).mean().clamp(min=1e-12))
            layer.weight.data *= factor
            norm.running_mean *= factor
            norm.running_var *= factor**2
            norm.eps *= factor**2


def absorb_norms(model: nn.Module) -> None:
    """Fold every norm that `insert_norms` put into a network back into its layer, in place."""
    for name, both in list(model.named_modules()):
        if isinstance(both, Normed):
            layer: Any = both[0]
            scale, shift = affine(both[1])  # type: ignore[arg-type]
            weight = layer.weight.data.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
            layer.weight.data = weight.to(layer.weight.dtype)
            bias = 0 if layer.bias is None else layer.bias.data.double()
            layer.bias = nn.Parameter((scale * bias + shift).to(layer.weight.dtype), requires_grad=False)
            model.set_submodule(name, layer)


def _normed(layer: Any, moments: Moments) -> Normed:
    mean, var = moments.mean().float(), moments.std().square().float()
    kind = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
    norm = kind(len(mean), device=mean.device)
    norm.running_mean, norm.running_var = mean.clone(), var
    if layer.bias is not None:
        norm.running_mean -= layer.bias.data
        layer.bias = None
    norm.weight.data, norm.bias.data = (var + norm.eps).sqrt(), mean
    return Normed(layer, norm).train(layer.training)
