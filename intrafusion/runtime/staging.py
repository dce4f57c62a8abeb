"""Where what a person brings is kept, and how it gets there: whole, or not at all."""

import os
import re
import shutil
import stat
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intrafusion.errors import IntrafusionError
from intrafusion.runtime import sandbox, stale_files
from intrafusion.runtime.atomic_write import drop, part_of
from intrafusion.runtime.paths import check_name, home
from intrafusion.runtime.safe_zip import MIB, check_size

NETWORKS, IMAGES, RUNS = (
    "models",
    "images",
    "lab",
)  # folders of home(); of the lab's runs, damaged ones are removed here
_SECONDS, _A_SECOND = 20, MIB  # of processor time for any file, and bytes of it for another second
_SLOWER = 10  # times as long by the clock, on a busy machine
_GROW, _COPIES = 896 * MIB, 8  # of memory for any file, and times its size: tracing groups copies a network often
_ENDS = {NETWORKS: (".safetensors", ".pt2"), IMAGES: ("",), RUNS: (".safetensors",)}  # how what is kept ends


def free_path(kind: str, name: str) -> Path:
    """Where something of this kind is to be kept, without a suffix. Raises IntrafusionError for a bad name, or one taken."""
    path = home() / kind / check_name(name)
    if any(path.with_name(name + end).exists() for end in _ENDS[kind]):
        raise IntrafusionError(f"something is kept as kept/{name} already: choose another name, or remove that first")
    return path


def checked(
    task: str, workshop: "Workshop", files: Sequence[Path], arguments: dict[str, Any], tell: Callable[[str], None]
) -> Generator[sandbox.Step, None, Any]:
    """Let a child do a task of `uploads.checks` with these given files: its steps, and in the end what it answers.

    It may take more memory, and time, for a larger file: a network is a few copies of it. Raises IntrafusionError as
    `sandbox.steps` does, and for a link that the child has left.
    """
    names, size = [file.name for file in files], sum(file.stat().st_size for file in files)
    what = ", ".join(names)
    seconds = _SECONDS + size // _A_SECOND
    limits = sandbox.Limits(seconds, max(_GROW, _COPIES * size), wall=_SLOWER * seconds)
    inside = f"intrafusion.studies.uploads.checks:{task}"
    answer = yield from sandbox.steps(inside, workshop.folder, what, limits, {"files": names, **arguments}, tell)
    for folder, folders, made in os.walk(workshop.made):
        for name in (*folders, *made):
            kind = (Path(folder) / name).lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise IntrafusionError(f"checking {what} left {name[:80]!r}, which is no plain file: it is refused")
    return answer


class Workshop:
    """A folder beside the kept things for a child to work in; gone at the end of its block, or with the last reference to it.

    folder: with this process in its name, so that another one can tell what a killed process has left (see `stale_files`).
    given: copies of a person's files in it, which the child reads. made: a folder in it, for what the child hands back.
    """

    def __init__(self) -> None:
        stale_files.remove_once()
        self.folder = home().absolute() / f"{stale_files.CHECK}{stale_files.mark()}"
        with _in_words():
            self.folder.mkdir(0o700, parents=True)
        self.given: list[Path] = []
        self.made = self.folder / "made"
        self.close = weakref.finalize(self, drop, self.folder)

    def give(self, name: str, content: Path | memoryview) -> None:
        """Put a file into it, under its own name. Raises IntrafusionError for a second one of a name, and where none fits."""
        place = self.folder / "given" / name
        if place.exists():
            raise IntrafusionError(f"two files are named {name}: rename one, as x_train.npz and x_test.npz")
        with _in_words():
            place.parent.mkdir(exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, place)
            else:
                place.write_bytes(content)
        self.given.append(place)

    def __enter__(self) -> "Workshop":
        return self

    def __exit__(self, kind: object, error: object, where: object) -> None:
        self.close()
        with _in_words():
            if isinstance(error, OSError):
                raise error
        if isinstance(error, IntrafusionError) and str(self.folder) in str(error):
            raise IntrafusionError(re.sub(rf"{re.escape(str(self.folder))}/(given|made)/", "", str(error))) from error


@contextmanager
def given(*files: Path) -> Iterator[Workshop]:
    """A workshop with copies of a person's files. Raises IntrafusionError for one that is missing, empty or too large.

    Messages within the block say the files' names, not where they lie.
    """
    try:
        with Workshop() as workshop:
            for file in files:
                check_size(file)
                workshop.give(file.name, file)
            yield workshop
    except IntrafusionError as error:
        raise IntrafusionError(without_folders(str(error), *files)) from error


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IntrafusionError(f"it could not be kept: {error.strerror or type(error).__name__}") from error


def without_folders(message: str, *files: Path) -> str:
    """A message with the names of these files in place of where they lie."""
    for folder in {place for file in files for place in (file.resolve().parent, file.parent) if place.name}:
        message = message.replace(f"{folder}/", "")
    return message


def remove(kind: str, name: str) -> None:
    """Remove a kept network (kind "models"), kept images ("images") or a run of the lab ("lab"), whole or damaged.

    Raises IntrafusionError where there is none, or where it cannot be removed.
    """
    of = "lab/" if kind == RUNS else "kept/"
    name = check_name(name.removeprefix(of))
    found = [home() / kind / (name + end) for end in _ENDS[kind] if (home() / kind / (name + end)).exists()]
    if not found:
        raise IntrafusionError(f"nothing is kept as {of}{name}")
    try:
        for path in found:
            part = part_of(path)  # not half of it is ever listed
            path.rename(part)
            drop(part)
        if kind != IMAGES:
            (home() / kind / f"{name}.json").unlink(missing_ok=True)  # the card of an older version
    except OSError as error:
        raise IntrafusionError(f"{of}{name} cannot be removed: {error.strerror or type(error).__name__}") from error


def safe_name(file: str) -> str:
    """A name to keep a file under, from what its owner calls it."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(file).stem).strip(".-_")[:64]
    return stem or "mine"
