"""Labelled images in batches whose numbers fit into memory within a network."""

from collections.abc import Iterator

from torch import Tensor, nn

from intrafusion.data.datasets import ImageData
from intrafusion.models.exported_program import Program

_MEMORY, _CUDA_MEMORY = 512 << 20, 8 << 30  # bytes of what a program makes of a batch


def batches_for(model: nn.Module, data: ImageData, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Successive (images, labels) of `data`: as many at once as suit the device and the network, and no more than `most`."""
    taken = max((module.plan.image_bytes for module in model.modules() if isinstance(module, Program)), default=0)
    if taken:
        fit = max(1, (_CUDA_MEMORY if data.images.device.type == "cuda" else _MEMORY) // taken)
        most = fit if most is None else min(most, fit)
    return data.batches(most)
