"""Staging of what users provide: where it is kept, and how it gets there completely or not at all."""

import os
import re
import shutil
import stat
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from intrafusion.errors import IntrafusionError
from intrafusion.runtime import sandbox, stale_files
from intrafusion.runtime.atomic_write import part_of, remove_path
from intrafusion.runtime.paths import check_name, home, inside
from intrafusion.runtime.safe_zip import MIB, check_size

NETWORKS, IMAGES, RUNS = "models", "images", "lab"  # folders of home(); this module also removes damaged lab runs
_GROW = 896 * MIB  # bytes of memory for any file
_SLOWER = 10  # wall time per processor time, on a busy machine


class _Needs(NamedTuple):
    """Resource needs of a task, with room to spare.

    seconds: processor seconds for any file. each: further processor seconds for each MiB of it. copies: memory, as a multiple
    of the file size.

    Measured: 100 MiB of weights take 3 s and four times their size in memory, 330 MiB 4 s and 3.3 times; 20,000 tiny pictures
    of 3 MiB 7 s, and 3,000 photos of 220 MiB 6 s; a program of 100 MiB 11 s and eight times its size.
    """

    seconds: int
    each: float
    copies: int


_NEEDS = {"weights": _Needs(8, 0.2, 4), "images": _Needs(8, 1, 4), "program": _Needs(20, 1, 8)}
_ENDS = {NETWORKS: (".safetensors", ".pt2"), IMAGES: ("",), RUNS: (".safetensors",)}  # suffixes of kept files


def free_path(kind: str, name: str) -> Path:
    """Return the path under which to keep something of this kind, without a suffix.

    Raises IntrafusionError for an invalid name, or one already taken.
    """
    path = home() / kind / check_name(name)
    if any(os.path.lexists(path.with_name(name + end)) for end in _ENDS[kind]):
        raise IntrafusionError(f"kept/{name} already exists; choose another name, or remove it first")
    return path


def run_check(
    task: str, workshop: "Workshop", files: Sequence[Path], arguments: dict[str, Any], tell: Callable[[str], None]
) -> Generator[sandbox.Step, None, Any]:
    """Run a task of `uploads.checks` on these given files in a child process; yield its steps, and return its answer.

    Larger files may take more memory and time, as the task needs. Raises IntrafusionError as `sandbox.steps` does, and if the
    child leaves a link behind.
    """
    names, size = [file.name for file in files], sum(file.stat().st_size for file in files)
    what = ", ".join(names)
    needs = _NEEDS[task]
    seconds = needs.seconds + int(needs.each * size / MIB)
    limits = sandbox.Limits(seconds, max(_GROW, needs.copies * size), wall=_SLOWER * seconds)
    inside = f"intrafusion.studies.uploads.checks:{task}"
    answer = yield from sandbox.steps(inside, workshop.folder, what, limits, {"files": names, **arguments}, tell)
    for folder, folders, made in os.walk(workshop.made):
        for name in (*folders, *made):
            kind = (Path(folder) / name).lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise IntrafusionError(f"rejected {what}: checking it left {name[:80]!r}, which is not a regular file")
    return answer


class Workshop:
    """A working folder for a child, next to the kept things; removed at the end of its block or with its last reference.

    folder: named after this process, so that another process can recognise what a killed one has left (see `stale_files`).
    given: copies of the user's files in it, which the child reads. made: a folder in it, for the child's output.
    """

    def __init__(self) -> None:
        stale_files.remove_once()
        self.folder = home().absolute() / f"{stale_files.CHECK}{stale_files.mark()}"
        with _in_words():
            self.folder.mkdir(0o700, parents=True)
        self.given: list[Path] = []
        self.made = self.folder / "made"
        self.close = weakref.finalize(self, remove_path, self.folder)

    def give(self, name: str, content: Path | memoryview) -> None:
        """Put a file into `given`, under its own name.

        Raises IntrafusionError for a duplicate name, or if the file cannot be written.
        """
        place = inside(self.folder / "given", name)
        if place.exists():
            raise IntrafusionError(f"two files are named {name}; rename one, for example x_train.npz and x_test.npz")
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
    """Yield a workshop with copies of a user's files.

    Raises IntrafusionError for a missing, empty or too large file. Messages within the block show the names of the files, not
    their folders.
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
        raise IntrafusionError(f"cannot save it: {error.strerror or type(error).__name__}") from error


def without_folders(message: str, *files: Path) -> str:
    """Return a message with the names of these files in place of their paths."""
    for folder in {place for file in files for place in (file.resolve().parent, file.parent) if place.name}:
        message = message.replace(f"{folder}/", "")
    return message


def remove(kind: str, name: str) -> None:
    """Remove a kept network (kind "models"), kept images ("images") or a lab run ("lab"), even if damaged.

    Raises IntrafusionError if there is none, or if it cannot be removed.
    """
    of = "lab/" if kind == RUNS else "kept/"
    name = check_name(name.removeprefix(of))
    found = [path for end in _ENDS[kind] if os.path.lexists(path := home() / kind / (name + end))]
    if not found:
        raise IntrafusionError(f"{of}{name} does not exist")
    try:
        for path in found:
            part = part_of(path)  # renamed first, so that a half-removed one is never listed
            path.rename(part)
            remove_path(part)
        if kind != IMAGES:
            (home() / kind / f"{name}.json").unlink(missing_ok=True)  # card file written by an older version
    except OSError as error:
        raise IntrafusionError(f"cannot remove {of}{name}: {error.strerror or type(error).__name__}") from error


def safe_name(file: str) -> str:
    """Return a valid name to keep a file under, derived from the file's own name."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(file).stem).strip(".-_")[:64]
    return stem or "mine"
