"""Networks of any widths in files: weights as safetensors, and beside them a card that says which layers they are."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from intrafusion.cards import ModelCard
from intrafusion.errors import IntrafusionError, one_line
from intrafusion.networks import PadShortcut

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_KINDS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {  # what a layer is made of
    "Conv2d": (nn.Conv2d, _CONV),
    "Linear": (nn.Linear, ("in_features", "out_features")),
    "BatchNorm1d": (nn.BatchNorm1d, ("num_features", "eps")),
    "BatchNorm2d": (nn.BatchNorm2d, ("num_features", "eps")),
    "Identity": (nn.Identity, ()),
    "PadShortcut": (PadShortcut, ("channels", "before", "after")),
}
_MOST = 1 << 16  # of any size of a layer


def layers_of(model: nn.Module, base: nn.Module) -> dict[str, Any]:
    """The layers of `model` that are not as in `base`, an unpruned network of its architecture, by dotted name. JSON-able.

    Raises IntrafusionError for a layer of a kind that files do not know.
    """
    found: dict[str, Any] = {}

    def walk(ours: nn.Module, theirs: nn.Module | None, name: str) -> None:
        alike = theirs is not None and type(ours) is type(theirs)
        if alike and ours.extra_repr() == theirs.extra_repr() and [*ours._modules] == [*theirs._modules]:  # type: ignore[union-attr]
            for child, module in ours.named_children():
                walk(module, theirs.get_submodule(child), f"{name}.{child}" if name else child)  # type: ignore[union-attr]
        else:
            found[name] = _described(ours, name)

    walk(model, base, "")
    return found


def _described(layer: nn.Module, name: str) -> Any:
    if type(layer) is nn.Sequential:
        return [_described(child, name) for child in layer]
    kind = type(layer).__name__
    if _KINDS.get(kind, (None,))[0] is not type(layer):
        raise IntrafusionError(f"layer {name or 'of the whole network'} is a {kind}, which cannot be kept in a file")
    numbers = {field: getattr(layer, field) for field in _KINDS[kind][1]}
    return {"kind": kind, **numbers} | (
        {"bias": layer.bias is not None} if hasattr(layer, "bias") and "Norm" not in kind else {}
    )


def set_layers(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Put the layers that `layers_of` described into a network, in place, with weights of any values.

    Raises IntrafusionError for a description that makes no sense. Nothing in it is run.
    """
    if not isinstance(layers, Mapping):
        raise IntrafusionError("the card's layers are no table of names and layers")
    for name, described in layers.items():
        try:
            model.get_submodule(str(name))
        except AttributeError as error:
            raise IntrafusionError(f"the card has a layer {name!r} that this architecture does not have") from error
        model.set_submodule(str(name), _made(described, str(name)))


def _made(described: Any, name: str, depth: int = 0) -> nn.Module:
    if isinstance(described, list) and depth < 3 and len(described) < 16:
        return nn.Sequential(*(_made(child, name, depth + 1) for child in described))
    kind = described.get("kind") if isinstance(described, Mapping) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise IntrafusionError(f"the card's layer {name!r} is of no kind that files know: {', '.join(_KINDS)}")
    make, fields = _KINDS[kind]
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in described.items() if key != "kind"}
    if not {*given} <= {*fields, "bias"} or not all(_fits(value) for value in given.values()):
        raise IntrafusionError(f"the card's layer {name!r} makes no sense: {json.dumps(described)[:200]}")
    try:
        return make(**given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise IntrafusionError(f"the card's layer {name!r} makes no sense: {one_line(error)}") from error


def _fits(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) <= 4 and all(_fits(one) for one in value)
    if isinstance(value, str):
        return value in ("zeros", "reflect", "replicate", "circular")
    return isinstance(value, int | float) and 0 <= value <= _MOST


def save_network(model: nn.Module, base: nn.Module, card: ModelCard, path: Path) -> ModelCard:
    """Write a network as `path`.safetensors and its card as `path`.json; the card, which says its architecture and layers.

    base: an unpruned network of its architecture, which `card.name` names. Raises IntrafusionError where that fails.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    details = {**card.details, "architecture": card.name, "layers": layers_of(model, base)}
    card = replace(card, name=path.name, details=details)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
        part = path.with_name(f"{path.name}.part")
        save_file(state, part)
        path.with_name(f"{path.name}.json").write_text(json.dumps(card.to_dict(), indent=2) + "\n")
        part.replace(path.with_name(f"{path.name}.safetensors"))
    except (OSError, SafetensorError) as error:
        raise IntrafusionError(f"could not write {path}: {one_line(error)}") from error
    return card


def check_name(name: str) -> str:
    """A name for a kept network. Raises IntrafusionError unless it is of letters, digits, and . _ - between them."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise IntrafusionError(
            f"{name!r} is no name for a network: letters, digits, and . _ - after the first, at most 64"
        )
    return name
