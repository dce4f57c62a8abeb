"""State dicts: check them, match their keys with a network's, and load them into it."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.nested_state_dicts import AVERAGED, PREFIXES, state_dicts
from intrafusion.models.weights_file import check_dimensions, check_tensor_count, read_weights_file

Spelling = Callable[[str], str]  # normalises a key, to compare the keys of files with those of networks

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")  # the last part of a key
_OF_AVERAGES = ("num_updates", "initted", "step")  # whole keys
_METHODS = frozenset(dir(Tensor))
_VIEWS = 4  # tensors may take this multiple of a file's bytes; each name counts, as each may be converted separately
_NOTHING = torch.empty(0)
_MARK = "#"


class Misfit(IntrafusionError):
    """A state dict does not match the named architecture. table: the state dict, if known."""

    def __init__(self, message: str, name: str, table: Mapping[str, Any] | None = None):
        super().__init__(message)
        self.name, self.table = name, table or {}


def located(weights: str | Path) -> tuple[Path, str | None]:
    """Split FILE or FILE#KEY into the path and the key, which is None if there is none.

    If a file exists under the whole string, the whole string is the path.
    """
    path = Path(os.path.expanduser(weights))
    if _MARK not in path.name or os.path.isfile(path):
        return path, None
    file, _, key = str(path).rpartition(_MARK)
    return Path(file), key


def keyed(weights: str | Path | None, key: str | None) -> str | Path | None:
    """Return "FILE#KEY", or `weights` unchanged if `key` is None. Raises IntrafusionError for a key without a file."""
    if key is None:
        return weights
    if weights in (None, "random"):
        raise IntrafusionError("weights_key (--weights-key) needs a file; pass one as weights= (--weights)")
    return f"{weights}{_MARK}{key}"


def read_state(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read the most likely state dict in a weights file, or the one under `key`. Check it and keep its own key names.

    Floats of 16 and 64 bits are converted to float32. Raises IntrafusionError if the file is missing, damaged, contains
    non-finite numbers or holds no state dict.
    """
    table = next(iter(state_dicts(read_weights_file(path), path, key).values()))
    return checked_state({name: value for name, value in table.items() if isinstance(value, Tensor)}, path)


