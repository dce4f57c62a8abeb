"""File locations: assets shipped with the project, downloads, and what a user keeps under a name."""

import os
import re
from pathlib import Path

from intrafusion.errors import IntrafusionError

_BYTES = 200  # most bytes of a path component; file systems allow 255
_PACKAGE = Path(__file__).parents[1]
ASSETS = _PACKAGE / "assets"
if not ASSETS.exists():  # a checkout has assets beside the package; an installed package contains them
    ASSETS = _PACKAGE.parent / "assets"


def home() -> Path:
    """Return the folder for downloads: $INTRAFUSION_HOME, or ~/.cache/intrafusion."""
    return Path(os.environ.get("INTRAFUSION_HOME") or Path.home() / ".cache" / "intrafusion")


def store_path() -> Path:
    """Return the study store's file: $INTRAFUSION_STORE, or studies.sqlite among the downloads."""
    return Path(os.environ.get("INTRAFUSION_STORE") or home() / "studies.sqlite")


def check_name(name: str) -> str:
    """Return a name for a kept network. Raises IntrafusionError unless `is_name` holds."""
    if not is_name(name):
        raise IntrafusionError(f"invalid name {name!r}; use up to 64 letters and digits, and . _ - after the first")
    return name


def is_name(name: str) -> bool:
    """Return whether something can be kept under this name: at most 64 letters, digits, and . _ - after the first."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) is not None


def inside(folder: Path, *parts: str) -> Path:
    """Return the path of these parts in a folder: the only way in which text from a file becomes part of a path.

    Raises IntrafusionError for a part that is no plain name, and for a path that leaves the folder through links.
    """
    for part in parts:
        if not is_part(part):
            raise IntrafusionError(
                f"{part[:80]!r} is not a valid file name; rename it, with at most {_BYTES} bytes and no / or \\"
            )
    path = folder.joinpath(*parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise IntrafusionError(f"rejected {'/'.join(parts)[:80]!r}: it is outside its folder")
    return path


def is_part(name: str) -> bool:
    """Return whether a text is the plain name of one file or folder: printable Unicode, no separators, at most _BYTES bytes."""
    plain = name.isprintable() and not re.search(r"[/\\]", name) and name not in ("", ".", "..")
    return plain and len(name.encode(errors="replace")) <= _BYTES
