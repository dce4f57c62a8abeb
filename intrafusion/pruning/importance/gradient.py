"""Criteria computed from the gradient of the loss at the weights, on labelled images.

Folding a norm multiplies weights by s and divides their gradients by s. The product stays the same, so nothing is folded here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.conv import _ConvNd

from intrafusion._registry import CRITERIA
from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError, is_out_of_memory, one_line
from intrafusion.pruning.groups.feature_maps import examined, normalised
from intrafusion.pruning.groups.group import Group, Layer
from intrafusion.pruning.importance.reduce import mean_over_layers, sum_of_weights
from intrafusion.runtime.devices import doubled

_PER_SAMPLE = 1 << 26  # maximum number of gradient values held at once


@CRITERIA.register(
    "taylor",
    "first-order change of the loss for each weight separately: sum of |w dL/dw|",
    "Molchanov et al., CVPR 2019",
    "labels",
    differs="gradients are summed over the calibration images (the code of Intra-Fusion: over five training batches)",
)
def taylor(model: nn.Module, group: Group, data: ImageData, generator: torch.Generator) -> Tensor:
    return mean_over_layers(sum_of_weights(layer, change.abs()) for layer, change in _first_order(model, group, data))


@CRITERIA.register(
    "taylor_sum",
    "first-order change of the loss for all weights together: |sum of w dL/dw|",
    "Molchanov et al., CVPR 2019",
    "labels",
)
def taylor_sum(model: nn.Module, group: Group, data: ImageData, generator: torch.Generator) -> Tensor:
    return mean_over_layers(sum_of_weights(layer, change).abs() for layer, change in _first_order(model, group, data))


@CRITERIA.register(
    "obd",
    "second-order change of the loss, with the diagonal Fisher matrix: sum of w^2 E[g^2]",
    "LeCun et al., NeurIPS 1989",
    "labels",
)
def obd(model: nn.Module, group: Group, data: ImageData, generator: torch.Generator) -> Tensor:
    twin, data = examined(model), data.labelled()
    layers = [(layer, f"{layer.name}.weight") for layer in _weighted(twin, group)]
    weights = {name: twin.get_parameter(name).detach() for _, name in layers}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(twin, weights, image[None]), label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    most = max(1, _PER_SAMPLE // sum(weight.numel() for weight in weights.values()))
    fisher: dict[str, Tensor] = {}
    for images, labels in normalised(twin, data, most):
        try:
            per_image = gradients(weights, images, labels)
        except RuntimeError as error:  # vmap cannot follow every forward, for example one that branches on values
            raise IntrafusionError(f"obd cannot compute this network's gradients per image: {one_line(error)}") from error
        for name, per_sample in per_image.items():
            fisher[name] = fisher.get(name, 0) + doubled(per_sample.square().sum(0))
    return mean_over_layers(
        sum_of_weights(layer, doubled(weights[name]).square() * fisher[name] / len(data)) for layer, name in layers
    )


@contextmanager
def differentiating() -> Iterator[None]:
    """Raise IntrafusionError if gradients cannot be computed, for example if the network modifies needed values in place."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise IntrafusionError(
            f"cannot compute this network's gradients ({one_line(error)}); choose a method without gradients, such as "
            "criterion l1"
        ) from error


def _weighted(model: nn.Module, group: Group) -> list[Layer]:
    """Return the group's convolutions and linear layers; norms are left out because they only scale."""
    return [layer for layer in group.layers if isinstance(model.get_submodule(layer.name), _ConvNd | nn.Linear)]


def _first_order(model: nn.Module, group: Group, data: ImageData) -> list[tuple[Layer, Tensor]]:
    """Return, for each layer, w * dL/dw in its weight's shape, where L is the mean cross-entropy over all images."""
    twin, data = examined(model), data.labelled()
    layers = _weighted(twin, group)
    weights = [twin.get_parameter(f"{layer.name}.weight").requires_grad_() for layer in layers]
    with torch.enable_grad(), differentiating():
        for images, labels in normalised(twin, data):
            (F.cross_entropy(twin(images), labels, reduction="sum") / len(data)).backward()
    return [(layer, weight.detach() * cast(Tensor, weight.grad)) for layer, weight in zip(layers, weights, strict=True)]
