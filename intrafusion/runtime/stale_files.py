"""Cleanup after killed processes: temporary files and folders whose names contain the process they belong to."""

import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from intrafusion.runtime.paths import home
from intrafusion.runtime.processes import birth, host, is_running

PART = ".part"  # suffix of files being written, next to their final names
CHECK, UPLOAD, EXPORT = ".taking-", "intrafusion-upload-", "intrafusion-export-"  # prefixes of temporary folders' names
_MARK = re.compile(r"(\d+)-(\d*)-([0-9a-f]{8})-[0-9a-f]{8}")
_AGE = 3600.0  # seconds without a change after which a file of an unknown process counts as stale
_DEEP = 3  # depth of folders within the home that hold temporary files


def mark() -> str:
    """Return a part of a temporary name: this process, and eight random digits."""
    pid = os.getpid()
    return f"{pid}-{birth(pid)}-{_here()}-{secrets.token_hex(4)}"


@cache
def _here() -> str:
    return hashlib.sha256(host().encode()).hexdigest()[:8]


def temporary() -> Iterator[Path]:
    """Yield all temporary files and folders in the home, and ours in the system's temporary folder, of any process."""
    yield from _within(home(), _DEEP)
    for start in (UPLOAD, EXPORT):
        yield from Path(tempfile.gettempdir()).glob(f"{start}*")


def _within(folder: Path, deep: int) -> Iterator[Path]:
    try:
        entries = [*os.scandir(folder)]
    except OSError:  # it does not exist, or cannot be listed
        return
    for entry in entries:
        if entry.name.startswith(CHECK) or re.search(r"\.part[\d-]*$", entry.name):  # older versions append numbers
            yield Path(entry.path)
        elif deep > 1 and entry.is_dir(follow_symlinks=False):
            yield from _within(Path(entry.path), deep - 1)


def is_left(path: Path) -> bool:
    """Return whether a file is stale: its process is gone or, if that cannot be known, nothing changed for an hour."""
    found = _MARK.search(path.name)
    if found and found[3] == _here():
        return not is_running(int(found[1]), found[2])
    with suppress(OSError):
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        return time.time() - max(file.lstat().st_mtime for file in files) > _AGE
    return False  # it has disappeared meanwhile


def remove_stale() -> None:
    """Remove stale files and folders, as far as permissions allow."""
    for path in temporary():
        if is_left(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


@cache
def _removed_once(folder: Path) -> None:
    remove_stale()


def remove_once() -> None:
    """Remove stale files and folders, only on this process's first call."""
    _removed_once(home())
