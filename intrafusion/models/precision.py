"""Evaluation precision: a network's own dtype, or bf16 where the hardware computes it faster."""

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.fx.sharing import leaves, replaced

PRECISIONS = ("exact", "fast")
TOLERANCE = 0.002  # the largest change in dense accuracy that bf16 may cause


def kind_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of a network's weights, or float32 if it has none. Raises IntrafusionError if there are several."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(kinds) > 1:
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise IntrafusionError(f"the network has weights of {names}; convert them to one dtype, such as with model.float()")
    return kinds.pop() if kinds else torch.float32


def inputs_for(model: nn.Module, images: Tensor) -> Tensor:
    """Cast normalised images to the dtype of a network's weights. Raises IntrafusionError if there are several."""
    return images.to(kind_of(model))


def has_bf16(device: torch.device) -> bool:
    """Return whether this device has bf16 multiplication in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def check_bf16(device: torch.device) -> None:
    """Raise IntrafusionError if precision "fast" would not be faster on this device."""
    if not has_bf16(device):
        raise IntrafusionError(f"precision fast needs bf16 instructions, which {device} does not have; choose precision exact")


def check_accuracy(exact: float, fast: float) -> None:
    """Raise IntrafusionError if bf16 changes the dense accuracy (a fraction) by more than 0.2 points."""
    if abs(exact - fast) > TOLERANCE:
        raise IntrafusionError(
            f"precision fast is not accurate enough: bf16 changes the dense accuracy from {exact:.2%} to {fast:.2%}, by more "
            f"than {100 * TOLERANCE:.1f} points; choose precision exact"
        )


def low(model: nn.Module, like: nn.Module | None = None, changed: Collection[str] = ()) -> nn.Module:
    """Return a copy of `model` with bf16 weights in channels-last format.

    like: such a copy of another network. Its layers are reused except those in `changed`, where the two networks differ.
    """
    layers = leaves(model)
    places = [layer for _, layer in model.named_modules(remove_duplicate=False) if not any(True for _ in layer.children())]
    simple = sum(len(list(layer.parameters())) for layer in places) == len(list(model.parameters()))
    if like is None or not simple:  # a layer is used in two places, or a parameter belongs to no leaf layer
        return _low(copy.deepcopy(model))
    theirs = leaves(like)
    return replaced(model, {name: _low(copy.deepcopy(layers[name])) if name in changed else theirs[name] for name in layers})


def _low(module: nn.Module) -> nn.Module:
    return module.to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
