"""Convolutions and linear layers as matrix products: their inputs, as each output sees them, and their weights.

A layer may compute its padding in a custom forward, or use its weight in another way. So the layer is run, and the single call
that multiplies its weight is recorded: the input of that call is what the weight multiplies.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from intrafusion.runtime.devices import doubled

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True, eq=False)
class Product:
    """One run of a layer whose outputs are its weight times the inputs that each output sees, plus its bias.

    read: the input of the weight, after any padding in the layer's forward. seen: (N, g, f), the inputs that each output sees.
    f = inputs of a group x taps, in the order of `weight_of`; the N outputs are in the order of `rows_of`; g is the number of
    groups.
    """

    read: Tensor
    seen: Tensor

    def holds(self, values: Tensor) -> bool:
        """Return whether the input of the weight is these values unchanged, except for padding around them."""
        more = [ours - theirs for ours, theirs in zip(self.read.shape, values.shape, strict=False)]
        if self.read.ndim != values.ndim or min(more) < 0:
            return False
        corners = itertools.product(*(range(size + 1) for size in more))
        windows = (tuple(slice(at, at + n) for at, n in zip(corner, values.shape, strict=True)) for corner in corners)
        return any(torch.equal(self.read[window], values) for window in windows)


def product(layer: nn.Module, values: Tensor) -> Product | None:
    """Run a convolution or linear layer on `values`; None if its outputs are not its weight times them plus its bias.

    Examples of the latter are layers that standardise their weight or ignore their bias.
    """
    twin = _with_bias(layer)
    with torch.inference_mode(), _Recorder(twin.weight) as recorder:
        output = twin(values)
        if len(recorder.calls) != 1 or recorder.calls[0][-1] is not output:
            return None
        operator, (read, _, bias, *options), _ = recorder.calls[0]
        return Product(read, _seen(operator, read, layer, options)) if bias is twin.bias else None


def no_products(model: nn.Module, images: Tensor) -> set[str]:
    """Return the names of the convolutions and linear layers whose outputs are not their weight times their input.

    The input may be padded. images: some inputs of the network, (B, C, H, W). Layers that do not run are not included.
    """
    read = inputs_of(model, (_ConvNd, nn.Linear), images)
    return {name for name, values in read.items() if not _is_product(model.get_submodule(name), values)}


def inputs_of(model: nn.Module, kinds: tuple[type[nn.Module], ...], images: Tensor) -> dict[str, Any]:
    """Return, by name, the first input of the layers of some kinds that run in a forward pass on `images`.

    The hooks for this are removed afterwards.
    """
    read: dict[str, Any] = {}
    hooks = [
        layer.register_forward_pre_hook(partial(_note, read, name), with_kwargs=True)
        for name, layer in model.named_modules()
        if isinstance(layer, kinds)
    ]
    try:
        with torch.inference_mode():
            model(images.clone())  # the forward may modify them
    finally:
        for hook in hooks:
            hook.remove()
    return read


def _note(read: dict[str, Any], name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    read.setdefault(name, next(iter((*args, *kwargs.values())), None))


def _is_product(layer: nn.Module, like: Tensor) -> bool:
    values = torch.rand(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    run = product(layer, values)
    return run is not None and run.holds(values)


def coverage(layer: nn.Module, like: Tensor) -> Tensor:
    """Return the share of a constant input of one that reaches the outputs through each tap, on average: (c, taps).

    like: an input, (1, ...), with any values. The share is below one for taps that fall on zero padding at some outputs.
    """
    ones, zeros = (product(layer, make(like)) for make in (torch.ones_like, torch.zeros_like))
    assert ones is not None
    assert zeros is not None
    return (ones.seen - zeros.seen).mean((0, 1)).unflatten(0, weight_of(layer).shape[1:])


def rows_of(layer: nn.Module, values: Tensor) -> Tensor:
    """Reshape a layer's output to rows (N, C): (B, C, ...) for a convolution or norm, or (..., C) for a linear layer."""
    return (values if isinstance(layer, nn.Linear) else values.movedim(1, -1)).flatten(0, -2)


def width_of(layer: Any) -> int:
    """Return the number of channels that a convolution or linear layer writes."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def weight_of(layer: Any) -> Tensor:
    """Return a layer's weight as (o, c, taps): o outputs, c inputs of a group.

    The weight of a transposed convolution is rearranged to that of the equivalent plain convolution.
    """
    weight = layer.weight.data
    if isinstance(layer, _ConvTransposeNd):
        grouped = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
        return grouped.flip(tuple(range(2, grouped.ndim))).flatten(2)
    return weight.reshape(*weight.shape[:2], -1)


def set_weight(layer: Any, weight: Tensor) -> None:
    """Set a layer's weight, given in the shape of `weight_of`, as a new parameter, so that it is no longer shared."""
    was = layer.weight
    if isinstance(layer, _ConvTransposeNd):
        weight = weight.unflatten(2, layer.kernel_size)
        weight = weight.flip(tuple(range(2, weight.ndim))).unflatten(0, (layer.groups, -1)).transpose(1, 2)
    layer.weight = nn.Parameter(
        weight.reshape(was.shape).to(was.device, was.dtype).contiguous(), requires_grad=was.requires_grad
    )


