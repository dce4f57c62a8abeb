"""Criteria that use Captum to attribute the true label's logit to the channels, as the next layers read them.

If a method needs a baseline, it is zero after normalisation: the mean pixel.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion._registry import CRITERIA
from intrafusion.data.datasets import ImageData
from intrafusion.pruning.groups.feature_maps import consumers, examined, maps_of, normalised
from intrafusion.pruning.groups.group import Group, Layer
from intrafusion.pruning.importance.deeplift import read_alone, separated
from intrafusion.pruning.importance.gradient import differentiating
from intrafusion.pruning.importance.reduce import mean_over_images
from intrafusion.runtime.cancellation import checkpoint

_MOST = 64  # images in a batch: a method holds several copies of each


@CRITERIA.register(
    "conductance",
    "change of the logit through the channel along the path from the mean pixel to the image",
    "Dhamdhere et al., ICLR 2019; Captum",
    "labels",
)
def conductance(model: nn.Module, group: Group, data: ImageData, generator: torch.Generator) -> Tensor:
    from captum.attr import LayerConductance

    return _mean_attribution(
        LayerConductance,
        examined(model),
        group,
        data,
        lambda images: {"n_steps": 16, "internal_batch_size": 5 * len(images)},
    )


@CRITERIA.register("activation-gradient", "activation times the gradient of the logit", "Captum", "labels")
def activation_gradient(model: nn.Module, group: Group, data: ImageData, generator: torch.Generator) -> Tensor:
    from captum.attr import LayerGradientXActivation

    return _mean_attribution(LayerGradientXActivation, examined(model), group, data)


@CRITERIA.register(
    "deep-lift",
    "contribution of the channel to the difference between the logits of the image and of the mean pixel",
    "Shrikumar et al., ICML 2017; Captum",
    "labels",
)
def deep_lift(model: nn.Module, group: Group, data: ImageData, generator: torch.Generator) -> Tensor:
    from captum.attr import LayerDeepLift

    return _mean_attribution(LayerDeepLift, separated(model), group, data)


def _mean_attribution(
    method: Any,
    twin: nn.Module,
    group: Group,
    data: ImageData,
    options: Callable[[Tensor], dict[str, int]] = lambda images: {},
) -> Tensor:
    """Return the mean over images and positions of the absolute attributions by Captum's `method`.

    twin: a copy of the network, which gets the hooks. options: further arguments of the method for a batch of images.
    """
    explainers = {layer: method(twin, twin.get_submodule(layer.name)) for layer in consumers(group)}
    for layer in explainers:
        twin.get_submodule(layer.name).register_forward_pre_hook(read_alone)

    def batches() -> Iterator[list[tuple[Layer, Tensor]]]:
        for images, labels in normalised(twin, data.labelled(), _MOST):
            asked = {"target": labels, "attribute_to_layer_input": True, **options(images)}
            images.requires_grad_()  # DeepLIFT hooks a gradient at every nonlinearity, before the layer too
            found = []
            for layer, explainer in explainers.items():
                checkpoint()  # a stream may have many readers, and each one takes as long as a batch
                with differentiating():
                    found.append((layer, maps_of(twin, layer, explainer.attribute(images, **asked))))
            yield found

    return mean_over_images(group, batches(), lambda maps: maps.abs().mean((2, 3)))
