"""Low-rank changes of weights, which are trained instead of the weights and merged into them afterwards.

Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv 2312.15230. The authors' public code is
for language models: rank 16, changes scaled by 2, AdamW; here rank 8, no scale, SGD. ScaleLoRA and the layer-wise
reconstruction are not implemented. A mask preserves zeros, but a network that lost whole channels has none.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from intrafusion.training.recovery.layers import lone_layers


class LowRank(nn.Module):
    """Low-rank change `B A` added to a weight (n, ...): A (r, m) starts random and B (n, r) zero, so nothing changes at first.

    mask: the weights that may change, in the weight's shape; None: all.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator, mask: Tensor | None = None):
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        rank = min(rank, rows, columns)
        start = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.A = nn.Parameter(start.to(weight))
        self.B = nn.Parameter(weight.new_zeros(rows, rank))
        self.register_buffer("mask", mask, persistent=False)
        self.mask: Tensor | None

    def forward(self, weight: Tensor) -> Tensor:
        change = (self.B @ self.A).view_as(weight)
        return weight + (change if self.mask is None else change * self.mask)


def add_low_rank(model: nn.Module, rank: int, seed: int = 0, masked: bool = False) -> list[nn.Parameter]:
    """Give each convolution and linear layer a low-rank change, in place; return the parameters to train.

    masked: weights that are zero stay zero (MaskLoRA). Convolutions may be of any kind. Weights that several modules share, or
    that are computed from others, are left alone.
    """
    generator, learning = torch.Generator().manual_seed(seed), []
    layer: Any
    for layer in lone_layers(model, _ConvNd, nn.Linear).values():
        weight = layer.weight.data
        change = LowRank(weight, rank, generator, (weight != 0).to(weight) if masked else None)
        parametrize.register_parametrization(layer, "weight", change)
        learning += [change.A, change.B]
    return learning


def merge_low_rank(model: nn.Module) -> nn.Module:
    """Merge the low-rank changes into the weights, in place; return the model."""
    layer: Any
    for layer in model.modules():
        if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations["weight"][0], LowRank):
            parametrize.remove_parametrizations(layer, "weight")
    return model
