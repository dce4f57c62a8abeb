"""Where files lie: what ships with the project, what is downloaded, and what a person keeps under a name."""

import os
import re
from pathlib import Path

from intrafusion.errors import IntrafusionError

_BYTES = 200  # of a part of a path; a file system takes 255
_PACKAGE = Path(__file__).parents[1]
ASSETS = _PACKAGE / "assets"
if not ASSETS.exists():  # a checkout: assets lie beside the package; an installed package carries them inside
    ASSETS = _PACKAGE.parent / "assets"


def home() -> Path:
    """The folder that holds downloads: $INTRAFUSION_HOME, or ~/.cache/intrafusion."""
    return Path(os.environ.get("INTRAFUSION_HOME") or Path.home() / ".cache" / "intrafusion")


def store_path() -> Path:
    """The study store's file: $INTRAFUSION_STORE, or studies.sqlite among the downloads."""
    return Path(os.environ.get("INTRAFUSION_STORE") or home() / "studies.sqlite")


def check_name(name: str) -> str:
    """A name for a kept network. Raises IntrafusionError unless it is of letters, digits, and . _ - between them."""
    if not is_name(name):
        raise IntrafusionError(f"{name!r} is no name for a network: letters, digits, and . _ - after the first, at most 64")
    return name


def is_name(name: str) -> bool:
    """Whether something can be kept under this name."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) is not None


def inside(folder: Path, *parts: str) -> Path:
    """The path of these parts in a folder: the one way by which text from a file becomes part of a path.

    Raises IntrafusionError for a part that is no plain name, and for a path that links lead out of the folder.
    """
    for part in parts:
        if not is_part(part):
            raise IntrafusionError(
                f"{part[:80]!r} cannot name a file or folder: rename it, of at most {_BYTES} bytes and no / or \\"
            )
    path = folder.joinpath(*parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise IntrafusionError(f"{'/'.join(parts)[:80]!r} lies outside its folder: it is refused")
    return path


def is_part(name: str) -> bool:
    """Whether a text is the plain name of one file or folder: one that prints, is Unicode, and separates nothing."""
    plain = name.isprintable() and not re.search(r"[/\\]", name) and name not in ("", ".", "..")
    return plain and len(name.encode(errors="replace")) <= _BYTES
