"""Where what a person brings is kept, and how it gets there: whole, or not at all."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from intrafusion import leftovers
from intrafusion.atomic import drop, part_of
from intrafusion.errors import IntrafusionError
from intrafusion.places import home
from intrafusion.saved import check_name

NETWORKS, IMAGES = "models", "images"  # folders of home()
_ENDS = {NETWORKS: (".safetensors", ".pt2"), IMAGES: ("",)}  # how what is kept ends


def free_path(kind: str, name: str) -> Path:
    """Where something of this kind is to be kept, without a suffix. Raises IntrafusionError for a bad name, or one taken."""
    path = home() / kind / check_name(name)
    if any(path.with_name(name + end).exists() for end in _ENDS[kind]):
        raise IntrafusionError(f"something is kept as kept/{name} already: choose another name, or remove that first")
    return path


@contextmanager
def workshop(*files: Path) -> Iterator[Path]:
    """A folder beside the kept things, gone in the end. Messages within say the given files' names, not where they lie."""
    leftovers.remove_once()
    folder = home() / f"{leftovers.CHECK}{leftovers.mark()}"
    try:
        folder.mkdir(0o700, parents=True)
        yield folder
    except IntrafusionError as error:
        raise IntrafusionError(without_folders(str(error), *files)) from error
    except OSError as error:
        raise IntrafusionError(f"it could not be kept: {error.strerror or type(error).__name__}") from error
    finally:
        drop(folder)


def without_folders(message: str, *files: Path) -> str:
    """A message with the names of these files in place of where they lie."""
    for folder in {place for file in files for place in (file.resolve().parent, file.parent) if place.name}:
        message = message.replace(f"{folder}/", "")
    return message


def remove(kind: str, name: str) -> None:
    """Remove a kept network (kind "models") or kept images (kind "images"), whole or damaged.

    Raises IntrafusionError where there is none, or where it cannot be removed.
    """
    name = check_name(name.removeprefix("kept/"))
    found = [home() / kind / (name + end) for end in _ENDS[kind] if (home() / kind / (name + end)).exists()]
    if not found:
        raise IntrafusionError(f"nothing is kept as kept/{name}")
    try:
        for path in found:
            part = part_of(path)  # not half of it is ever listed
            path.rename(part)
            drop(part)
        if kind == NETWORKS:
            (home() / kind / f"{name}.json").unlink(missing_ok=True)  # the card of an older version
    except OSError as error:
        raise IntrafusionError(f"kept/{name} cannot be removed: {error.strerror or type(error).__name__}") from error


def safe_name(file: str) -> str:
    """A name to keep a file under, from what its owner calls it."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(file).stem).strip(".-_")[:64]
    return stem or "mine"
