"""Batches of labelled images whose activations fit in memory."""

from collections.abc import Iterator

from torch import Tensor, nn

from intrafusion.data.datasets import ImageData
from intrafusion.models.exported_program import Program
from intrafusion.runtime.devices import CPU

_MEMORY, _DEVICE_MEMORY = 512 << 20, 8 << 30  # bytes of the tensors that a program computes from one batch: CPU, GPU


def batches_for(model: nn.Module, data: ImageData, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator over successive (images, labels) batches of `data`.

    The batch size suits the device and the network, and is at most `most`.
    """
    taken = max((module.plan.image_bytes for module in model.modules() if isinstance(module, Program)), default=0)
    if taken:
        fit = max(1, (_MEMORY if data.images.device == CPU else _DEVICE_MEMORY) // taken)
        most = fit if most is None else min(most, fit)
    return data.batches(most)
