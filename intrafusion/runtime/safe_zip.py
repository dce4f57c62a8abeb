"""Untrusted zip archives: checked before any content is read, and never unpacked under the names they give."""

import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from intrafusion.errors import IntrafusionError, one_line

MIB = 1 << 20
FILE = 400 * MIB  # most bytes of a file that a user provides: weights, program, images
UNPACKED = 2048 * MIB  # most bytes of an archive's unpacked content
MEMBERS = 200_000
_RATIO = 200  # highest compression ratio of a member
_TINY, _ARRAY = 4096, MIB  # bytes by which any member, and an array (such as sorted labels), may exceed it
_EXCESS = 4 * MIB  # bytes by which all members together may exceed it
_ENTRY = 250  # average bytes of a member's directory entry
_ZIP64 = b"PK\6\6"
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
DAMAGED = zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.LargeZipFile


def check_size(path: Path) -> None:
    """Raise IntrafusionError unless `path` is a non-empty file of at most FILE bytes."""
    if not path.is_file():
        raise IntrafusionError(f"no file at {path}; check the path")
    size = path.stat().st_size
    if not size:
        raise IntrafusionError(f"{path} is empty")
    if size > FILE:
        raise IntrafusionError(f"{path} has {size / MIB:,.0f} MiB; the limit is {FILE // MIB} MiB")


def check_count(path: Path, most: int | None = None) -> None:
    """Raise IntrafusionError for a zip archive of more than `most` members (default MEMBERS), before its directory is read.

    The count in its last record is not trusted: the signatures in the directory that ZipFile would read are counted too.
    """
    most = MEMBERS if most is None else most
    with path.open("rb") as file:
        record = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if record is None:
            raise zipfile.BadZipFile("File is not a zip file")
        signature, count, size, end = (record[place] for place in (0, 4, 5, 9))
        if signature == _ZIP64:
            file.seek(end - 20)
            if int.from_bytes(file.read(20)[8:16], "little") != (end := end - 76):  # other readers look there
                raise zipfile.BadZipFile("its end records are inconsistent")
        if count <= most and size > most * _ENTRY + MIB:
            raise IntrafusionError(f"{path} has a directory of {size / MIB:,.0f} MiB; the limit is {most:,} files")
        if count <= most:
            file.seek(max(0, end - size))
            count = file.read(size).count(b"PK\1\2")
    if count > most:
        raise IntrafusionError(f"{path} has {count:,} files; the limit is {most:,}")


@contextmanager
def open_zip(path: Path, most: int | None = None) -> Iterator[tuple[zipfile.ZipFile, list[zipfile.ZipInfo]]]:
    """Yield a zip archive and its files, after checking names, links, count, sizes and compression ratios.

    most: number of members allowed; None for MEMBERS. Raises IntrafusionError for an archive that breaks a rule or is damaged,
    including damage found while it is open.
    """
    try:
        check_count(path, most)
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            for info in infos:
                info.filename = _plain(info)
            _check(path, infos)
            yield archive, [info for info in infos if not info.is_dir()]
    except DAMAGED as error:
        if isinstance(error, IntrafusionError):
            raise
        raise IntrafusionError(f"{path} is not a readable archive: {one_line(error)}") from error


def _check(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    seen, excess = set(), 0
    for info in infos:
        name = repr(info.filename[:80])
        if not _is_inside(info.filename):
            raise IntrafusionError(f"{path} contains a file named {name}, which is outside its folder")
        if info.filename in seen:
            raise IntrafusionError(f"{path} contains two files named {name}")
        seen.add(info.filename)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise IntrafusionError(f"{path} contains {name}, which is a link or device; only regular files are supported")
        if info.flag_bits & 1:
            raise IntrafusionError(f"{path} is encrypted ({name}); save it without a password")
        if info.compress_type not in _METHODS:
            raise IntrafusionError(f"{path} compresses {name} with an unsupported method; use stored or Deflate")
        over = info.file_size - _RATIO * info.compress_size
        excess += max(0, over)
        if over > (_ARRAY if info.filename.endswith(".npy") else _TINY) or excess > _EXCESS:
            raise IntrafusionError(
                f"{path} contains {name}, which unpacks to {info.file_size / max(1, info.compress_size):,.0f} times its "
                f"size; the limit is {_RATIO} times"
            )
    packed, size = sum(info.compress_size for info in infos), path.stat().st_size
    if packed > size:
        raise IntrafusionError(f"{path} is not a readable archive: its files overlap")
    total = sum(info.file_size for info in infos)
    if total > (UNPACKED if size <= FILE else max(UNPACKED, size)):  # a user's own file may be larger if stored uncompressed
        raise IntrafusionError(f"{path} unpacks to {total / MIB:,.0f} MiB; the limit is {UNPACKED // MIB:,} MiB")


def _plain(info: zipfile.ZipInfo) -> str:
    """Return a member's name with slashes for Windows' backslashes, decoded as UTF-8, which macOS does not always declare."""
    name = info.filename
    if not info.flag_bits & 0x800 and not name.isascii():
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return name.replace("\\", "/")


def _is_inside(name: str) -> bool:
    if not name or name.startswith("/") or re.search(r"[\x00-\x1f]", name) or re.match(r"[A-Za-z]:", name):
        return False
    return ".." not in PurePosixPath(name).parts
