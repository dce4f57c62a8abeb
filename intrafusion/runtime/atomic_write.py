"""Files and folders that are written whole or not at all.

They are written under a temporary name beside their own, brought to the disk, and renamed: a process that is killed, a full
disk or a power cut leaves the old one or the new one. What such a process leaves of a temporary one, `stale_files` removes.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.runtime.stale_files import PART, is_left, mark

_FEW = 1000  # files of a folder that are brought to the disk one by one


def part_of(path: Path) -> Path:
    """A temporary name beside a file or folder, for this process alone; no listing shows it.

    What killed processes have left there under such a name is removed.
    """
    start = f".{path.name[:40]}."
    for other in path.parent.glob(f"{escape(start)}*{PART}"):
        if is_left(other):
            drop(other)
    return path.with_name(f"{start}{mark()}{PART}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file, or to make a folder, that takes the place of `path` when the block ends without an error.

    The folder that it lies in is made. A folder takes the place of none, or of an empty one. Raises IntrafusionError where
    it cannot be written; `path` is as it was then.
    """
    part = part_of(path)
    try:
        with plain_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            put(part, path)
    finally:
        drop(part)


def put(part: Path, path: Path) -> None:
    """Let what is written whole take its place, once it is on the disk."""
    _bring_to_disk(part)
    os.replace(part, path)
    _sync(path.parent)


def drop(path: Path) -> None:
    """Remove a file or a folder, whether it is there or not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _bring_to_disk(path: Path) -> None:
    """Wait until a file, or all of a folder, would survive a power cut."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    if len(files) > _FEW:
        os.sync()
        return
    for file in files:
        with file.open("r+b") as opened:
            os.fsync(opened.fileno())
    for folder in {file.parent for file in files} - {path.parent}:
        _sync(folder)


def _sync(folder: Path) -> None:
    """The same of a folder's names, on systems that can."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Problems of the disk while `path`, a file or a folder, is written, as one line."""
    try:
        yield
    except IntrafusionError as error:
        if isinstance(error.__cause__, Exception) and is_full(error.__cause__, path):
            raise _full(path) from error
        raise
    except (OSError, RuntimeError) as error:  # PyTorch has words of its own
        if is_full(error, path):
            raise _full(path) from error
        raise IntrafusionError(f"could not write {path}: {one_line(error)}") from error


def _full(path: Path) -> IntrafusionError:
    return IntrafusionError(f"the disk of {path} is full: free some space and run again; nothing half-written is left behind")


def is_full(error: Exception, path: Path) -> bool:
    """Whether the disk is the reason, which some libraries tell in their own words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if re.search(rf"os error ({errno.ENOSPC}|{errno.EDQUOT})\b", str(error)):  # safetensors
        return True
    if isinstance(error.__cause__, Exception):
        return is_full(error.__cause__, path)
    there = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    try:
        return shutil.disk_usage(there).free < 2**16
    except OSError:
        return False