def stored_tensors(table: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict without any attributes that the file attached to them.

    Raises IntrafusionError if a tensor is not fully stored in the file: a file of a few bytes can claim any shape.
    """
    for name, value in table.items():
        if isinstance(value, Tensor) and (hidden := sorted(_METHODS.intersection(vars(value)))):
            raise IntrafusionError(f"{path} overrides {hidden[0]} of the tensor {name}; save only model.state_dict()")
    state = {name: Tensor.detach(value) for name, value in table.items() if isinstance(value, Tensor)}
    if odd := next((name for name, value in state.items() if not _is_plain(value)), None):
        raise IntrafusionError(f"{odd} in {path} is not a plain CPU tensor; save a plain state dict")
    check_tensor_count(len(state), path)
    for name, value in state.items():
        check_dimensions(value.ndim, name, path)
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    if sum(map(_made_bytes, state.values())) > _VIEWS * sum(storages.values()) + (1 << 20):
        raise IntrafusionError(f"tensors in {path} share too much memory; save a clone of each")
    return state


def _made_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor as a separate copy, in float32 (or wider) if it holds floats."""
    return tensor.numel() * (max(4, tensor.element_size()) if tensor.is_floating_point() else tensor.element_size())


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is a plain strided CPU tensor whose numbers are all stored."""
    if type(tensor) is not Tensor or tensor.is_nested or tensor.is_quantized:
        return False
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= max(tensor.untyped_storage().nbytes(), 1 << 20)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def checked_state(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Convert the tensors of a state dict for computation: floats become float32 and must be finite.

    Raises IntrafusionError for complex numbers, floats of another size, NaN and infinity.
    """
    state = stored_tensors(state, path)
    odd = [k for k, v in state.items() if v.is_complex() or (v.is_floating_point() and v.dtype not in _FLOATS)]
    if odd:
        raise IntrafusionError(
            f"{odd[0]} in {path} is {_kind(state[odd[0]])}; save it as float32, float16, bfloat16 or float64"
        )
    made: dict[tuple[Any, ...], Tensor] = {}  # shared tensors stay shared
    for name, value in state.items():
        if not value.is_floating_point() or _place(value) in made:
            continue
        made[_place(value)] = whole = value.float()
        if not torch.isfinite(whole).all():
            raise IntrafusionError(f"{name} in {path} has NaN or infinite values; the file is damaged, or training diverged")
    return {name: made.get(_place(value), value) for name, value in state.items()}


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def unwrapped_key(key: str) -> str:
    """Remove the parts of a key that wrappers add, as in "module.features.0.weight" or "features._orig_mod.0.weight"."""
    return ".".join(part for part in key.split(".") if part not in PREFIXES)


def cifar(key: str) -> str:
    """Convert a key from the head and shortcut names of public CIFAR ResNets to ours."""
    key = unwrapped_key(key).replace(".downsample.", ".shortcut.")
    return "linear." + key[3:] if key.startswith("fc.") else key


@dataclass(frozen=True)
class StateFit:
    """A state dict under the names of a network, and the differences between the two.

    aside: names of counters and of averaged weights. computed: names of weights that the file stores as two parts.
    """

    state: dict[str, Tensor]
    missing: list[str]
    extra: list[str]
    misshapen: list[str]
    aside: list[str]
    computed: list[str]

    def is_whole(self) -> bool:
        return not (self.missing or self.extra or self.misshapen)


def fit(model: nn.Module, state: Mapping[str, Tensor], spelling: Spelling = unwrapped_key) -> StateFit:
    """Match a state dict with a network by identical names, or else by names that differ only in what wrappers add."""
    own = model.state_dict()
    state, computed = _computed(own, state, spelling)
    named = _named(own, state, spelling)
    aside = [
        key
        for key, value in named.items()
        if (key not in own and is_averaged(key)) or (is_counter(key) and own.get(key, _NOTHING).shape != value.shape)
    ]
    kept = {key: value for key, value in named.items() if key not in aside}
    return StateFit(
        kept,
        [key for key in own if key not in kept and not _may_lack(key)],
        [key for key in kept if key not in own],
        [key for key in own if key in kept and own[key].shape != kept[key].shape],
        aside,
        computed,
    )


def is_counter(key: str) -> bool:
    """Return whether a key names a counter of training or of a profiler, which networks do not compute with."""
    return key.rpartition(".")[2] in _COUNTERS or key in _OF_AVERAGES


def is_averaged(key: str) -> bool:
    """Return whether a key names an averaged weight that is stored beside the network's own."""
    return key.partition(".")[0] in AVERAGED


def _may_lack(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _computed(own: Collection[str], state: Mapping[str, Tensor], spelling: Spelling) -> tuple[Mapping[str, Tensor], list[str]]:
    """Compute each weight that a mask or weight_norm stores as two parts, if the network has no such parts.

    Return the state dict with these weights in place of the parts, and their names.
    """
    names, made, parts = {spelling(name) for name in own}, dict[str, Tensor](), set[str]()
    for name, first in state.items():
        for (end, other), between, compute in _PARTS:
            partner = f"{name.removesuffix(end)}{other}"
            if not name.endswith(end) or partner not in state or spelling(name) in names:
                continue
            if (weight := compute(first, state[partner])) is not None:
                made[name.removesuffix(end).replace(between, "")] = weight
                parts |= {name, partner}
    return ({name: value for name, value in state.items() if name not in parts} | made if made else state), [*made]


def _masked(weight: Tensor, mask: Tensor) -> Tensor | None:
    return weight * mask.to(weight.dtype) if weight.shape == mask.shape and not mask.is_complex() else None


def _normed(direction: Tensor, length: Tensor) -> Tensor | None:
    """Compute v g / |v| (Salimans & Kingma 2016), with the norm over the dimensions in which g has size 1."""
    ones = length.shape if length.ndim else (1,) * direction.ndim
    if len(ones) != direction.ndim or any(n not in (1, m) for n, m in zip(ones, direction.shape, strict=True)):
        return None
    over = [place for place, n in enumerate(ones) if n == 1]
    if not over or not direction.is_floating_point() or not length.is_floating_point():
        return None
    direction = direction.float()
    return direction * (length.float() / torch.linalg.vector_norm(direction, dim=over, keepdim=True))


_PARTS = (
    (("_orig", "_mask"), "", _masked),
    (("_v", "_g"), "", _normed),
    ((".original1", ".original0"), "parametrizations.", _normed),
)


def _named(own: Collection[str], state: Mapping[str, Tensor], spelling: Spelling) -> dict[str, Tensor]:
    if all(key in state or _may_lack(key) for key in own):
        return dict(state)
    names = {spelling(key): key for key in own}
    if len(names) < len(own):  # two of the network's keys differ only in a wrapper's part
        return dict(state)
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = names.get(spelling(key), key)
        found[key if name in found else name] = value  # a second match keeps its own key and counts as extra
    return found


def load_fitted(model: nn.Module, found: StateFit, path: Path, name: str) -> None:
    """Load a state dict into a network, in place. Raises Misfit, naming the first difference, if it does not match."""
    own, state = model.state_dict(), found.state
    if not found.is_whole():
        first = (
            f"it has no {found.missing[0]}"
            if found.missing
            else f"it has an unknown key {found.extra[0]}"
            if found.extra
            else f"its {(odd := found.misshapen[0])} has shape {tuple(state[odd].shape)}, not {tuple(own[odd].shape)}"
        )
        counts = f"{len(found.missing)} missing, {len(found.extra)} unknown, {len(found.misshapen)} of the wrong shape"
        raise Misfit(f"{path} does not fit {name}: {first} ({counts})", name)
    if whole := next((k for k in own if own[k].is_floating_point() and _is_whole(state[k])), None):
        raise IntrafusionError(f"{whole} in {path} is {_kind(state[whole])}, integers without a scale; save floats")
    model.load_state_dict(checked_state(state, path), strict=False)
