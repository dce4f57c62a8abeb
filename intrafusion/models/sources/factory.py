"""Networks created by the user's own code, named "package.module:factory".

That code is executed, so pages and files must not name a factory. Only Python and the command line may.
"""

import hashlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.models.card import ModelCard, check_card
from intrafusion.models.sources.files import open_file
from intrafusion.models.state_dict import located
from intrafusion.runtime.cancellation import OnProgress

MARK = ":"
_USUAL = (
    (3, 32, 32), (1, 28, 28), (3, 224, 224), (1, 32, 32), (1, 8, 8), (3, 64, 64), (3, 28, 28), (3, 96, 96), (3, 128, 128),
    (3, 227, 227), (3, 256, 256), (3, 299, 299), (1, 64, 64), (1, 224, 224),
)  # fmt: skip
_log = logging.getLogger(__name__)


def names() -> list[str]:
    return []


def dataset(name: str) -> str:
    return _made(name)[1].dataset


def blank(name: str, state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelCard]:
    """Return the network as its factory creates it, and its card."""
    model, card, guessed = _made(name)
    if guessed:
        _log.warning("%s has no card; guessed: %s", name, ", ".join(guessed))
    return model, card


def published(name: str) -> tuple[str, Path, str]:
    raise IntrafusionError(f"{name} has no published weights; load them in its factory, or pass a file as weights= (--weights)")


def open_model(name: str, weights: str | Path | None, progress: OnProgress | None) -> tuple[nn.Module, ModelCard]:
    """Load the model and its card. weights: a file, or None for the weights that the factory sets."""
    model, card = blank(name, {})
    if weights is None:
        return model, card
    path, key = located(weights)
    return open_file(path, lambda state: (model, replace(card, source=str(path))), key)


def is_local(name: str) -> bool:
    return True


def describe(name: str) -> dict[str, Any]:
    card = _made(name)[1]
    return {
        "dataset": card.dataset,
        "weights": "factory",
        "accuracy": card.accuracy,
        "summary": "made by your own code",
    }


