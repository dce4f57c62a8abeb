"""Reuse a pruned layer's dense outputs: the merge is linear, so apply it to the outputs.

If a pruned layer's weights are combinations of the dense layer's, `W' = M W`, and both layers have the same input, the pruned
outputs are the same combinations of the known dense outputs. A 1x1 convolution then replaces the whole layer.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from intrafusion.models.fx.fuse_relu import is_plain
from intrafusion.models.fx.sharing import replaced
from intrafusion.runtime.devices import doubled

_PAYS = 4  # least ratio of the layer's multiplications to those of the 1x1 convolution
_EXACT = 1e-6  # largest deviation of M W from W', relative to the norm of W'


def remixed(dense: nn.Module, network: nn.Module, names: Iterable[str]) -> tuple[nn.Module, frozenset[str]]:
    """Replace those of the layers `names` that allow it by a 1x1 convolution of the dense layer's outputs.

    names: layers that have the same input in both networks. Returns the network and the names of the replaced layers, none if
    nothing is gained.
    """
    found = {name: mix for name in names if (mix := _mix(dense.get_submodule(name), network.get_submodule(name)))}
    return replaced(network, found) if found else network, frozenset(found)


def _mix(dense: nn.Module, layer: nn.Module) -> nn.Conv2d | None:
    """Return the 1x1 convolution that computes a layer's outputs from the dense layer's, or None."""
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
    """Return one row per output channel: weights, and the bias if there is one. float64 (n, m)."""
    weight = doubled(layer.weight.detach()).flatten(1)
    return weight if layer.bias is None else torch.cat([weight, doubled(layer.bias.detach())[:, None]], 1)
