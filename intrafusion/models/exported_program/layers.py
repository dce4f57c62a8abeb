"""The layers of programs, as numbers of a description, with a rule per layer for its input and output shapes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.models.architectures import PadShortcut
from intrafusion.models.exported_program.operators import OPERATORS
from intrafusion.models.exported_program.operators.normalization import normed
from intrafusion.models.exported_program.operators.table import StepOutput
from intrafusion.models.exported_program.shapes import Shape, at, total

_MOST = 1 << 24  # limit on any number of a layer
_FRACTIONS = ("eps", "momentum")
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Kind:
    """A kind of layer: its numbers, its tensors, and which tensors it may lack (all of them or none)."""

    make: type[nn.Module]
    numbers: tuple[str, ...]
    optional: tuple[str, ...]
    rule: Callable[[Any, Shape], StepOutput]
    tensors: tuple[str, ...] = ()


def _conv(layer: nn.Conv2d, x: Shape) -> StepOutput:
    numbers = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return OPERATORS["conv2d"].made((x, _shape(layer.weight), _shape(layer.bias), *numbers))


def _linear(layer: nn.Linear, x: Shape) -> StepOutput:
    return OPERATORS["linear"].made((x, _shape(layer.weight), _shape(layer.bias)))


def _shape(tensor: Tensor | None) -> Shape | None:
    return None if tensor is None else Shape(tuple(tensor.shape))


def _norm(ranks: tuple[int, ...]) -> Callable[[Any, Shape], StepOutput]:
    return lambda layer, x: StepOutput((normed(x, layer.num_features, ranks),))


def _pad(layer: PadShortcut, x: Shape) -> StepOutput:
    if len(x.sizes) != 4 or x.sizes[1] != layer.channels:
        raise IntrafusionError(f"it pads {x} as if it had {layer.channels} channels")
    batch, channels, *sides = x.sizes
    thin = [-(-at(side, 1) // layer.stride) for side in sides]
    return StepOutput((Shape((batch, total(channels, layer.before + layer.after), *thin)),))


_STATISTICS = ("running_mean", "running_var")
KINDS = {
    "Conv2d": Kind(nn.Conv2d, _CONV, ("bias",), _conv, ("weight",)),
    "Linear": Kind(nn.Linear, ("in_features", "out_features"), ("bias",), _linear, ("weight",)),
    "BatchNorm1d": Kind(
        nn.BatchNorm1d, ("num_features", "eps", "momentum"), ("weight", "bias"), _norm((2, 3)), _STATISTICS
    ),
    "BatchNorm2d": Kind(nn.BatchNorm2d, ("num_features", "eps", "momentum"), ("weight", "bias"), _norm((4,)), _STATISTICS),
    "PadShortcut": Kind(PadShortcut, ("channels", "before", "after", "stride"), (), _pad),
}  # fmt: skip


def layer_described(layer: nn.Module) -> dict[str, Any]:
    """Describe a layer as a JSON-serialisable table of its numbers."""
    name = type(layer).__name__
    kind = KINDS[name]
    numbers = {number: getattr(layer, number) for number in kind.numbers}
    told = {number: list(value) if isinstance(value, tuple) else value for number, value in numbers.items()}
    whole = {"whole": getattr(layer, kind.optional[0]) is not None} if kind.optional else {}
    return {"kind": name, **told, **whole}


def layer_built(path: str, described: Any, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the layer of a description, with its tensors. Return it and the names of the tensors.

    Raises IntrafusionError if the description is invalid.
    """
    kind = KINDS.get(str(described.get("kind"))) if isinstance(described, Mapping) else None
    if kind is None or not all(map(_makes_sense, described, described.values())):
        raise IntrafusionError(f"its layer {path} is invalid")
    numbers = {name: tuple(one) if isinstance(one, list) else one for name, one in described.items()}
    del numbers["kind"]
    whole = {"affine" if len(kind.optional) > 1 else "bias": numbers.pop("whole", None) is True} if kind.optional else {}
    if {*numbers} != {*kind.numbers}:
        raise IntrafusionError(f"its layer {path} has missing or unknown settings")
    try:
        with torch.device("meta"):
            layer = kind.make(**numbers, **whole)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        raise IntrafusionError(f"its layer {path} is invalid: {one_line(error)}") from error
    names = (*kind.tensors, *(kind.optional if any(whole.values()) else ()))
    for name in names:
        tensor, place = tensors.get(f"{path}.{name}"), getattr(layer, name)
        if tensor is None or tensor.shape != place.shape or tensor.dtype != torch.float32:
            has = "none" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise IntrafusionError(f"the {name} of its layer {path} must be float32 of shape {tuple(place.shape)}, not {has}")
        register_tensor(layer, name, tensor, isinstance(place, nn.Parameter))
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        layer.num_batches_tracked = torch.tensor(0)
    return layer, names


def _makes_sense(name: str, value: Any) -> bool:
    if isinstance(value, list):
        return len(value) == 2 and all(type(one) is int and 0 <= one <= _MOST for one in value)
    if name in ("kind", "padding"):
        return isinstance(value, str)
    return type(value) in ((int, float) if name in _FRACTIONS else (int, bool)) and 0 <= value <= _MOST


def layer_made(layer: nn.Module, x: Shape) -> StepOutput:
    """Apply a layer's rule to an input shape. Raises IntrafusionError if the layer does not accept it."""
    return KINDS[type(layer).__name__].rule(layer, x)


def register_tensor(module: nn.Module, name: str, tensor: Tensor, learns: bool) -> None:
    if learns:
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(name, tensor)
