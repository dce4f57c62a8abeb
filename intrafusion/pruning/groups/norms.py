"""Parameters of BatchNorms, and exact folding into the layer before: `w' = w gamma / sqrt(var + eps)`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.models.fx.sharing import replace_layers
from intrafusion.pruning.groups.group import Group


def _exact(tensor: Tensor) -> Tensor:
    """Return weights or statistics in float64, on the CPU."""
    return tensor.detach().cpu().double()


def affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return `scale` and `shift` of a BatchNorm in eval mode, `scale * x + shift`: float64 (n,) each, on the CPU."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = _exact(norm.running_mean), _exact(norm.running_var)
    scale = torch.rsqrt(var + norm.eps)
    if norm.affine:
        scale = scale * _exact(norm.weight)
    shift = -mean * scale
    return scale, shift + _exact(norm.bias) if norm.affine else shift


@dataclass(frozen=True)
class Norm:
    """A BatchNorm in eval mode, `gamma (x - mean) / std + beta`: float64 (n,) each, on the CPU."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    std: Tensor

    @property
    def factor(self) -> Tensor:
        """The factor by which folding multiplied the weights; 1 where it was 0 and the weights are lost."""
        factor = self.gamma / self.std
        return torch.where(factor == 0, 1.0, factor)


def norm_of(layer: nn.Module) -> Norm | None:
    """Return the BatchNorm that was folded into a layer, or None; valid while the layer still has the channels of then."""
    numbers = getattr(layer, "folded_norm", None)
    return None if numbers is None else Norm(*numbers)


def _numbers(norm: _BatchNorm) -> Tensor:
    """Return the fields of `Norm` as one float64 tensor (4, n), on the CPU."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, std = _exact(norm.running_mean), (_exact(norm.running_var) + norm.eps).sqrt()
    gamma, beta = (_exact(norm.weight), _exact(norm.bias)) if norm.affine else (mean * 0 + 1, mean * 0)
    return torch.stack([gamma, beta, mean, std])


def folded_tensors(model: nn.Module, name: str, norm: str | None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of layer `name` with BatchNorm `norm` folded in; unchanged if it is folded already.

    Both are float64, on the CPU.
    """
    module: Any = model.get_submodule(name)
    weight = _exact(module.weight)
    bias = None if module.bias is None else _exact(module.bias)
    bn = model.get_submodule(norm) if norm else None
    if not isinstance(bn, _BatchNorm):
        return weight, bias
    scale, shift = affine(bn)
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift if bias is None else bias * scale + shift


def norms_of_groups(groups: Iterable[Group]) -> dict[str, str]:
    """Return layer -> the BatchNorm that folds into it, for all layers of these groups that have one."""
    return {layer.name: layer.norm for group in groups for layer in group.layers if layer.norm}


def fold_groups(model: nn.Module, groups: Iterable[Group]) -> None:
    """Fold the norms of these groups' layers, in place."""
    fold_norms(model, norms_of_groups(groups))


def fold_norms(model: nn.Module, norms: Mapping[str, str]) -> None:
    """Fold BatchNorms in place; those that are folded already are skipped.

    norms: layer name -> name of the BatchNorm behind it.
    """
    for name, norm in norms.items():
        module: Any = model.get_submodule(name)
        bn = model.get_submodule(norm)
        if not isinstance(bn, _BatchNorm):
            continue
        weight, bias = folded_tensors(model, name, norm)
        assert bias is not None
        now, learns = module.weight, module.weight.requires_grad
        module.weight = nn.Parameter(weight.to(now.device, now.dtype), requires_grad=learns)
        module.bias = nn.Parameter(bias.to(now.device, now.dtype), requires_grad=learns)
        module.folded_norm = _numbers(bn)  # no buffers: they stay in float64, on the CPU
        if bn.affine:  # the bn_scale criterion still reads it
            module.folded_gamma = _exact(bn.weight)
        replace_layers(model, {norm: nn.Identity()})
