"""Saving and loading networks of any width.

Weights are stored as safetensors. The file's metadata holds a card that describes the layers.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.models.architectures import PadShortcut
from intrafusion.models.card import ModelCard, card_from, read_card
from intrafusion.runtime.atomic_write import atomic_path

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {  # class and constructor arguments of each kind of layer
    "Conv2d": (nn.Conv2d, _CONV),
    "Linear": (nn.Linear, ("in_features", "out_features")),
    "BatchNorm1d": (nn.BatchNorm1d, ("num_features", "eps")),
    "BatchNorm2d": (nn.BatchNorm2d, ("num_features", "eps")),
    "Identity": (nn.Identity, ()),
    "PadShortcut": (PadShortcut, ("channels", "before", "after", "stride")),
}
_RESIZED = "Resized"  # any other kind: the architecture's own layer, with changed attributes and shapes
_MOST = 1 << 16  # limit on any size of a layer
_CARD = "intrafusion.card"  # key in the file's metadata


def layers_of(model: nn.Module, base: nn.Module) -> dict[str, Any]:
    """Describe the layers of `model` that differ from `base`, by dotted name, as JSON-serialisable data.

    base: an unpruned network of the same architecture. Raises IntrafusionError for a layer whose type differs from that in
    `base` and which the file format does not support.
    """
    found: dict[str, Any] = {}

    def walk(ours: nn.Module, theirs: nn.Module | None, name: str) -> None:
        if theirs is None or type(ours) is not type(theirs) or [*ours._modules] != [*theirs._modules]:
            found[name] = _described(ours, name)
            return
        if ours.extra_repr() != theirs.extra_repr() or _shapes(ours) != _shapes(theirs):
            found[name] = _described(ours, name) if _is_known(ours) else _resized(ours, theirs, name)
        for child, module in ours.named_children():
            walk(module, theirs.get_submodule(child), f"{name}.{child}" if name else child)

    walk(model, base, "")
    return found


def _described(layer: nn.Module, name: str) -> Any:
    if type(layer) is nn.Sequential:
        return [_described(child, name) for child in layer]
    kind = type(layer).__name__
    if not _is_known(layer):
        raise IntrafusionError(f"{_layer(name)} is a {kind}, which cannot be saved to a file")
    numbers = {field: getattr(layer, field) for field in _KINDS[kind][1]}
    return {"kind": kind, **numbers} | (
        {"bias": layer.bias is not None} if hasattr(layer, "bias") and "Norm" not in kind else {}
    )


def _is_known(layer: nn.Module) -> bool:
    return _KINDS.get(type(layer).__name__, (None,))[0] is type(layer)


def _resized(ours: nn.Module, theirs: nn.Module, name: str) -> dict[str, Any]:
    """Describe a layer of the same type as the architecture's by the integer attributes and tensor shapes that differ."""
    before, numbers = _numbers(theirs), {}
    for field, value in _numbers(ours).items():
        if field not in before or value != before[field]:
            numbers[field] = list(value) if isinstance(value, tuple) else value
    shapes = {part: shape for part, shape in _shapes(ours).items() if shape != _shapes(theirs)[part]}
    if not numbers and not shapes:
        raise IntrafusionError(f"{_layer(name)} differs from its architecture, but not in any setting or shape")
    return {"kind": _RESIZED, "numbers": numbers, "shapes": shapes}


def _numbers(layer: nn.Module) -> dict[str, Any]:
    """Return the layer's attributes that are integers or tuples of integers."""
    return {name: value for name, value in vars(layer).items() if name[0] != "_" and _is_whole(value)}


def _is_whole(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_whole, value))
    return type(value) is int


def _shapes(layer: nn.Module) -> dict[str, list[int] | None]:
    """Return the shapes of the layer's own tensors by name. None marks a tensor that is absent (registered as None)."""
    kept = {name: value for name, value in layer._buffers.items() if name not in layer._non_persistent_buffers_set}
    return {name: None if t is None else [*t.shape] for name, t in {**layer._parameters, **kept}.items()}