def scale_outputs(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Change a layer's outputs y to `scale * y + shift`, channel by channel; scale and shift are (o,), float64."""
    weight = doubled(weight_of(layer))
    scale, shift = scale.to(weight.device), shift.to(weight.device)
    set_weight(layer, weight * scale[:, None, None])
    bias = 0 if layer.bias is None else doubled(layer.bias.data)
    add_bias(layer, scale * bias + shift - bias)


def add_bias(layer: Any, more: Tensor) -> None:
    """Add `more` (o,) to a layer's bias; a layer without a bias gets one."""
    learns = (layer.weight if layer.bias is None else layer.bias).requires_grad
    now = layer.weight.data.new_zeros(width_of(layer)) if layer.bias is None else layer.bias.data
    layer.bias = nn.Parameter((doubled(now) + doubled(more)).to(now), requires_grad=learns)


class _Recorder(TorchFunctionMode):
    """Recorder of each call that multiplies a weight: the function, its arguments and the result."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight, self.calls = weight, []  # type: Tensor, list[tuple[Callable, list, Tensor]]

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (F.linear, *_CONVOLUTIONS, *_TRANSPOSED):
            bound = _bound(func, args, kwargs or {})
            if bound[1] is self.weight:
                self.calls.append((func, bound, result))
        return result


def _bound(operator: Callable, args: tuple, kwargs: dict[str, Any]) -> list:
    """Return the operator's arguments in order: input, weight, bias, and a convolution's options."""
    defaults: dict[str, Any] = {"input": None, "weight": None, "bias": None}
    if operator in _CONVOLUTIONS:
        defaults |= {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    elif operator in _TRANSPOSED:
        defaults |= {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    return [*(defaults | dict(zip(defaults, args, strict=False)) | kwargs).values()]


def _with_bias(layer: Any) -> Any:
    """Return the layer with the same weight and always a bias, so that a run shows whether its forward uses one."""
    twin = copy.copy(layer)
    twin.__dict__["_parameters"] = dict(layer._parameters)
    if layer.bias is None:
        twin.bias = nn.Parameter(layer.weight.data.new_zeros(width_of(layer)), requires_grad=False)
    return twin


def _seen(operator: Callable, read: Tensor, layer: Any, options: list) -> Tensor:
    """Return the inputs that each output sees: (N, g, f)."""
    if operator is F.linear:
        return read.flatten(0, -2)[:, None]
    kernel = layer.kernel_size
    if operator in _TRANSPOSED:
        stride, padding, further, groups, dilation = options
        stride, padding, further, dilation = (_each(option, kernel) for option in (stride, padding, further, dilation))
        read = _spread(read, stride)
        edge = [step * (taps - 1) - less for step, taps, less in zip(dilation, kernel, padding, strict=True)]
        read = F.pad(read, _sides(edge, [a + b for a, b in zip(edge, further, strict=True)]))
        stride = (1,) * len(kernel)
    else:
        stride, padding, dilation, groups = options
        stride, dilation = _each(stride, kernel), _each(dilation, kernel)
        total = [step * (taps - 1) if padding == "same" else 0 for step, taps in zip(dilation, kernel, strict=True)]
        before = [size // 2 for size in total] if isinstance(padding, str) else _each(padding, kernel)
        after = [a - b for a, b in zip(total, before, strict=True)] if isinstance(padding, str) else before
        read = F.pad(read, _sides(before, after))
    for axis, (taps, step, move) in enumerate(zip(kernel, dilation, stride, strict=True), 2):
        read = read.unfold(axis, step * (taps - 1) + 1, move)[..., ::step]
    read = read.unflatten(1, (groups, -1))  # (B, g, c, *outputs, *taps)
    read = read.movedim((1, 2), (len(kernel) + 1, len(kernel) + 2))
    return read.flatten(len(kernel) + 2).flatten(0, len(kernel))


def _each(option: Any, kernel: Sequence[int]) -> tuple[int, ...]:
    """Expand an option to one number for each axis of the kernel."""
    numbers = (option,) if isinstance(option, int) else tuple(option)
    return numbers * len(kernel) if len(numbers) == 1 else numbers


def _sides(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return the padding as F.pad expects it, the last axis first."""
    return [size for sides in zip(reversed(before), reversed(after), strict=True) for size in sides]


def _spread(values: Tensor, stride: Sequence[int]) -> Tensor:
    """Put zeros between the values, so that these are `stride` apart, as a transposed convolution's kernel sees them."""
    sizes = [(size - 1) * step + 1 for size, step in zip(values.shape[2:], stride, strict=True)]
    spread = values.new_zeros(*values.shape[:2], *sizes)
    spread[(..., *[slice(None, None, step) for step in stride])] = values  # type: ignore[index]
    return spread
