"""Accuracy with its confidence interval, and the size of a network."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intrafusion.data.datasets import ImageData, normalise
from intrafusion.errors import IntrafusionError
from intrafusion.evaluation.macs import count_macs
from intrafusion.models.batching import batches_for
from intrafusion.models.card import card_for
from intrafusion.models.fx.sharing import with_plain_weights
from intrafusion.models.precision import inputs_for
from intrafusion.runtime.devices import device_of, float32_without_tf32


@dataclass(frozen=True)
class Evaluation:
    """The accuracy of a network on a set of images.

    accuracy: fraction correct; interval: Wilson's 95 % interval; count: images; correct: bool (count,), in data order.
    unlabelled: number of images without a label, which are not counted.
    """

    accuracy: float
    interval: tuple[float, float]
    count: int
    correct: Tensor
    unlabelled: int = 0


def wilson(successes: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion (95 % by default), each end a fraction in [0, 1] (Wilson 1927)."""
    if not 0 <= successes <= count or count < 1:
        raise IntrafusionError(f"cannot compute an interval for {successes} successes of {count}")
    share, shrink = successes / count, 1 + z * z / count
    centre = (share + z * z / (2 * count)) / shrink
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Size:
    """Size and cost of a network.

    params: number of parameters. macs: multiply-accumulates of one forward pass on one image. left_out: operators that macs
    does not count, such as "mkldnn_rnn_layer in LSTM".
    """

    params: int
    macs: int
    left_out: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What macs does not count, as text; "" if nothing."""
        return f"MACs leave out {', '.join(self.left_out)}" if self.left_out else ""


def size(model: nn.Module, example: Tensor) -> Size:
    """Count the parameters and multiply-accumulates of `model`: half the floating-point operations of torch's own counter.

    example: inputs, float (B, C, H, W). The first one is run on a copy, in eval mode and in the network's dtype. Convolutions
    and matrix products count wherever they occur: in layers, attention or functions.
    """
    counted = count_macs(model, example)
    return Size(sum(p.numel() for p in model.parameters()), sum(counted.layers.values()), tuple(counted.left_out))


def layer_sizes(model: nn.Module, example: Tensor) -> dict[str, Size]:
    """Return the size of each layer that multiplies, by dotted name; they add up to the network's. example: see `size`.

    Multiplications in a module's own forward, outside its child layers, count for that module, as in attention. Weights that
    are computed on each pass are materialised first.
    """
    counted = count_macs(with_plain_weights(model), example)
    return {
        name: Size(sum(p.numel() for p in counted.network.get_submodule(name).parameters(recurse=False)), macs)
        for name, macs in counted.layers.items()
    }


def evaluate(model: nn.Module, data: ImageData, limit: int | None = 2000, seed: int = 0) -> Evaluation:
    """Measure the top-1 accuracy of a network on labelled images.

    The images are moved to the model's device as uint8, and normalised there with its card. The model's mode is kept. limit:
    most images, the same ones for the same seed and in the proportions of the classes; None for all. Raises IntrafusionError if
    the model has no card, if its input or classes do not fit the data, or if there are no labels.

    Examples
    --------
    >>> import intrafusion as itf
    >>> result = itf.evaluate(itf.load_model("digits-mlp"), itf.load_data("digits"))
    >>> result.count, result.accuracy > 0.9
    (597, True)
    """
    card, whole = card_for(model, data), len(data)
    data = data.labelled()
    unlabelled = whole - len(data)
    data = data.subset(limit, seed).to(device_of(model))
    correct = predictions(model, data, card.mean, card.std) == data.labels
    hits = int(correct.sum())
    return Evaluation(hits / len(data), wilson(hits, len(data)), len(data), correct.cpu(), unlabelled)


def stratified(labels: Tensor, seed: int = 0) -> Tensor:
    """Return an order of the images, int64 (N,), in which every prefix has the class proportions, to within one image.

    labels: int64 (N,). `seed` determines the order within a class.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    _, classes, sizes = labels[order].unique(return_inverse=True, return_counts=True)
    by_class = classes.argsort(stable=True)
    rank = torch.empty(len(labels), dtype=torch.float64)
    rank[by_class] = torch.cat([(torch.arange(size) + 0.5) / size for size in sizes.tolist()]).double()
    return order[rank.argsort(stable=True)]


def predictions(model: nn.Module, data: ImageData, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return predicted labels, int64 (N,), on the model's device."""
    return _run(model, data, mean, std, lambda out: out.argmax(1))


def logits(model: nn.Module, data: ImageData) -> Tensor:
    """Return the model's logits for every image of `data`: float (N, classes), on its device."""
    card = card_for(model, data)
    return _run(model, data, card.mean, card.std, lambda out: out)


@float32_without_tf32()
def _run(
    model: nn.Module, data: ImageData, mean: Sequence[float], std: Sequence[float], keep: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply `keep` to the logits of every image, in batches, in eval mode; restore the model's mode."""
    with in_eval(model), torch.inference_mode():
        batches = (
            inputs_for(model, normalise(images, mean, std)) for images, _ in batches_for(model, data.to(device_of(model)))
        )
        return torch.cat([keep(model(inputs)) for inputs in batches])


@contextmanager
def in_eval(*models: nn.Module) -> Iterator[None]:
    """Within this block, put these networks in eval mode; restore the mode of each of their modules afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