def set_layers(model: nn.Module, layers: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Give a network the layers that `layers_of` described, in place, with uninitialised weights.

    state: the weights that will be loaded. Raises IntrafusionError if the description is invalid or does not match `state`.
    Nothing in the description is executed, and the layers take no more memory than the weights.
    """
    if not isinstance(layers, Mapping):
        raise IntrafusionError("the card's layers must be a mapping of names to layers")
    for name, described in layers.items():
        try:
            before = model.get_submodule(str(name))
        except AttributeError as error:
            raise IntrafusionError(f"the card has a layer {name!r} that this architecture does not have") from error
        if isinstance(described, Mapping) and described.get("kind") == _RESIZED:
            _resize(before, described, str(name), state)
        elif not name:
            raise IntrafusionError("the card describes the whole network as one layer, which is invalid")
        else:
            with torch.device("meta"):
                made = _made(described, str(name))
            for part, tensor in made.state_dict().items():
                _check_shape(f"{name}.{part}", tensor.shape, state)
            made.to_empty(device="cpu")
            for buffer in made.buffers():
                buffer.zero_()
            model.set_submodule(str(name), made)


def _check_shape(name: str, shape: Sequence[int], state: Mapping[str, Tensor]) -> None:
    if name.endswith("num_batches_tracked") and name not in state:
        return
    if name not in state or [*state[name].shape] != [*shape]:
        has = [*state[name].shape] if name in state else "none"
        raise IntrafusionError(
            f"the card and the weights do not belong together: {name} is {[*shape]} in the card, {has} in the weights"
        )


def _resize(layer: nn.Module, described: Mapping[str, Any], name: str, state: Mapping[str, Tensor]) -> None:
    """Set the attributes and tensor shapes of an existing layer to those from a card, in place."""
    numbers, shapes, own = described.get("numbers"), described.get("shapes"), _numbers(layer)
    if not isinstance(numbers, Mapping) or not isinstance(shapes, Mapping) or {*described} != {"kind", "numbers", "shapes"}:
        raise _senseless(name, described)
    for field, value in numbers.items():
        value = tuple(value) if isinstance(value, list) else value
        if field not in own or type(value) is not type(own[field]) or not _is_whole(value) or not _fits(value):
            raise _senseless(name, described)
        setattr(layer, field, value)
    for part, shape in shapes.items():
        table = layer._parameters if part in layer._parameters else layer._buffers
        if part not in _shapes(layer) or not (shape is None or (isinstance(shape, list) and all(map(_is_whole, shape)))):
            raise _senseless(name, described)
        if shape is None:
            table[part] = None
            continue
        _check_shape(f"{name}.{part}" if name else part, shape, state)
        empty = torch.empty(shape)
        table[part] = nn.Parameter(empty) if table is layer._parameters else empty  # type: ignore[assignment]


def _layer(name: str) -> str:
    return f"layer {name}" if name else "the network"


def _senseless(name: str, described: Any) -> IntrafusionError:
    return IntrafusionError(f"the card's layer {name!r} is invalid: {json.dumps(described)[:200]}")


def _made(described: Any, name: str, depth: int = 0) -> nn.Module:
    if isinstance(described, list) and depth < 3 and len(described) < 16:
        return nn.Sequential(*(_made(child, name, depth + 1) for child in described))
    kind = described.get("kind") if isinstance(described, Mapping) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise IntrafusionError(f"the card's layer {name!r} has an unknown kind; choose one of {', '.join(_KINDS)}")
    make, fields = _KINDS[kind]
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in described.items() if key != "kind"}
    if not {*given} <= {*fields, "bias"} or not all(_fits(value) for value in given.values()):
        raise _senseless(name, described)
    try:
        return make(**given)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise IntrafusionError(f"the card's layer {name!r} is invalid: {one_line(error)}") from error


def _fits(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) <= 4 and all(_fits(one) for one in value)
    if isinstance(value, str):
        return value in ("zeros", "reflect", "replicate", "circular")
    return isinstance(value, int | float) and 0 <= value <= _MOST


def save_network(model: nn.Module, base: nn.Module, card: ModelCard, path: Path) -> ModelCard:
    """Write a network and its card to `path`.safetensors. Return the card, which records the architecture and layers.

    base: an unpruned network of the architecture that `card.name` names. Raises IntrafusionError if the file cannot be written.
    """
    details = {**card.details, "architecture": card.name, "layers": layers_of(model, base)}
    card = replace(card, name=path.name, details=details)
    save_state(model.state_dict(), card, path)
    return card


def save_state(state: Mapping[str, Tensor], card: ModelCard, path: Path) -> None:
    """Write tensors to `path`.safetensors, with the card that describes them in the file's metadata.

    An existing file of that name is replaced atomically. If writing fails, that file and its card are kept and IntrafusionError
    is raised.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    with atomic_path(path.with_name(f"{path.name}.safetensors")) as part:
        try:
            save_file(tensors, part, {_CARD: json.dumps(card.to_dict())})
        except SafetensorError as error:
            raise OSError(one_line(error)) from error
    if not path.with_name(f"{path.name}.pt2").exists():  # a .pt2 file uses this card
        with suppress(OSError):
            path.with_name(f"{path.name}.json").unlink(missing_ok=True)


def saved_card(path: Path, default: ModelCard) -> ModelCard:
    """Read the card that `save_state` put into a file and merge it over `default`.

    For a file from an older version, read the JSON file beside it. Use this only for files written by this package, because
    other files may contain anything. Raises IntrafusionError if the card is invalid or the file is damaged, as far as that is
    visible without reading its tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get(_CARD)
    except (OSError, SafetensorError) as error:
        raise IntrafusionError(f"{path} is damaged: {one_line(error)}") from error
    return card_beside(path, default) if told is None else card_from(told, default, path)


def card_beside(path: Path, default: ModelCard) -> ModelCard:
    """Read the card from the JSON file beside a weights file and merge it over `default`."""
    return read_card(path.with_suffix(".json"), default)
