"""Producers that are not run again: what a merge makes of their channels is linear, so it can be done to their outputs.

Where a pruned layer's weights are combinations of the dense layer's, `W' = M W`, and both read the same, its outputs are
the same combinations of the dense outputs, which are known: a 1x1 convolution in place of the whole one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from intrafusion.models.fx.fuse_relu import is_plain
from intrafusion.models.fx.sharing import replaced

_PAYS = 4  # how many times the multiplications of the 1x1 convolution the layer's own must be
_EXACT = 1e-6  # of the weights' norm: how far M W may be from W'


def remixed(dense: nn.Module, network: nn.Module, names: Iterable[str]) -> tuple[nn.Module, frozenset[str]]:
    """`network` with those of the layers `names` that allow it replaced by what makes their outputs of the dense ones'.

    names: layers that read the same in both networks. No names come back where nothing is gained.
    """
    found = {name: mix for name in names if (mix := _mix(dense.get_submodule(name), network.get_submodule(name)))}
    return replaced(network, found) if found else network, frozenset(found)


def _mix(dense: nn.Module, layer: nn.Module) -> nn.Conv2d | None:
    """The 1x1 convolution that makes a layer's outputs of the dense layer's."""
    if not is_plain(dense) or not is_plain(layer) or max(dense.groups, layer.groups) > 1:
        return None
    if dense.weight.shape[1:] != layer.weight.shape[1:] or dense.weight[0].numel() < _PAYS * dense.out_channels:
        return None
    whole, small = _rows(dense), _rows(layer)
    if whole.shape[1] != small.shape[1]:
        return None
    try:
        combinations = torch.linalg.lstsq(whole.T, small.T).solution.T  # (k, n)
    except torch.linalg.LinAlgError:  # dead channels
        return None
    if not (combinations @ whole - small).norm() <= _EXACT * small.norm():
        return None
    mix = nn.Conv2d(len(whole), len(small), 1, bias=False, device="meta")
    weight = combinations.to(layer.weight.dtype)[:, :, None, None]
    mix.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    return mix


def _rows(layer: nn.Conv2d) -> Tensor:
    """One row an output channel: weights, and the bias where there is one. float64 (n, m)."""
    weight = layer.weight.detach().double().flatten(1)
    return weight if layer.bias is None else torch.cat([weight, layer.bias.detach().double()[:, None]], 1)
