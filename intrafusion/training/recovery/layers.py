"""Layers that can be replaced by others while a network is trained."""

from collections import Counter

from torch import nn


def lone_layers(model: nn.Module, *kinds: type[nn.Module]) -> dict[str, nn.Module]:
    """Return, by dotted name, the layers of some kinds that have a weight and share no parameter with another module."""
    held = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, kinds)
        and layer._parameters.get("weight") is not None
        and all(held[id(p)] == 1 for p in layer.parameters(recurse=False))
    }
