"""Networks of any width that the user keeps on this machine, named "kept/NAME", including torch.export programs."""

import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from intrafusion.errors import IntrafusionError, one_line, unknown
from intrafusion.models.card import ModelCard, card_of
from intrafusion.models.serialization import card_beside, save_network, save_state, saved_card
from intrafusion.models.sources import builtin, lookup
from intrafusion.models.sources.files import open_file
from intrafusion.models.state_dict import cifar, located, unwrapped_key
from intrafusion.runtime.cancellation import OnProgress
from intrafusion.runtime.paths import check_name, home, is_name

PREFIX = "kept/"
_ENDS = (".safetensors", ".pt2")
_PROGRAM = "program"  # key in a card's details: the description of a program
_NOTHING = ModelCard("", (0.0,), (1.0,), (1, 1, 1), 1, "own")


def names(damaged: bool = True) -> list[str]:
    """Return the names of kept networks in alphabetical order.

    damaged: whether to include those that cannot be opened, which `describe` reports as damaged.
    """
    files = [path for end in _ENDS for path in (home() / "models").glob(f"[!.]*{end}")]
    found = sorted({f"{PREFIX}{path.stem}" for path in files if is_name(path.stem)})
    return found if damaged else [name for name in found if _damage(name) is None]


def _damage(name: str) -> str | None:
    """Return why a kept network cannot be opened, as far as its card shows, or None if nothing is wrong."""
    try:
        dataset(name)
        path, card = _found(name)
        if _PROGRAM in card.details:
            _check_described(path, path.stat().st_mtime_ns)
    except IntrafusionError as error:
        return str(error)
    return None


def when(name: str) -> int:
    """Return when a kept network was written, in nanoseconds. A later network of the same name has another time."""
    return _found(name)[0].stat().st_mtime_ns


def keep(model: nn.Module, name: str) -> str:
    """Save a network of any width so that "kept/NAME" opens it. Return that name.

    model: a network with the card of its architecture. A kept network of the same name is replaced. Raises IntrafusionError if
    the name is invalid or the file cannot be written.
    """
    card = card_of(model)
    architecture = card.details.get("architecture", card.name)
    if lookup.runs_code(architecture):
        raise IntrafusionError(
            f"a network made by your own code ({architecture}) cannot be saved as weights; export it, and save the program"
        )
    if is_program(f"{PREFIX}{check_name(name)}"):
        raise IntrafusionError(f"{PREFIX}{name} is already a program; choose another name")
    base, _ = source_of(architecture).blank(architecture, model.state_dict())
    save_network(model, base, replace(card, name=architecture), home() / "models" / check_name(name))
    return f"{PREFIX}{name}"


def keep_program(program: nn.Module, card: ModelCard, name: str) -> str:
    """Save a program from `built`, as its description and its tensors, so that "kept/NAME" opens it. Return that name.

    Raises IntrafusionError if the name is invalid or the file cannot be written.
    """
    from intrafusion.models.exported_program import Program, describe_program, tensors_of

    assert isinstance(program, Program)
    details = {**card.details, _PROGRAM: describe_program(program)}
    save_state(tensors_of(program), replace(card, details=details), home() / "models" / check_name(name))
    return f"{PREFIX}{name}"


def architecture(name: str) -> str:
    """Return the name of the architecture that a kept network was made from. For a program, this is its own name.

    Raises IntrafusionError if the card names no known architecture.
    """
    if is_program(name):
        return name
    found = _found(name)[1].details.get("architecture")
    if not isinstance(found, str) or not is_safe(found):
        raise IntrafusionError(f"the card of {name} names an unknown architecture; remove it and save it again")
    return found


def is_program(name: str) -> bool:
    """Return whether the network kept under this name ("kept/NAME" or "NAME") is a program."""
    path = home() / "models" / check_name(name.removeprefix(PREFIX))
    saved, older = (path.with_name(f"{path.name}{end}") for end in _ENDS)
    return _holds_program(saved, saved.stat().st_mtime_ns) if saved.is_file() else older.is_file()


@cache
def _holds_program(path: Path, when: int) -> bool:
    """Return whether a file's card describes a program. when: the file's modification time, part of the cache key."""
    return _PROGRAM in saved_card(path, _NOTHING).details


@cache
def _check_described(path: Path, when: int) -> None:
    """Raise IntrafusionError if the program description in a file's card is invalid.

    when: the file's modification time, part of the cache key.
    """
    from intrafusion.models.exported_program import check_description

    try:
        check_description(saved_card(path, _NOTHING).details[_PROGRAM])
    except IntrafusionError as error:
        raise IntrafusionError(f"{path} is damaged: {error}; remove it") from error


