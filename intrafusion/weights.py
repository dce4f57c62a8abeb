"""Weights files: read without running code, and checked before they touch a network."""

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError, one_line

_SUFFIXES = (".safetensors", ".pt", ".pth", ".th")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a weights file, without running any code in it; unwrapped and stripped of "module." prefixes.

    Floats of 16 and 64 bits come as float32.

    Raises IntrafusionError for a missing, damaged or non-finite file, or one that holds no state dict.
    """
    if not os.path.isfile(path):
        raise IntrafusionError(
            f"no weights file at {path}: check the path, or leave weights out for the embedded model"
        )
    if path.suffix not in _SUFFIXES:
        raise IntrafusionError(f"{path} is no weights file: it must end in {', '.join(_SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            raw: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickles that are refused below
                raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise IntrafusionError(
            f"{path} cannot be loaded safely (it is damaged, or wants to run code): save it as a plain state dict"
        ) from error
    except Exception as error:  # damaged files fail in many ways, in three libraries
        if isinstance(error, MemoryError):
            raise
        raise IntrafusionError(f"{path} cannot be read as weights: {one_line(error)}") from error
    for key in ("state_dict", "model", "net"):
        if isinstance(raw, Mapping) and isinstance(raw.get(key), Mapping):
            raw = raw[key]
    if not isinstance(raw, Mapping) or not raw or not all(isinstance(v, Tensor) for v in raw.values()):
        raise IntrafusionError(f"{path} holds no state dict (names to tensors)")
    state = {str(k).removeprefix("module."): v for k, v in raw.items()}
    odd = [k for k, v in state.items() if not _is_plain(v)]
    if odd:
        raise IntrafusionError(
            f"{path} holds {odd[0]} as no plain tensor of numbers on the CPU: save it as a plain state dict"
        )
    odd = [k for k, v in state.items() if v.is_complex() or (v.is_floating_point() and v.dtype not in _FLOATS)]
    if odd:
        kind = str(state[odd[0]].dtype).removeprefix("torch.")
        raise IntrafusionError(f"{path} holds {odd[0]} as {kind}: save it as float32, float16, bfloat16 or float64")
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise IntrafusionError(
            f"{path} holds NaN or infinite weights in {bad[0]}: it is damaged or diverged in training"
        )
    return state


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds each of its numbers: one of a few bytes can claim any shape."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= max(tensor.untyped_storage().nbytes(), 1 << 20)


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the spellings that public CIFAR ResNets use for the head and the shortcut to ours."""
    renamed = {}
    for key, value in state.items():
        key = key.replace(".downsample.", ".shortcut.")
        renamed["linear." + key[3:] if key.startswith("fc.") else key] = value
    return renamed


def load_state(model: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or shapes:
        first = (
            f"lacks {missing[0]}" if missing
            else f"has {extra[0]} too many" if extra
            else f"{shapes[0]} is {tuple(state[shapes[0]].shape)} where {tuple(own[shapes[0]].shape)} is needed"
        )  # fmt: skip
        raise IntrafusionError(
            f"{path} does not fit {name}: it {first} ({len(missing)} missing, {len(extra)} extra, {len(shapes)} misshapen)"
        )
    whole = [k for k in own if own[k].is_floating_point() and not state[k].is_floating_point()]
    if whole:
        kind = str(state[whole[0]].dtype).removeprefix("torch.")
        raise IntrafusionError(
            f"{path} holds {whole[0]} as {kind}, whole numbers that no scale belongs to: save floats"
        )
    model.load_state_dict(state, strict=False)
