"""Inputs and outputs of a network's layers, recorded by hooks while the whole network runs, for any code in its forward."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError, is_out_of_memory, one_line
from intrafusion.models.fx.partition import FITTED, not_once


class _Enough(BaseException):
    """Signal that stops a forward pass once the layer has run; no Exception, which the network's code might catch."""


class Calls:
    """The layers that a network calls, in their order. The values around them have names, as in `Cuts`.

    network: in eval mode, not in use elsewhere. images: some inputs, float (B, C, H, W).
    """

    def __init__(self, network: nn.Module, images: Tensor):
        self._network = network
        self._runs, two = (Counter(_calls(network, images[torch.arange(n) % len(images)])) for n in (1, 2))
        self._singly = self._runs != two  # its forward loops over the images

    def layers(self, *kinds: type[nn.Module]) -> list[str]:
        """Return the layers of these kinds that run once, in their order; by default convolutions and linear layers."""
        once = [name for name, runs in self._runs.items() if runs == 1]
        return [name for name in once if isinstance(self._network.get_submodule(name), kinds or FITTED)]

    def around(self, layer: str) -> tuple[str, str, None]:
        """Return the names of the values that a layer reads and writes. Raises IntrafusionError unless the layer runs once."""
        if self._runs[layer] != 1:
            raise not_once(layer)
        return f"input of {layer}", f"output of {layer}", None

    def batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the same images in batches on which the layers run once."""
        for batch in batches:
            yield from batch.split(1) if self._singly else (batch,)

    def heard(self, network: nn.Module, layer: str, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Run a network of the same architecture and return, by name, the values around this layer.

        names: the values needed; without the layer's output among them, the run stops before the layer. Raises
        IntrafusionError, with the layer's name, if the network does not reach the layer.
        """
        source, output, _ = self.around(layer)
        heard: dict[str, Any] = {}

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            heard[source] = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if output not in names:
                raise _Enough

        def after(module: nn.Module, args: tuple, result: Any) -> None:
            heard[output] = result
            raise _Enough

        module = network.get_submodule(layer)
        hooks = module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)
        try:
            with torch.inference_mode():
                network(images.clone())
        except _Enough:
            return heard
        except Exception as error:  # a user's forward can fail in any way
            if is_out_of_memory(error):
                raise
            raise IntrafusionError(f"cannot fit {layer}: the network fails before it: {one_line(error)}") from error
        finally:
            for hook in hooks:
                hook.remove()
        raise not_once(layer)


def _calls(network: nn.Module, images: Tensor) -> list[str]:
    """Return the names of the modules that a network calls, in the order of their calls."""
    names: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: names.append(name))
        for name, module in network.named_modules()
    ]
    try:
        with torch.inference_mode():
            network(images.clone())
    finally:
        for hook in hooks:
            hook.remove()
    return names