def source_of(name: str) -> ModuleType:
    """Return the source of a name: this module, or another of `sources`."""
    return sys.modules[__name__] if name.startswith(PREFIX) else lookup.of(name)


def is_safe(architecture: str) -> bool:
    """Return whether a file may request this architecture: one known by name alone, or a kept program."""
    if lookup.runs_code(architecture):
        return False
    try:
        if architecture.startswith(PREFIX):
            return is_program(architecture)
        lookup.of(architecture).dataset(architecture)
    except IntrafusionError:
        return False
    return True


def dataset(name: str) -> str:
    if is_program(name):
        return _found(name)[1].dataset
    made_from = architecture(name)
    return source_of(made_from).dataset(made_from)


def blank(name: str, state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelCard]:
    """Return the architecture that a kept network was made from, with arbitrary weights, and its card.

    A program is returned with random weights.
    """
    if is_program(name):
        model, card = _program(name)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d):
                layer.reset_parameters()
        return model, replace(card, source="random initialisation", accuracy=None)
    made_from = architecture(name)
    return source_of(made_from).blank(made_from, state)


def open_model(name: str, weights: str | Path | None, progress: OnProgress | None) -> tuple[nn.Module, ModelCard]:
    """Load the model and its card, from its own file or from another file of the same architecture."""
    if is_program(name):
        model, card = _program(name)
        if weights is None:
            return model, card
        path, key = located(weights)
        return open_file(path, lambda state: (model, replace(card, source=str(path))), key)

    def make(state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelCard]:
        model, card = blank(name, state)
        return model, replace(card, name=name)

    made_from = architecture(name)
    if weights is None:
        model, card = open_saved(_found(name)[0], made_from)
        return model, replace(card, name=name)
    path, key = located(weights)
    return open_file(path, make, key, cifar if source_of(made_from) is builtin else unwrapped_key, heads=True)


def open_saved(path: Path, architecture: str) -> tuple[nn.Module, ModelCard]:
    """Load the network and the card from a file written by `save_network`."""
    source = source_of(architecture)
    return open_file(path, lambda state: source.blank(architecture, state), heads=True, card_of=saved_card)


def is_local(name: str) -> bool:
    return True


def describe(name: str) -> dict[str, Any]:
    if (why := _damage(name)) is not None:
        return {"dataset": "", "weights": "damaged", "accuracy": None, "summary": f"damaged: {why}"}
    card = _found(name)[1]
    what = "a torch.export program" if is_program(name) else architecture(name)
    return {
        "dataset": card.dataset,
        "weights": "kept",
        "accuracy": card.accuracy,
        "summary": f"{what}, saved on this machine",
    }


def told(name: str) -> list[str]:
    """Return the notes for the user on a kept network's weights: what was chosen or left out of their file."""
    lines = _found(name)[1].details.get("told", [])
    return [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []


def _program(name: str) -> tuple[nn.Module, ModelCard]:
    """Return a kept program and its card.

    A program kept by an older version is a .pt2 file, which is read as untrusted.
    """
    from intrafusion.models.exported_program import built, read_program

    path, card = _found(name)
    if path.suffix == ".pt2":
        older, size, classes = read_program(path)
        return older, replace(card, name=name, input_size=size, classes=classes)
    details = {key: value for key, value in card.details.items() if key != _PROGRAM}
    try:
        program = built(card.details[_PROGRAM], _tensors(path))
        if (program.plan.image, program.plan.classes) != (tuple(card.input_size), card.classes):
            raise IntrafusionError(f"its card describes another program, with {card.classes} classes")
    except IntrafusionError as error:
        raise IntrafusionError(f"{path} is damaged: {error}; remove {name}") from error
    return program, replace(card, name=name, details=details)


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file written by this package."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise IntrafusionError(one_line(error)) from error


def _found(name: str) -> tuple[Path, ModelCard]:
    """Return the file of a kept network and its card. Raises IntrafusionError if the file is missing or damaged."""
    paths = [home() / "models" / f"{check_name(name.removeprefix(PREFIX))}{end}" for end in _ENDS]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise unknown("saved network", name, names())
    if not path.is_file():
        raise IntrafusionError(f"{name} is a folder, not a network; remove it")
    nothing = replace(_NOTHING, name=name)
    if path.suffix == ".safetensors":
        return path, saved_card(path, nothing)
    if not zipfile.is_zipfile(path):
        raise IntrafusionError(f"{path} is damaged: it is not a program; remove {name}")
    return path, card_beside(path, nothing)
