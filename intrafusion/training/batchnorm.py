"""Channel statistics of networks that training or averaging has left without valid ones."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from intrafusion.runtime.devices import doubled


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorms that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def measure_norms(model: nn.Module, batches: Iterable[Tensor], parameters: Mapping[str, Tensor] | None = None) -> None:
    """Set every BatchNorm's statistics to the mean over batches of inputs, (B, C, H, W) each, in place.

    parameters: parameters, by name, of another network of this shape, to measure the statistics of that network. All other
    layers run in eval mode, and the model is left in eval mode. Without BatchNorm, only the mode changes.
    """
    if norms_of(model):
        with measured(model), torch.no_grad():
            for images in batches:
                functional_call(model, dict(parameters or {}), images)
    model.eval()


@contextmanager
def measured(model: nn.Module) -> Iterator[None]:
    """Let every BatchNorm, while open, average the statistics of all batches; all other layers run in eval mode."""
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
    """Restore, in place, the statistics that an average of networks has lost (REPAIR, Jordan et al., ICLR 2023).

    Every BatchNorm is measured again. The outputs of every convolution and linear layer are scaled and shifted, channel by
    channel, so that their mean and deviation are the averages of the members' means and deviations. members: the averaged
    networks, with aligned channels. batches: inputs, (B, C, H, W) each, of two images or more. normed: names of layers to leave
    alone, because only a BatchNorm reads them. All networks are left in eval mode.
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
    """Forward hook that collects statistics of a layer's outputs, and gives each batch the statistics `wanted`, if any.

    `wanted` and `statistics` are the mean and the standard deviation of each channel: float64 (2, C).
    """

    wanted: Tensor | None = None
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        channel = -1 if isinstance(layer, nn.Linear) else 1
        values = output.movedim(channel, -1)
        var, mean = torch.var_mean(doubled(values.flatten(0, -2)), 0, correction=0)
        self.seen.append(torch.stack([mean, var]))
        if self.wanted is None:
            return None
        scale, shift = _correction(torch.stack([mean, var.sqrt()]), self.wanted)
        return (doubled(values) * scale + shift).to(output).movedim(-1, channel)

    def statistics(self) -> Tensor:
        mean, var = torch.stack(self.seen).mean(0)
        return torch.stack([mean, var.sqrt()])


def _run(model: nn.Module, hooks: dict[str, _Outputs], batches: Iterable[Tensor]) -> dict[str, _Outputs]:
    """Run all batches through the model with hooks on layers, by name; return the hooks of the layers that ran."""
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
    """Return the scale and shift (C,) that turn the statistics `now` into `wanted`; constant channels are only shifted."""
    mean, std = now
    scale = torch.where(std > 1e-6 * (1 + mean.abs()), wanted[1] / std, 1.0)
    return scale, wanted[0] - scale * mean


def _transform(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Scale and shift a layer's outputs by changing its weight and bias; a layer without a bias gets one."""
    now, weight = layer.weight, doubled(layer.weight.data)
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, ...), group after group
        rows = scale.view(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1).flatten(0, 1)
        factor = rows.view(*rows.shape, *[1] * (weight.ndim - 2))
    else:
        factor = scale.view(-1, *[1] * (weight.ndim - 1))
    bias = shift if layer.bias is None else doubled(layer.bias.data) * scale + shift
    layer.weight.data = (weight * factor).to(now)
    layer.bias = nn.Parameter(bias.to(now), requires_grad=now.requires_grad)
