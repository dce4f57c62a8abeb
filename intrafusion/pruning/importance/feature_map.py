"""Criteria computed from feature maps, as the next layers read them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion._registry import CRITERIA
from intrafusion.data.datasets import ImageData
from intrafusion.pruning.groups.channel_vectors import channel_vectors
from intrafusion.pruning.groups.feature_maps import (
    consumers,
    examined,
    feature_maps,
    maps_of,
    normalised,
    private,
    reading,
)
from intrafusion.pruning.groups.group import Group, Layer
from intrafusion.pruning.importance.reduce import mean_over_images
from intrafusion.runtime.cancellation import checkpoint
from intrafusion.runtime.devices import doubled, float64_device

_GRAMS = 1 << 24  # maximum number of Gram matrix values held at once


@CRITERIA.register(
    "chip",
    "decrease of the nuclear norm of an image's feature maps when the channel is set to zero",
    "Sui et al., NeurIPS 2021",
    "images",
)
def chip(model: nn.Module, group: Group, data: ImageData, generator: torch.Generator) -> Tensor:
    return mean_over_images(group, feature_maps(model, group, data), nuclear_losses)


@CRITERIA.register("hrank", "mean rank of the channel's feature map", "Lin et al., CVPR 2020", "images")
def hrank(model: nn.Module, group: Group, data: ImageData, generator: torch.Generator) -> Tensor:
    # keep the maps' dtype, which sets the tolerance: in a wider one, their rounding would count as rank
    def ranks(maps: Tensor) -> Tensor:
        return torch.linalg.matrix_rank(maps.to(float64_device(maps.device)))

    return mean_over_images(group, feature_maps(model, group, data), ranks)


@CRITERIA.register(
    "relative",
    "share of the channel in the sums of the next neurons",
    "Hussien et al., arXiv 2410.16151",
    "images",
    reconstructed="from the abstract",
    differs="only the share in a neuron's sum, over a channel's weights; the paper's blind range of activations and its "
    "training regulariser are omitted",
)
def relative(model: nn.Module, group: Group, data: ImageData, generator: torch.Generator) -> Tensor:
    return mean_over_images(group, _contributions(model, group, data), lambda shares: shares.sum((2, 3)))


def nuclear_losses(maps: Tensor) -> Tensor:
    """Compute the loss of nuclear norm when row j is zeroed in each image's matrix, channels x pixels.

    maps: (B, c, h, w). Returns float64 (B, c). The singular values are the square roots of the eigenvalues of the Gram matrix
    on the smaller side, computed for many images and rows at once.
    """
    rows = doubled(maps.flatten(2))
    channels, pixels = rows.shape[1:]
    grams = rows @ rows.mT if channels <= pixels else rows.mT @ rows
    whole = _nuclear_norm(grams)
    losses = torch.zeros_like(rows[:, :, 0])  # stays zero for dead channels
    for pairs in rows.any(2).nonzero().split(max(1, _GRAMS // grams[0].numel())):
        checkpoint()
        image, channel = pairs.unbind(1)
        without, each = grams[image], torch.arange(len(pairs), device=rows.device)
        if channels <= pixels:
            without[each, channel] = 0
            without[each, :, channel] = 0
        else:
            row = rows[image, channel]
            without -= row[:, :, None] * row[:, None, :]
        losses[image, channel] = whole[image] - _nuclear_norm(without)
    return losses.clamp(min=0)  # negative only by rounding: removing a row never increases the norm


def _nuclear_norm(grams: Tensor) -> Tensor:
    """Return the sums of singular values (...,) of matrices, from their Gram matrices (..., s, s)."""
    return torch.linalg.eigvalsh(grams).clamp(min=0).sqrt().sum(-1)


def _contributions(model: nn.Module, group: Group, data: ImageData) -> Iterator[list[tuple[Layer, Tensor]]]:
    """Yield, per batch, the share of each input value in each consumer's sums: (B, n, h, w), mean over output positions."""
    twin = examined(model)
    magnitudes = {layer: _magnitudes(twin.get_submodule(layer.name)) for layer in consumers(group)}
    with reading(twin, group) as read:
        for images, _ in normalised(twin, data):
            twin(images)
            yield [
                (layer, maps_of(twin, layer, _shares(magnitude, read[layer.name]))) for layer, magnitude in magnitudes.items()
            ]


def _magnitudes(module: nn.Module) -> nn.Module:
    """Return a copy of the layer with absolute weights and no bias."""
    magnitude: Any = private(module)
    magnitude.weight.data.abs_()
    magnitude.bias = None
    return magnitude


def _shares(magnitude: nn.Module, inputs: Tensor) -> Tensor:
    """Compute |x_i| sum_o |w_oi| / D_o, D_o = sum_m |w_om x_m|, in the inputs' shape.

    This is |x_i| times the slope of sum_o log D_o.
    """
    inputs = inputs.abs().requires_grad_()
    with torch.enable_grad():
        sums = magnitude(inputs)
    (slopes,) = torch.autograd.grad(sums, inputs, torch.where(sums > 0, 1 / sums, 0))
    outputs = len(magnitude.get_parameter("weight"))
    return inputs.detach() * slopes * (outputs / sums[0].numel())


@CRITERIA.register(
    "greedy",
    "greedy selection: each step keeps the channel that explains most of the next layers' outputs not explained so far",
    "after Luo et al. (ThiNet), ICCV 2017; Chee et al., NeurIPS 2022",
    "images",
    differs="forward column selection; ours: over all layers that read a channel, each normalised",
)
def greedy(model: nn.Module, group: Group, data: ImageData, generator: torch.Generator) -> Tensor:
    sums: dict[Layer, Tensor] = {}
    for batch in feature_maps(model, group, data):
        for layer, maps in batch:
            rows = maps.permute(0, 2, 3, 1).flatten(0, 2)  # (samples, n)
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            rows = doubled(rows)
            sums[layer] = sums.get(layer, 0) + rows.T @ rows
    residuals, weights, written = [], [], dict(channel_vectors(model, group))
    for layer, moments in sums.items():
        gram = moments[:-1, :-1] - moments[-1, :-1].outer(moments[-1, :-1]) / moments[-1, -1]
        columns = written[layer].to(gram.device)  # (n, m)
        residuals.append(gram / (columns.T @ gram @ columns).trace().clamp(min=1e-30))
        weights.append(columns)
    return _order(residuals, weights)


def _order(residuals: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Return scores (n,) by greedy forward selection: the earlier a channel is chosen, the larger its score.

    residuals: for each reader, the Gram matrix (n, n) of what the chosen channels leave unexplained. weights: for each reader,
    (n, m).
    """
    scores = torch.zeros(len(residuals[0]), dtype=torch.float64, device=residuals[0].device)
    floors = [1e-4 * E.diagonal().clone() for E in residuals]  # a channel with a smaller residual counts as explained
    for rank in range(len(scores), 0, -1):
        checkpoint()
        gain = torch.zeros_like(scores)
        for E, W, floor in zip(residuals, weights, floors, strict=True):
            own = E.diagonal()
            gain += torch.where(own > floor, (E @ W).square().sum(1) / own.clamp(min=1e-300), 0.0)
        gain = gain.masked_fill(scores > 0, -1)
        if not gain.max() > 1e-6:  # all channels together explain a total of 1 for each reader
            break
        best = int((gain >= 0.9999 * gain.max()).nonzero()[0])  # the first of equal gains, whatever their rounding
        scores[best] = rank
        for E, floor in zip(residuals, floors, strict=True):
            if E[best, best] > floor[best]:
                E -= E[best].outer(E[best]) / E[best, best].clone()
    return scores
