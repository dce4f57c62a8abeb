"""Interpolation: channels are samples of a smooth function of their index, and are resampled at fewer places.

Runkel et al., arXiv 2505.24469; reconstructed from the abstract.
"""

import torch
from torch import Tensor, nn

from intrafusion._registry import MERGES
from intrafusion.pruning.groups.group import Group
from intrafusion.pruning.merge.drop_and_fusion import apply
from intrafusion.pruning.transport.planning import TransportPlan


@MERGES.register(
    "interpolation",
    "fewer, evenly spaced channels, interpolated between neighbours; for weights trained to be smooth",
    "Runkel et al., arXiv 2505.24469",
    transports=False,
    reconstructed="from the abstract",
)
def interpolate(model: nn.Module, group: Group, plan: TransportPlan) -> Tensor:
    T = torch.zeros_like(plan.matrix)
    for block in group.block.unique():
        columns = (group.block == block).nonzero()[:, 0]
        rows = (group.block[plan.kept] == block).nonzero()[:, 0]
        T[rows[:, None], columns] = interpolation(len(columns), len(rows)).to(T)
    share = len(T) / T.shape[1]
    return apply(model, group, T, plan.kept, readers=T / share)  # readers now sum over fewer channels


def interpolation(n: int, count: int) -> Tensor:
    """Return the matrix (count, n), float64, that interpolates n values linearly at `count` even places; rows sum to one."""
    at = torch.linspace(0, n - 1, count, dtype=torch.float64) if count > 1 else torch.tensor([(n - 1) / 2]).double()
    low = at.floor().long().clamp(max=max(n - 2, 0))
    share = at - low
    matrix = torch.zeros(count, n, dtype=torch.float64)
    matrix[torch.arange(count), low] = 1 - share
    if n > 1:
        matrix[torch.arange(count), low + 1] += share
    return matrix
