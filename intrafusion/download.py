"""Fetching a public file once: with progress, a checksum, and never a half-written file under the final name."""

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from intrafusion.errors import IntrafusionError

Progress = Callable[[int, int], None]  # bytes done, bytes in all (0 when the server does not say)
_CHUNK = 1 << 18


def home() -> Path:
    """The folder that holds downloads: $INTRAFUSION_HOME, or ~/.cache/intrafusion."""
    return Path(os.environ.get("INTRAFUSION_HOME") or Path.home() / ".cache" / "intrafusion")


def fetch(url: str, path: Path, sha256: str = "", progress: Progress | None = None, timeout: float = 20) -> Path:
    """Download `url` to `path` unless it is there already; `sha256` is the digest's beginning, as torch.hub writes it.

    Raises IntrafusionError in one line (what was tried, why it failed, what to do) and leaves no partial file behind.
    """
    if path.exists():
        return path
    partial = path.with_name(path.name + f".part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = _stream(url, partial, progress, timeout)
        if not digest.startswith(sha256):
            raise IntrafusionError(
                f"{url} arrived with checksum {digest[:16]}... where {sha256}... was expected: nothing was kept; "
                f"try again, or put the right file at {path}"
            )
        partial.replace(path)
    except OSError as error:  # URLError, timeouts and a full disk alike
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise IntrafusionError(
            f"could not download {url} to {path}: {reason}; offline, use an embedded model (digits-resnet, "
            f"cifar10-resnet20) or put the file at {path}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _stream(url: str, partial: Path, progress: Progress | None, timeout: float) -> str:
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=timeout) as response, partial.open("wb") as file:
        total, done = int(response.headers.get("Content-Length") or 0), 0
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done, total)
    if total and done != total:
        raise OSError(f"the connection closed after {done:,} of {total:,} bytes")
    return digest.hexdigest()
