"""Linear over-parameterization: each layer becomes a product of three layers for training, and a single layer afterwards.

Qian et al., "Boosting Pruned Networks with Linear Over-parameterization", arXiv 2204.11444. The ratio, the initialisation and
the schedule are reconstructed.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.fx.sharing import replace_layers
from intrafusion.training.recovery.layers import lone_layers

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # subclasses may use their weights in other ways


class Widened(nn.Sequential):
    """A layer as the product of three layers, `C B A`, with no nonlinearity between: m -> p -> q -> n channels.

    A and C are 1x1; B has the layer's kernel, stride and padding; the bias is C's. In a grouped layer each group has its
    own three factors. weight, bias: those of the single layer, for networks that read them directly.
    """

    @property
    def weight(self) -> Tensor:
        return _product(*self)

    @property
    def bias(self) -> Tensor | None:
        return self[2].bias  # type: ignore[return-value]


def expand(model: nn.Module, ratio: float = 2.0, seed: int = 0) -> nn.Module:
    """Return a copy of a network in which every convolution and linear layer is a product of three; it computes the same.

    Transposed convolutions, subclasses and layers that share their weight are left alone. ratio: number of channels between the
    factors, relative to the layer's own. The initialisation is exact: A has orthonormal columns and C orthonormal rows, drawn
    by `seed`, and B = C^T W A^T at each tap. Raises IntrafusionError for a ratio below 1 or not finite.

    Examples
    --------
    >>> import intrafusion as itf
    >>> model = itf.load_model("digits-mlp")
    >>> wide = itf.expand(model, ratio=2)
    >>> sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in model.parameters())
    True
    >>> itf.size(itf.contract(wide), model.card.example()) == itf.size(model, model.card.example())
    True
    """
    if not 1 <= ratio < float("inf"):
        raise IntrafusionError(f"ratio must be a number of at least 1, not {ratio!r}")
    wide, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for name, layer in lone_layers(wide, *_KINDS).items():
        if type(layer) in _KINDS:
            wide = _put(wide, name, _widened(layer, ratio, generator))
    return wide


def contract(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in which each product from `expand` is one layer of its old shape: W = C B A, in float64."""
    small = copy.deepcopy(model)
    for name, layer in list(small.named_modules()):
        if isinstance(layer, Widened):
            small = _put(small, name, _contracted(layer))
    return small


def _put(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Put a layer at this place, which may be the model itself; return the model."""
    if not name:
        return layer
    replace_layers(model, {name: layer})
    return model


def _widened(layer: Any, ratio: float, generator: torch.Generator) -> Widened:
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    weight = layer.weight.data.cpu().double()
    taps = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)  # (g, n, m, h w)
    _, n, m, _ = taps.shape
    p, q = max(m, round(ratio * m)), max(n, round(ratio * n))
    A = torch.stack([_orthonormal(p, m, generator) for _ in range(groups)])  # (g, p, m)
    C = torch.stack([_orthonormal(q, n, generator).T for _ in range(groups)])  # (g, n, q)
    B = torch.einsum("gnq,gnmt,gpm->gqpt", C, taps, A)
    bias = layer.bias is not None
    factors: list[Any]
    if isinstance(layer, nn.Linear):
        factors = [nn.Linear(m, p, bias=False), nn.Linear(p, q, bias=False), nn.Linear(q, n, bias=bias)]
    else:
        factors = [
            type(layer)(groups * m, groups * p, 1, groups=groups, bias=False),
            type(layer)(
                groups * p,
                groups * q,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                layer.dilation,
                groups,
                False,
                layer.padding_mode,
            ),
            type(layer)(groups * q, groups * n, 1, groups=groups, bias=bias),
        ]
    for factor, values in zip(factors, (A, B, C), strict=True):
        factor.weight.data = values.reshape(factor.weight.shape).to(layer.weight.dtype)
    if layer.bias is not None:
        factors[2].bias.data = layer.bias.data.clone()
    return Widened(*factors).to(layer.weight.device).train(layer.training)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a matrix with orthonormal columns, float64, from the QR decomposition of a Gaussian one."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def _contracted(wide: Widened) -> nn.Module:
    first, middle, last = wide  # type: Any, Any, Any
    if isinstance(middle, nn.Linear):
        layer: Any = nn.Linear(first.in_features, last.out_features, last.bias is not None)
    else:
        layer = type(middle)(
            first.in_channels,
            last.out_channels,
            middle.kernel_size,
            middle.stride,
            middle.padding,
            middle.dilation,
            middle.groups,
            last.bias is not None,
            middle.padding_mode,
        )
    A, B, C = (copy.deepcopy(factor).cpu() for factor in wide)
    layer.weight.data = _product(A, B, C, torch.float64).detach().to(middle.weight.dtype)
    if last.bias is not None:
        layer.bias.data = last.bias.data.clone()
    return layer.to(middle.weight.device).train(wide.training)


def _product(first: Any, middle: Any, last: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Compute `C B A` in the shape of the layer's weight, in precision `dtype` if given."""
    groups = getattr(middle, "groups", 1)
    A, B, C = (
        factor.weight.to(dtype or factor.weight.dtype).reshape(groups, -1, factor.weight.shape[1], factor.weight[0, 0].numel())
        for factor in (first, middle, last)
    )
    product = torch.einsum("gnq,gqpt,gpm->gnmt", C[..., 0], B, A[..., 0])
    return product.reshape(len(last.weight), first.weight.shape[1], *middle.weight.shape[2:])
