"""What a group's channels carry: the feature maps that its consumers read, batch by batch.

A channel is seen where the next layers read it, after the nonlinearity, whatever the network does in between; that place
exists for every prunable group of every network.
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
    """All that was asked for has been read: the rest of the network need not run."""


def private(model: nn.Module) -> nn.Module:
    """A copy that hooks and gradients may touch while others run the model; its activations are not done in place."""
    made = twin(model).requires_grad_(False)
    for module in made.modules():
        if getattr(module, "inplace", False):  # scripted modules refuse to be given what they have
            module.inplace = False  # type: ignore[assignment]
    return made


def examined(model: nn.Module) -> nn.Module:
    """`private`, in float32 where the weights are of 16 bits: what is read off it has no more rounding than need be."""
    made = private(model)
    return made.float() if kind_of(made) in (torch.float16, torch.bfloat16) else made


def normalised(model: nn.Module, data: ImageData, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """`data` as the model wants it: (B, C, H, W) in its number type and labels (B,), at most `most` at once, on its device."""
    card = card_for(model, data)
    device = next(model.parameters()).device
    for images, labels in batches_for(model, data, most):
        checkpoint()
        yield inputs_for(model, normalise(images.to(device), card.mean, card.std)), labels.to(device)


def consumers(group: Group) -> list[Layer]:
    """The layers that read the group's channels."""
    return group.role(CONSUMER)


def maps_of(model: nn.Module, layer: Layer, read: Tensor) -> Tensor:
    """The group's channels in what `layer` reads: (B, n, h, w), zero where it holds none.

    read: (B, C, H, W), or (B, ..., C) for a linear layer. A channel that a flatten spread over m inputs is a square map
    again where m is one, else a single row; so are tokens.
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
    """While open, every forward pass of `model` leaves what each consumer of the group read, by layer name."""
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
    """For each batch of `data`, the maps (B, n, h, w) that each consumer reads. The model itself is not touched."""
    twin, layers = examined(model), {layer.name for layer in consumers(group)}

    def stop(module: nn.Module, inputs: tuple) -> None:
        if layers <= read.keys():
            raise _Enough

    with reading(twin, group) as read:
        for name in layers:
            twin.get_submodule(name).register_forward_pre_hook(stop)
        for images, _ in normalised(twin, data):
            read.clear()
            # inference mode is left before the yield, or it would hold in the caller's loop too
            with torch.inference_mode(), suppress(_Enough):
                twin(images)
            with torch.inference_mode():
                maps = [(layer, maps_of(twin, layer, read[layer.name])) for layer in consumers(group)]
            yield maps
