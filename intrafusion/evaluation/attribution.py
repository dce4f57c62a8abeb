"""What one channel responds to: which images, and which of their pixels (by Captum).

A channel is observed where the first layer that contains it reads it, after the nonlinearity. Its activation is the mean of
that map over positions.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intrafusion.data.datasets import ImageData, normalise
from intrafusion.errors import IntrafusionError, check_choice
from intrafusion.models.card import card_of
from intrafusion.models.precision import inputs_for
from intrafusion.pruning.groups.feature_maps import consumers, examined, feature_maps, maps_of, reading
from intrafusion.pruning.groups.group import Group, Layer
from intrafusion.pruning.importance.deeplift import separated
from intrafusion.pruning.importance.gradient import differentiating

STEPS = 50  # steps of the integral
_PIXELS = 1 << 18  # pixels of all steps computed at once


@dataclass(frozen=True)
class AttributionMethod:
    """A way to attribute a channel's activation to pixels.

    explainer: Captum's class. summary: the meaning of a pixel's value. relus: whether it is the gradient except at ReLUs.
    """

    explainer: str
    summary: str
    paper: str
    relus: bool = False


METHODS = {
    "integrated-gradients": AttributionMethod(
        "NeuronIntegratedGradients",
        "how much each pixel contributes to the activation along the path from the mean pixel to this image",
        "Sundararajan et al., ICML 2017",
    ),
    "gradient": AttributionMethod(
        "NeuronGradient",
        "how much the activation would rise if the pixel became a little brighter",
        "Simonyan et al., 2014",
    ),
    "guided-backprop": AttributionMethod(
        "NeuronGuidedBackprop",
        "the gradient along paths that only raise the activation: sharp, but it also shows edges with little effect on the "
        "channel",
        "Springenberg et al., 2015",
        relus=True,
    ),
    "deconvolution": AttributionMethod(
        "NeuronDeconvolution",
        "the activation propagated back to the image with only positive signals kept: it shows the pattern, not the evidence",
        "Zeiler & Fergus, ECCV 2014",
        relus=True,
    ),
}


@dataclass(frozen=True, eq=False)
class Attribution:
    """The effect of one image on a channel.

    pixels: float32 (C, H, W), each pixel's share by the method. map: float32 (h, w), where the channel is active. activation:
    the map's mean; baseline: the activation of an image of mean pixels.
    """

    pixels: Tensor
    map: Tensor
    activation: float
    baseline: float


def first_reader(group: Group, channel: int) -> Layer:
    """Return the first layer that reads `channel`."""
    return next(layer for layer in consumers(group) if layer.present()[channel])


def activations_of_channels(model: nn.Module, group: Group, data: ImageData) -> Iterator[Tensor]:
    """Yield the activation of each of the group's n channels on each image, batch by batch: float32 (B, n) on the CPU."""
    for batch in feature_maps(model, group, data):
        values = torch.zeros(len(batch[0][1]), group.size)
        for layer, maps in reversed(batch):  # the first reader is written last, so its values win
            values[:, layer.present()] = maps[:, layer.present()].mean((2, 3)).float().cpu()
        yield values


def top_images(activation: Tensor, count: int) -> list[int]:
    """Return the images with the largest of the activations (N,), at most `count`, largest first."""
    return activation.argsort(descending=True, stable=True)[:count].tolist()


def channel_attribution(
    model: nn.Module, group: Group, channel: int, image: Tensor, method: str = "integrated-gradients"
) -> Attribution:
    """Attribute the activation of `channel` to the pixels of `image`, uint8 (C, H, W), without changing the model.

    method: one of METHODS; its baseline, if it needs one, is the mean pixel. Raises IntrafusionError for an unknown method, and
    for one that changes ReLUs if the network has none that can be found.
    """
    import captum.attr

    check_choice("attribution method", method, tuple(METHODS))
    chosen, layer, card = METHODS[method], first_reader(group, channel), card_of(model)
    twin = _with_relus(model, method) if chosen.relus else examined(model)
    pixels = inputs_for(twin, normalise(image[None].to(next(model.parameters()).device), card.mean, card.std))

    def activation(read: Tensor) -> Tensor:
        return maps_of(twin, layer, read)[:, channel].mean((1, 2))

    with reading(twin, group) as read, torch.no_grad():
        twin(torch.cat([pixels, torch.zeros_like(pixels)]))
        seen = maps_of(twin, layer, read[layer.name])[:, channel].cpu()
    options = {}
    if chosen.explainer == "NeuronIntegratedGradients":
        options = {"n_steps": STEPS, "internal_batch_size": max(1, _PIXELS // pixels[0, 0].numel())}
    with torch.enable_grad(), differentiating(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum warns that it sets hooks and removes them afterwards
        attributed = getattr(captum.attr, chosen.explainer)(twin, twin.get_submodule(layer.name)).attribute(
            pixels.requires_grad_(), activation, attribute_to_neuron_input=True, **options
        )
    return Attribution(attributed[0].detach().float().cpu(), seen[0].float(), float(seen[0].mean()), float(seen[1].mean()))


def _with_relus(model: nn.Module, method: str) -> nn.Module:
    """Return a copy of `model` in which every ReLU is its own module: Captum changes gradients only there."""
    try:
        twin = separated(model)
    except IntrafusionError as error:
        raise IntrafusionError(f"{method} needs a network that torch.fx can trace; choose gradient") from error
    if not any(isinstance(module, nn.ReLU) for module in twin.modules()):
        raise IntrafusionError(f"{method} changes the gradients of ReLUs, but this network has none; choose gradient")
    return twin
