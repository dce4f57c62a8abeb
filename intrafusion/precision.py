"""In which numbers a network is evaluated: fp32, or bf16 where the hardware multiplies it faster."""

from collections.abc import Collection

import torch
from torch import nn

from intrafusion.errors import IntrafusionError
from intrafusion.twins import leaves, twin

PRECISIONS = ("exact", "fast")
TOLERANCE = 0.002  # how far bf16 may move the dense accuracy


def has_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bf16 numbers in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def check_bf16(device: torch.device) -> None:
    """Raises IntrafusionError where precision "fast" would not be fast."""
    if not has_bf16(device):
        raise IntrafusionError(f"precision fast needs bf16 instructions, which {device} lacks: choose precision exact")


def check_accuracy(exact: float, fast: float) -> None:
    """Raises IntrafusionError where bf16 moves the dense accuracy (fractions) by more than 0.2 point."""
    if abs(exact - fast) > TOLERANCE:
        raise IntrafusionError(
            f"precision fast is refused: bf16 moves the dense accuracy from {exact:.2%} to {fast:.2%}, by more than "
            f"{100 * TOLERANCE:.1f} point; choose precision exact"
        )


def low(model: nn.Module, like: nn.Module | None = None, changed: Collection[str] = ()) -> nn.Module:
    """A copy of `model` with bf16 weights, channels last.

    like: such a copy of another network, whose layers serve where the two do not differ: everywhere but in `changed`.
    """
    shared = {} if like is None else {name: layer for name, layer in leaves(like).items() if name not in changed}
    return twin(model, shared).to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