def _made(name: str) -> tuple[nn.Module, ModelCard, list[str]]:
    """Return the network, its card, and the names of the card fields that were guessed."""
    module_name, _, function = name.partition(MARK)
    with _importing():
        try:
            module = importlib.import_module(module_name)
            factory = getattr(module, function)
        except Exception as error:  # a user's module can fail in any way
            raise IntrafusionError(f"cannot import {name}: {type(error).__name__}: {one_line(error)}") from error
        try:
            model = factory()
        except Exception as error:
            raise IntrafusionError(f"{name}() failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise IntrafusionError(f"{name}() must return an nn.Module, not {type(model).__name__}")
    model = _plain(name, model)
    model.code = _code_of(module)  # type: ignore[assignment]
    given = getattr(model, "card", None)
    if isinstance(given, ModelCard):
        _tried(name, model, given.input_size)
        return model, given, []
    return (model, *_card(name, model, given if isinstance(given, Mapping) else getattr(module, "CARD", {})))


def _plain(name: str, model: nn.Module) -> nn.Module:
    """Return the network in eval mode and in float32, without the torch.compile wrapper."""
    while isinstance(before := getattr(model, "_orig_mod", None), nn.Module):
        model = before
    if isinstance(model, torch.jit.ScriptModule):
        raise IntrafusionError(
            f"{name}() returned a scripted network, which cannot be pruned; return the nn.Module that was scripted"
        )
    kinds = {part.dtype for part in (*model.parameters(), *model.buffers()) if part.is_floating_point()} - {torch.float32}
    if kinds:
        _log.warning("%s is in %s; converting to float32", name, ", ".join(sorted(str(kind)[6:] for kind in kinds)))
    return model.float().eval() if kinds else model.eval()


def _code_of(module: ModuleType) -> str:
    """Return the SHA-256 (hex) of the module's file, or "" if it has none.

    It keeps results of other code from being taken for results of this code.
    """
    try:
        return hashlib.sha256(Path(module.__file__ or "").read_bytes()).hexdigest()
    except OSError:
        return ""


@contextmanager
def _importing() -> Iterator[None]:
    """Put the current directory first on sys.path within the block, as `python -m` does."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _card(name: str, model: nn.Module, told: Mapping[str, Any]) -> tuple[ModelCard, list[str]]:
    """Build a card from the module's CARD and from guesses. Return it with descriptions of what was guessed.

    The input size is guessed by trial, and the number of classes from the logits.
    """
    known = {field.name for field in fields(ModelCard)} - {"name"}
    if unknown := set(told) - known:
        raise IntrafusionError(
            f"CARD of {name} has an unknown field {sorted(unknown)[0]!r}; choose one of {', '.join(sorted(known))}"
        )
    size, logits = _tried(name, model, told.get("input_size"))
    channels = size[0]
    guess = {
        "input_size": size,
        "classes": logits,
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "dataset": "own",
        "source": "its factory",
    }
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in {**guess, **told}.items()
    }
    card = ModelCard(name, **values)
    try:
        check_card(card)
    except (ValueError, TypeError) as error:
        raise IntrafusionError(f"CARD of {name} is invalid: {error}") from error
    said = {"input_size": f"images {_by(size)}", "mean": "no normalisation except pixels from 0 to 1"}
    guessed = [text for key, text in said.items() if key not in told]
    return card, guessed and [
        *guessed,
        f"set CARD = {{'input_size': ..., 'mean': ..., 'std': ...}} in {name.partition(MARK)[0]} to specify them",
    ]


def _tried(name: str, model: nn.Module, told: Any) -> tuple[tuple[int, int, int], int]:
    """Return the image size that the network accepts and its number of logits.

    told: the size that its card states, or None to try the usual sizes.
    """
    sizes = _usual(model) if told is None else [_size(name, told)]
    why = "none has the number of channels of its first layer"
    for size in sizes:
        try:
            with torch.inference_mode():
                out = model(torch.zeros(2, *size))
        except Exception as error:  # a user's forward can fail in any way
            why = f"{_by(size)}: {one_line(error)}"
            continue
        if not isinstance(out, Tensor):
            raise IntrafusionError(f"{name} returns {_described(out)}")
        if out.ndim == 2 and len(out) == 2:
            return size, out.shape[1]
        why = f"for 2 images {_by(size)} it returns {tuple(out.shape)}, not logits (images, classes)"
    advice = "set CARD = {'input_size': (C, H, W)} in its module"
    if told is not None:
        advice = "correct input_size in CARD, or the network"
    raise IntrafusionError(f"{name} accepts none of the image sizes tried ({why}); {advice}")


def _by(size: tuple[int, int, int]) -> str:
    return "x".join(map(str, size))


def _usual(model: nn.Module) -> list[tuple[int, int, int]]:
    """Return the usual image sizes that have as many channels as the first layer reads."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    return [size for size in _USUAL if not isinstance(first, nn.Conv2d) or first.in_channels == size[0]]


def _size(name: str, told: Any) -> tuple[int, int, int]:
    try:
        channels, height, width = map(int, told)
        return channels, height, width
    except (TypeError, ValueError) as error:
        raise IntrafusionError(f"input_size of {name} must be (channels, height, width), not {told!r}") from error


def _described(out: Any) -> str:
    """Describe a forward output that is not a tensor, and say how to wrap its network."""
    if isinstance(out, Mapping):
        parts = {f"out[{key!r}]": value for key, value in out.items()}
    elif isinstance(out, list | tuple) and not hasattr(out, "_fields"):
        parts = {f"out[{place}]": value for place, value in enumerate(out)}
    else:
        parts = {f"out.{key}": getattr(out, key) for key in getattr(out, "_fields", getattr(out, "__dict__", {}))}
    logits = [part for part, value in parts.items() if isinstance(value, Tensor) and value.ndim == 2]
    best = next((part for part in logits if "logits" in part), logits[0] if logits else "its logits")
    return f"a {type(out).__name__} instead of one tensor of logits; wrap it in a module that returns {best}"
