"""What a student learns from a teacher: its answers (distillation), and which images look alike to it (similarity)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

_TEMPERATURE = 4.0


def image_similarity(features: Tensor) -> Tensor:
    """How alike the images of a batch look to a layer: G = Q Q^T with rows of length one, (b, b).

    features: (b, ...), what the layer makes of each image. Tung & Mori, ICCV 2019.
    """
    rows = features.flatten(1).float()
    return F.normalize(rows @ rows.T, dim=1)


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare which images look alike to two layers: `||G_T - G_S||_F^2 / b^2`, a scalar.

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
    """Kullback-Leibler divergence of the student's softened answers from the teacher's, times the squared temperature.

    student, teacher: logits (b, classes). Nats. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    ours, theirs = (F.log_softmax(logits.float() / temperature, 1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def stages(model: nn.Module, example: Tensor) -> list[str]:
    """The last layer at each size that images shrink to inside a network, by dotted name, in their order.

    example: one input, float (1, C, H, W). The layer that gives the logits is none of them.
    """
    layers = [name for name, layer in model.named_modules() if isinstance(layer, _ConvNd | nn.Linear)]
    with torch.no_grad(), watching(model, layers) as seen:
        model(example)
    sizes = {name: _size(model.get_submodule(name), output) for name, output in seen.items()}
    names = list(sizes)[:-1] or list(sizes)
    if all(size == () for size in sizes.values()):  # no pictures: each layer is a stage
        return names
    last = {sizes[name]: name for name in names}
    return [name for name in names if name in last.values()]


def _size(layer: nn.Module, output: Tensor) -> tuple[int, ...]:
    """Of the maps that a layer writes: without images and channels, which are last behind a linear layer."""
    return tuple(output.shape[1:-1] if isinstance(layer, nn.Linear) else output.shape[2:])


@contextmanager
def watching(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass leaves what these layers write, by name."""
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
