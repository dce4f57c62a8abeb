"""BatchNorm statistics of networks that training has left, or made, with those of others."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms with statistics of their own."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def measure_norms(model: nn.Module, batches: Iterable[Tensor], parameters: Mapping[str, Tensor] | None = None) -> None:
    """Set every BatchNorm's statistics to the mean ones of some batches of inputs, (B, C, H, W) each, in place.

    parameters: by name, those of another network of this shape whose statistics they shall be. All else runs as in eval
    mode, as which the model is left. Nothing happens without BatchNorm.
    """
    norms = norms_of(model)
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()
    try:
        with torch.no_grad():
            for images in batches if norms else ():
                functional_call(model, dict(parameters or {}), images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
