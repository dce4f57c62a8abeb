"""Loading of a weights file for every source.

This covers the choice of a state dict, the layers of the card beside the file, and the weights.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.card import ModelCard, unnamed
from intrafusion.models.nested_state_dicts import state_dicts
from intrafusion.models.safe_unpickling import Beside
from intrafusion.models.serialization import card_beside, set_layers
from intrafusion.models.state_dict import (
    Misfit,
    Spelling,
    StateFit,
    fit,
    is_averaged,
    load_fitted,
    stored_tensors,
    unwrapped_key,
)
from intrafusion.models.weights_file import read_weights_file

Make = Callable[[Mapping[str, Tensor]], tuple[nn.Module, ModelCard]]
CardOf = Callable[[Path, ModelCard], ModelCard]  # reads a file's card and merges it over a default
_SHOWN = 3  # maximum names shown of a list
_log = logging.getLogger(__name__)


def open_file(
    path: Path,
    make: Make,
    key: str | None = None,
    spelling: Spelling = unwrapped_key,
    unused: tuple[str, ...] = (),
    heads: bool = False,
    card_of: CardOf = card_beside,
) -> tuple[nn.Module, ModelCard]:
    """Build the network for the weights in a file, with the layers that its card describes. Return it and its card.

    make: builds the network from the weights, whose keys are normalised by `spelling`. key: which state dict of the file to
    load. unused: prefixes of keys to leave out. heads: whether the head may have another number of classes than `make` gives
    it. card_of: reads the card; only for files written by this package may it read the card from the weights file itself. Notes
    on the weights for the user are logged, and stored in the card's details as `told`. Raises IntrafusionError for a file that
    cannot be read safely, and Misfit for one that does not match the network.
    """
    tables = state_dicts(read_weights_file(path), path, key)
    first: Misfit | None = None
    for place, table in tables.items():
        used = {name: value for name, value in table.items() if not (unused and spelling(name).startswith(unused))}
        try:
            model, card, told = _filled(used, path, make, spelling, heads, card_of)
        except Misfit as error:
            first = first or error
            continue
        told = [*_chosen(place, tables, model, spelling), *told]
        for line in told:
            _log.warning("%s: %s", path, line)
        return model, replace(card, details={**card.details, "told": told}) if told else card
    assert first is not None
    raise Misfit(str(first), first.name, next(iter(tables.values()))) from first


def _filled(
    table: Mapping[str, Any], path: Path, make: Make, spelling: Spelling, heads: bool, card_of: CardOf
) -> tuple[nn.Module, ModelCard, list[str]]:
    """Return the network with the weights of one state dict, its card, and notes for the user."""
    state, told = stored_tensors(table, path), []
    model, default = make({spelling(name): value for name, value in state.items()})
    card = card_of(path, default)
    set_layers(model, card.details.get("layers", {}), fit(model, state, spelling).state)
    found = fit(model, state, spelling)
    _check_kinds(found, table, path, spelling)
    classes = _resized(model, found, default.classes) if heads else None
    if classes is not None:
        found = fit(model, state, spelling)
        told.append(f"its head has {classes} classes, not {default.classes}; the file does not name them")
        if classes != card.classes:
            card = replace(card, classes=classes, dataset=unnamed(classes), accuracy=None)
    load_fitted(model, found, path, card.name)
    if classes is not None:
        _check_head(model, card, path)
    return model, card, [*told, *_left_out(found, table), *_converted(found)]


def _check_kinds(found: StateFit, table: Mapping[str, Any], path: Path, spelling: Spelling) -> None:
    """Raise IntrafusionError if the file holds a weight in another form than a tensor."""
    others = {spelling(name): value for name, value in table.items() if not isinstance(value, Tensor)}
    for name in found.missing:
        if isinstance(value := others.get(spelling(name)), Beside):
            kind = "a NumPy array" if value.of.startswith("numpy.") else f"a {value.of}"
            raise IntrafusionError(f"cannot load {path} safely: {name} is {kind}; save model.state_dict(), with only tensors")
        if spelling(name) in others:
            raise IntrafusionError(f"{name} in {path} is a {type(value).__name__}, not a tensor; save model.state_dict()")


def _resized(model: nn.Module, found: StateFit, classes: int) -> int | None:
    """Resize the head in place to as many outputs as its weights have.

    Return this number, or None if the number of classes is not the only difference.
    """
    heads: dict[str, int] = {}
    for key in found.misshapen:
        name, _, part = key.rpartition(".")
        layer, shape = model.get_submodule(name), found.state[key].shape
        own = getattr(layer, part).shape
        if not isinstance(layer, nn.Linear | nn.Conv2d) or own[0] != classes or not shape or own[1:] != shape[1:]:
            return None
        heads[name] = shape[0]
    if found.missing or found.extra or len({*heads.values()}) != 1:
        return None
    (outputs,) = {*heads.values()}
    if outputs < 2:
        return None
    for layer in map(model.get_submodule, heads):
        setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", outputs)
        for part, value in [*layer.named_parameters(recurse=False)]:
            setattr(layer, part, nn.Parameter(torch.empty(outputs, *value.shape[1:])))
    if getattr(model, "num_classes", None) == classes:
        model.num_classes = outputs  # type: ignore[assignment]
    return outputs


def _check_head(model: nn.Module, card: ModelCard, path: Path) -> None:
    """Raise Misfit unless the network with its new head returns one logit per class."""
    try:
        with torch.inference_mode():
            whole = model.eval()(card.example()).shape == (1, card.classes)
    except Exception:  # the forward pass may rely on another number of classes
        whole = False
    if not whole:
        raise Misfit(f"{path} does not fit {card.name}, which does not run with a head of {card.classes} classes", card.name)


def _chosen(place: str, tables: Mapping[str, Mapping[str, Any]], model: nn.Module, spelling: Spelling) -> list[str]:
    """Return notes on the choice among a file's state dicts.

    They say which one was chosen, if others would fit too, and which entries are outside the chosen key prefix.
    """
    told, others = [], list[str]()
    for other, table in tables.items():
        same = all(tables[place].get(name) is value for name, value in table.items())
        if same or _is_within(place, other) or any(_is_within(other, known) for known in (place, *others)):
            continue
        if fit(model, {name: value for name, value in table.items() if isinstance(value, Tensor)}, spelling).is_whole():
            others.append(other)
    if others:
        told.append(f"using the weights under {place}; {_listed(others)} would also fit; weights_key (--weights-key) chooses")
    parent, _, last = place.rpartition(".")
    if place and parent in tables:
        said = tuple(f"{other.rpartition('.')[2]}." for other in (place, *others))
        if outside := [name for name in tables[parent] if not name.startswith(said)]:
            told.append(f"ignored, not under {last}: {_listed(outside)}")
    return told


def _is_within(place: str, outer: str) -> bool:
    return not outer or f"{place}.".startswith(f"{outer}.")


def _left_out(found: StateFit, table: Mapping[str, Any]) -> list[str]:
    """Return notes on entries that are not weights of the network, and on computed weights."""
    averaged = [name for name in found.aside if is_averaged(name)]
    names = [name for name in found.aside if name not in averaged]
    names += [name for name, value in table.items() if not isinstance(value, Tensor)]
    told = [f"ignored, not weights: {_listed(names)}"] if names else []
    if found.computed:
        told.append(f"computed from two parts each (mask or weight_norm): {_listed(found.computed)}")
    if averaged:
        key = averaged[0].partition(".")[0]
        told.append(f"ignored, averaged weights: {_listed(averaged)}; weights_key (--weights-key) {key} chooses them")
    return told


def _converted(found: StateFit) -> list[str]:
    kinds = {str(value.dtype).removeprefix("torch.") for value in found.state.values() if value.is_floating_point()}
    kinds -= {"float32"}
    return [f"converting its {_listed(sorted(kinds))} weights to float32"] if kinds else []


def _listed(names: Collection[str]) -> str:
    first = ", ".join([*names][:_SHOWN])
    return f"{first} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else first
