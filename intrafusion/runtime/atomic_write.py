"""Atomic writing of files and folders.

They are written under a temporary name next to the final one, flushed to disk, and renamed: a killed process, a full disk or a
power cut leaves either the old version or the new one. `stale_files` removes temporary files that killed processes leave
behind.
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

_FEW = 1000  # most files of a folder that are flushed one by one


def part_of(path: Path) -> Path:
    """Return a temporary name next to a file or folder, unique to this process and hidden from listings.

    Files that killed processes left there under such a name are removed.
    """
    start = f".{path.name[:40]}."
    for other in path.parent.glob(f"{escape(start)}*{PART}"):
        if is_left(other):
            remove_path(other)
    return path.with_name(f"{start}{mark()}{PART}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the path at which to write a file or folder that replaces `path` if the block ends without an error.

    The parent folder is created. A folder can only replace an empty folder, or none. Raises IntrafusionError if it cannot be
    written; `path` is then unchanged.
    """
    part = part_of(path)
    try:
        with plain_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            move_into_place(part, path)
    finally:
        remove_path(part)


def move_into_place(part: Path, path: Path) -> None:
    """Flush a completely written file or folder to disk, then move it to its final path."""
    _bring_to_disk(part)
    os.replace(part, path)
    _sync(path.parent)


def remove_path(path: Path) -> None:
    """Remove a file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _bring_to_disk(path: Path) -> None:
    """Flush a file, or all files of a folder, so that it survives a power cut."""
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
    """Flush a folder's entries to disk, on systems that support it."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Convert disk errors while `path`, a file or a folder, is written into one-line errors."""
    try:
        yield
    except IntrafusionError as error:
        if isinstance(error.__cause__, Exception) and is_full(error.__cause__, path):
            raise _full(path) from error
        raise
    except (OSError, RuntimeError) as error:  # PyTorch raises RuntimeError
        if is_full(error, path):
            raise _full(path) from error
        raise IntrafusionError(f"cannot write {path}: {one_line(error)}") from error


def _full(path: Path) -> IntrafusionError:
    return IntrafusionError(f"the disk of {path} is full; free some space and run again; no partial file is left")


def is_full(error: Exception, path: Path) -> bool:
    """Return whether a full disk is the cause, which some libraries report only in their message."""
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
