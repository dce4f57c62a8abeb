"""Folding every BatchNorm into the layer before it: `w' = w gamma / sqrt(var + eps)`, exactly, so outputs do not change."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.channels import Group
from intrafusion.groups import find_groups


def affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as `scale * x + shift`: float64 (n,) each."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(var + norm.eps)
    if norm.affine:
        scale = scale * norm.weight.data.double()
    shift = -mean * scale
    return scale, shift + norm.bias.data.double() if norm.affine else shift


@dataclass(frozen=True)
class Norm:
    """A BatchNorm in eval mode, `gamma (x - mean) / std + beta`: float64 (n,) each, on the CPU."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    std: Tensor

    @property
    def factor(self) -> Tensor:
        """What folding multiplied the weights by; 1 where that was 0, and they are lost."""
        factor = self.gamma / self.std
        return torch.where(factor == 0, 1.0, factor)


def norm_of(layer: nn.Module) -> Norm | None:
    """The BatchNorm that was folded into a layer, as long as the layer's channels are those of then."""
    numbers = getattr(layer, "folded_norm", None)
    return None if numbers is None else Norm(*numbers.cpu())


def _numbers(norm: _BatchNorm) -> Tensor:
    """float64 (4, n), the fields of Norm."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, std = norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()
    gamma, beta = (norm.weight.data.double(), norm.bias.data.double()) if norm.affine else (mean * 0 + 1, mean * 0)
    return torch.stack([gamma, beta, mean, std])


def folded_tensors(model: nn.Module, name: str, norm: str | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of layer `name` with BatchNorm `norm` folded in (float64); unchanged where it is folded already."""
    module: Any = model.get_submodule(name)
    weight = module.weight.data.double()
    bias = None if module.bias is None else module.bias.data.double()
    bn = model.get_submodule(norm) if norm else None
    if not isinstance(bn, _BatchNorm):
        return weight, bias
    scale, shift = affine(bn)
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift if bias is None else bias * scale + shift


def fold(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of `model` with every BatchNorm that follows a layer directly folded into it.

    example: one input, float (1, C, H, W). Norms that follow a sum or a concatenation stay.
    """
    folded = copy.deepcopy(model)
    fold_groups(folded, find_groups(model, example))
    return folded


def fold_groups(model: nn.Module, groups: Iterable[Group]) -> None:
    """Fold the norms of these groups' layers, in place."""
    for name, norm in {layer.name: layer.norm for group in groups for layer in group.layers if layer.norm}.items():
        module: Any = model.get_submodule(name)
        bn = model.get_submodule(norm)
        if not isinstance(bn, _BatchNorm):
            continue
        weight, bias = folded_tensors(model, name, norm)
        assert bias is not None
        learns, dtype = module.weight.requires_grad, module.weight.dtype
        module.weight = nn.Parameter(weight.to(dtype), requires_grad=learns)
        module.bias = nn.Parameter(bias.to(dtype), requires_grad=learns)
        if bn.affine:  # the bn_scale criterion still asks for it
            module.register_buffer("folded_gamma", bn.weight.data.clone(), persistent=False)
        module.register_buffer("folded_norm", _numbers(bn), persistent=False)
        model.set_submodule(norm, nn.Identity())
