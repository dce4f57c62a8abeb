"""Feature maps of a group's channels, as its consumers read them, batch by batch.

Channels are recorded at the inputs of the next layers, after the nonlinearity, whatever the network does in between. Every
prunable group of every network has such a place.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from intrafusion.data.datasets import ImageData, normalise
from intrafusion.models.batching import batches_for
from intrafusion.models.card import card_for
from intrafusion.models.fx.sharing import twin
from intrafusion.models.precision import inputs_for, kind_of
from intrafusion.pruning.groups.group import CONSUMER, Group, Layer
from intrafusion.runtime.cancellation import checkpoint


class _Enough(Exception):
    """Exception that stops a forward pass once all requested inputs are recorded."""


def private(model: nn.Module) -> nn.Module:
    """Return a copy for hooks and gradients, so that the model can run elsewhere; its activations do not work in place."""
    made = twin(model).requires_grad_(False)
    for module in made.modules():
        if getattr(module, "inplace", False):  # scripted modules reject any assignment to the attribute
            module.inplace = False  # type: ignore[assignment]
    return made


def examined(model: nn.Module) -> nn.Module:
    """Return a `private` copy, in float32 if the weights have 16 bits, so that values read from it are rounded less."""
    made = private(model)
    return made.float() if kind_of(made) in (torch.float16, torch.bfloat16) else made


def normalised(model: nn.Module, data: ImageData, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of `data` as the model expects them: images (B, C, H, W) in its dtype and labels (B,), on its device.

    most: maximum number of images in a batch; None for what suits the device and the network.
    """
    card = card_for(model, data)
    device = next(model.parameters()).device
    for images, labels in batches_for(model, data, most):
        checkpoint()
        yield inputs_for(model, normalise(images.to(device), card.mean, card.std)), labels.to(device)


def consumers(group: Group) -> list[Layer]:
    """Return the layers that read the group's channels."""
    return group.role(CONSUMER)


def maps_of(model: nn.Module, layer: Layer, read: Tensor) -> Tensor:
    """Extract the group's channels from the input of `layer`: (B, n, h, w), zero for channels that the layer does not hold.

    read: the layer's input, (B, C, H, W), or (B, ..., C) for a linear layer. A channel that a flatten spread over m inputs
    becomes a square map again if m is a square number, else a map with a single row; so do tokens.
    """
    if isinstance(model.get_submodule(layer.name), nn.Linear):
        read = read.movedim(-1, 1)
    held = layer.present().to(read.device)
    maps = read[:, layer.positions.clamp(min=0).to(read.device)]  # (B, n, m, ...)
    maps = maps * held.view(1, -1, *[1] * (maps.ndim - 2))
    if read.ndim == 4:
        return maps.flatten(2, 3)
    side = math.isqrt(layer.positions.shape[1])
    return maps.flatten(2).unflatten(2, (side, -1) if side * side == layer.positions.shape[1] else (1, -1))


@contextmanager
def reading(model: nn.Module, group: Group) -> Iterator[dict[str, Tensor]]:
    """Record, while open, the input of each consumer of the group in every forward pass of `model`, by layer name."""
    read: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda module, inputs, name=layer.name: read.__setitem__(name, inputs[0])
        )
        for layer in consumers(group)
    ]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()


def feature_maps(model: nn.Module, group: Group, data: ImageData) -> Iterator[list[tuple[Layer, Tensor]]]:
    """Yield, for each batch of `data`, the maps (B, n, h, w) that each consumer reads. The model itself is not modified."""
    twin, layers = examined(model), {layer.name for layer in consumers(group)}

    def stop(module: nn.Module, inputs: tuple) -> None:
        if layers <= read.keys():
            raise _Enough

    with reading(twin, group) as read:
        for name in layers:
            twin.get_submodule(name).register_forward_pre_hook(stop)
        for images, _ in normalised(twin, data):
            read.clear()
            # leave inference mode before the yield, or it would apply in the caller's loop too
            with torch.inference_mode(), suppress(_Enough):
                twin(images)
            with torch.inference_mode():
                maps = [(layer, maps_of(twin, layer, read[layer.name])) for layer in consumers(group)]
            yield maps
