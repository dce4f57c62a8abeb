"""What killed processes leave behind: temporary files and folders whose names say which process they belong to."""

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

PART = ".part"  # the end of what is being written, beside what it becomes
CHECK, UPLOAD, EXPORT = ".taking-", "intrafusion-upload-", "intrafusion-export-"  # folders: how their names begin
_MARK = re.compile(r"(\d+)-(\d*)-([0-9a-f]{8})-[0-9a-f]{8}")
_AGE = 3600.0  # seconds without a change, after which that of a process that nobody can ask about is left over
_DEEP = 3  # folders within the home that hold temporary files


def mark() -> str:
    """A part of a temporary name: this process, and eight digits of its own."""
    pid = os.getpid()
    return f"{pid}-{birth(pid)}-{_here()}-{secrets.token_hex(4)}"


@cache
def _here() -> str:
    return hashlib.sha256(host().encode()).hexdigest()[:8]


def temporary() -> Iterator[Path]:
    """All temporary files and folders in the home, and ours in the system's temporary folder, whoever they belong to."""
    yield from _within(home(), _DEEP)
    for start in (UPLOAD, EXPORT):
        yield from Path(tempfile.gettempdir()).glob(f"{start}*")


def _within(folder: Path, deep: int) -> Iterator[Path]:
    try:
        entries = [*os.scandir(folder)]
    except OSError:  # it is not there, or cannot be looked at
        return
    for entry in entries:
        if entry.name.startswith(CHECK) or re.search(r"\.part[\d-]*$", entry.name):  # older versions put numbers behind
            yield Path(entry.path)
        elif deep > 1 and entry.is_dir(follow_symlinks=False):
            yield from _within(Path(entry.path), deep - 1)


def is_left(path: Path) -> bool:
    """Whether nobody writes it any more: its process is gone, or, where that cannot be known, nothing changed for an hour."""
    found = _MARK.search(path.name)
    if found and found[3] == _here():
        return not is_running(int(found[1]), found[2])
    with suppress(OSError):
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        return time.time() - max(file.lstat().st_mtime for file in files) > _AGE
    return False  # it has gone meanwhile


def remove() -> None:
    """Remove what is left over, as far as that is permitted."""
    for path in temporary():
        if is_left(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


@cache
def _removed_once(folder: Path) -> None:
    remove()


def remove_once() -> None:
    """Remove what is left over, the first time that this process asks for it."""
    _removed_once(home())
