"""BatchNorm statistics of a network that training has left, or made, with those of another."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def measure_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set every BatchNorm's statistics to the mean ones of some batches of inputs, (B, C, H, W) each, in place.

    All else runs as in eval mode, as which the model is left.
    """
    model.eval()
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()
    try:
        with torch.no_grad():
            for images in batches:
                model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
