"""Losses that compare a student with a teacher: outputs (distillation) and similarities between images (similarity)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

_TEMPERATURE = 4.0


def image_similarity(features: Tensor) -> Tensor:
    """Compute the similarities of a batch of images by a layer's features: G = Q Q^T with rows of length one, (b, b).

    features: (b, ...), the layer's output for each image. Tung & Mori, ICCV 2019.
    """
    rows = features.flatten(1).float()
    return F.normalize(rows @ rows.T, dim=1)


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the similarities of images by two layers' features: `||G_T - G_S||_F^2 / b^2`, a scalar.

    student, teacher: features (b, ...) of the same b images in the same order. The loss does not change when features are
    scaled or rotated, so the layers may differ in channels. Tung and Mori, ICCV 2019.

    Examples
    --------
    >>> import torch
    >>> import intrafusion as itf
    >>> features = torch.randn(8, 16)
    >>> rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    >>> bool(itf.similarity_loss(3 * features @ rotation, features) < 1e-6)
    True
    """
    return (image_similarity(student) - image_similarity(teacher)).square().sum() / len(student) ** 2


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = _TEMPERATURE) -> Tensor:
    """Compute the Kullback-Leibler divergence of the student's softened outputs from the teacher's.

    student, teacher: logits (b, classes). The divergence is in nats, times the squared temperature.
    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    ours, theirs = (F.log_softmax(logits.float() / temperature, 1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def stages(model: nn.Module, example: Tensor) -> list[str]:
    """Return the dotted names of the last layer at each feature map size in a network, in their order.

    example: one input, float (1, C, H, W). The layer that gives the logits is not included, unless it is the only layer.
    """
    layers = [name for name, layer in model.named_modules() if isinstance(layer, _ConvNd | nn.Linear)]
    with torch.no_grad(), watching(model, layers) as seen:
        model(example)
    sizes = {name: _size(model.get_submodule(name), output) for name, output in seen.items()}
    names = list(sizes)[:-1] or list(sizes)
    if all(size == () for size in sizes.values()):  # no feature maps: each layer is a stage
        return names
    last = {sizes[name]: name for name in names}
    return [name for name in names if name in last.values()]


def _size(layer: nn.Module, output: Tensor) -> tuple[int, ...]:
    """Return the size of a layer's output maps, without the axes of images and channels (last for a linear layer)."""
    return tuple(output.shape[1:-1] if isinstance(layer, nn.Linear) else output.shape[2:])


@contextmanager
def watching(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record, while open, the outputs of these layers in every forward pass, by name."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, output)
        )
        for name in layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
