"""Download of public files, with progress, a checksum, and no partial file under the final name."""

import contextlib
import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from pathlib import Path

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.runtime.atomic_write import move_into_place, part_of
from intrafusion.runtime.cancellation import OnProgress

_CHUNK = 1 << 18


def fetch(url: str, path: Path, sha256: str = "", progress: OnProgress | None = None) -> Path:
    """Download `url` to `path` unless it already exists; see `stream`."""
    for done, total in stream(url, path, sha256):
        if progress:
            progress(done, total)
    return path


def stream(url: str, path: Path, sha256: str = "", timeout: float = 20) -> Iterator[tuple[int, int]]:
    """Download `url` to `path` unless it exists, yielding (bytes done, total bytes); stop iterating to cancel.

    sha256: start of the digest, as torch.hub writes it into file names. timeout: seconds without a byte. Raises
    IntrafusionError in one line (what was tried, why it failed, what to do); no partial file is left behind.
    """
    if path.exists():
        return
    partial = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = yield from _write(url, partial, timeout)
        if not digest.startswith(sha256):
            raise IntrafusionError(
                f"the checksum of {url} is {digest[:16]}..., not {sha256}...; the download was discarded; "
                f"try again, or put the right file at {path}"
            )
        move_into_place(partial, path)
    except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and a full disk alike
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = one_line(cause) if isinstance(cause, Exception) else " ".join(str(cause).split())
        raise IntrafusionError(
            f"cannot download {url} to {path}: {reason}; offline, use an embedded model (digits-resnet, "
            f"cifar10-resnet20) or put the file at {path}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _write(url: str, partial: Path, timeout: float) -> Generator[tuple[int, int], None, str]:
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=timeout) as response, partial.open("wb") as file:
        total, done = int(response.headers.get("Content-Length") or 0), 0
        while chunk := response.read1(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            yield done, total
    if total and done != total:
        raise OSError(f"the connection closed after {done:,} of {total:,} bytes")
    return digest.hexdigest()
