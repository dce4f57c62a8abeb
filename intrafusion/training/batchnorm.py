"""Statistics of networks that training has left, or averaging has made, without statistics of their own."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms with statistics of their own."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def measure_norms(model: nn.Module, batches: Iterable[Tensor], parameters: Mapping[str, Tensor] | None = None) -> None:
    """Set every BatchNorm's statistics to the mean ones of some batches of inputs, (B, C, H, W) each, in place.

    parameters: by name, those of another network of this shape whose statistics they shall be. All else runs as in eval
    mode, as which the model is left. Nothing happens without BatchNorm.
    """
    if norms_of(model):
        with measured(model), torch.no_grad():
            for images in batches:
                functional_call(model, dict(parameters or {}), images)
    model.eval()


@contextmanager
def measured(model: nn.Module) -> Iterator[None]:
    """While open, every BatchNorm takes the plain mean of the statistics of all batches, and all else runs in eval mode."""
    norms = norms_of(model)
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()


def restate(fused: nn.Module, members: Sequence[nn.Module], batches: Sequence[Tensor], normed: Container[str] = ()) -> None:
    """Give an average of networks the statistics that averaging took from it, in place (REPAIR, Jordan et al., ICLR 2023).

    Every BatchNorm is measured again. Every convolution and linear layer is scaled and shifted, channel by channel, so that
    its outputs have the mean of the members' means and of their deviations. members: whose channels are aligned. batches:
    inputs, (B, C, H, W) each, of two images or more. normed: names of layers that are left as they are, because nothing but
    a BatchNorm reads them. All networks are left in eval mode.
    """
    layers = [name for name, layer in fused.named_modules() if isinstance(layer, _ConvNd | nn.Linear)]
    names = [name for name in layers if name not in normed]
    seen = [_run(member.eval(), {name: _Outputs() for name in names}, batches) for member in members]
    wanted = {name: torch.stack([outputs[name].statistics() for outputs in seen]).mean(0) for name in seen[0]}
    with measured(fused):
        found = _run(fused, {name: _Outputs(wanted[name]) for name in wanted}, batches)
    for name, outputs in found.items():
        _transform(fused.get_submodule(name), *_correction(outputs.statistics(), wanted[name]))


@dataclass(eq=False)
class _Outputs:
    """A forward hook that sums up a layer's outputs, and changes each batch of them to the statistics `wanted`, if any.

    Statistics are the mean and the standard deviation of each channel: float64 (2, C).
    """

    wanted: Tensor | None = None
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        channel = -1 if isinstance(layer, nn.Linear) else 1
        values = output.movedim(channel, -1)
        var, mean = torch.var_mean(values.flatten(0, -2).double(), 0, correction=0)
        self.seen.append(torch.stack([mean, var]))
        if self.wanted is None:
            return None
        scale, shift = _correction(torch.stack([mean, var.sqrt()]), self.wanted)
        return (values * scale + shift).to(output.dtype).movedim(-1, channel)

    def statistics(self) -> Tensor:
        mean, var = torch.stack(self.seen).mean(0)
        return torch.stack([mean, var.sqrt()])


def _run(model: nn.Module, hooks: dict[str, _Outputs], batches: Iterable[Tensor]) -> dict[str, _Outputs]:
    """The hooks, by the names of their layers, once all batches went through the model; not those of layers that never ran."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        with torch.no_grad():
            for images in batches:
                model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: hook for name, hook in hooks.items() if hook.seen}


def _correction(now: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) each from statistics to others; a channel that does not vary is shifted alone."""
    mean, std = now
    scale = torch.where(std > 1e-6 * (1 + mean.abs()), wanted[1] / std, 1.0)
    return scale, wanted[0] - scale * mean


def _transform(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Scale and shift a layer's outputs by its weight and its bias, which it is given where it has none."""
    weight = layer.weight.data
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, ...), group after group
        rows = scale.view(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1).flatten(0, 1)
        factor = rows.view(*rows.shape, *[1] * (weight.ndim - 2))
    else:
        factor = scale.view(-1, *[1] * (weight.ndim - 1))
    learns = layer.weight.requires_grad
    bias = shift if layer.bias is None else layer.bias.data * scale + shift
    layer.weight.data = (weight * factor).to(weight.dtype)
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=learns)
