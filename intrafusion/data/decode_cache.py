"""Cache of decoded folders: pictures are decoded once, many of them by worker processes, into a memory-mapped file.

The file is stored under `home()`, keyed by the folder, its files and the size. A second file records which rows are done.
Interrupted work therefore resumes where it stopped, and only the requested images are decoded.
"""

import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from intrafusion.data import _decode_worker
from intrafusion.data._decode_worker import Rows, decode
from intrafusion.errors import IntrafusionError
from intrafusion.runtime.atomic_write import atomic_path, remove_path
from intrafusion.runtime.cancellation import OnProgress, checkpoint
from intrafusion.runtime.paths import home

_FEW = 256  # up to this many pictures are decoded directly, without a file
_SHARE = 64  # least pictures per worker process
_MOST_WORKERS = 16


@dataclass(frozen=True)
class Wanted:
    """The format to decode pictures to. shape: (H, W). mode: "RGB" or "L". crop: see `_decode_worker.pixels_of`."""

    shape: tuple[int, int]
    mode: str = "RGB"
    crop: str = "always"

    @property
    def pixels(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return (*self.shape, 3 if self.mode == "RGB" else 1)


def decoded(
    root: Path, files: Sequence[Path], rows: Sequence[int], wanted: Wanted, progress: OnProgress | None = None
) -> np.ndarray:
    """Return the pixels of these rows of the folder's files: uint8 (n, H, W, C), memory-mapped if all rows are requested.

    Raises IntrafusionError that names the picture that cannot be read; those before it stay decoded.
    """
    if len(rows) <= _FEW:
        images = np.empty((len(rows), *wanted.pixels), np.uint8)
        for place, row in enumerate(rows):
            checkpoint()
            images[place] = _decoded(files[row], wanted)
        return images
    folder = _folder(root, files, wanted)
    _make(folder, len(files), wanted)
    done = np.load(folder / "done.npy", mmap_mode="r+")
    todo = [row for row in rows if not done[row]]
    _check_room(folder, len(todo) * int(np.prod(wanted.pixels)))
    before = len(rows) - len(todo)
    for count, row in enumerate(_fill(folder / "images.npy", files, todo, wanted), before + 1):
        done[row] = True
        checkpoint()
        if progress:
            progress(count, len(rows))
    images = np.load(folder / "images.npy", mmap_mode="c")
    return images if len(rows) == len(files) else np.asarray(images[np.asarray(rows)])


def _folder(root: Path, files: Sequence[Path], wanted: Wanted) -> Path:
    """Return the cache folder of the pixels, named by the hash of what they depend on."""
    key = hashlib.sha256(f"{root.resolve()} {wanted}".encode())
    for file in files:
        try:
            told = file.stat()
        except OSError as error:
            raise IntrafusionError(f"{file} was removed while its folder was being read; run again") from error
        key.update(f"\n{file.relative_to(root)} {told.st_size} {told.st_mtime_ns}".encode())
    return home() / "decoded" / key.hexdigest()[:24]


def _make(folder: Path, count: int, wanted: Wanted) -> None:
    """Create the two files together, empty, unless they already exist in full length."""
    if _is_whole(folder, count, wanted):
        return
    remove_path(folder)
    try:
        with atomic_path(folder) as part:
            part.mkdir()
            np.lib.format.open_memmap(part / "images.npy", mode="w+", dtype=np.uint8, shape=(count, *wanted.pixels))
            np.save(part / "done.npy", np.zeros(count, np.bool_))  # not sparse: on a full disk, mapping that kills the process
    except IntrafusionError:
        if not _is_whole(folder, count, wanted):  # else another process was first
            raise


def _is_whole(folder: Path, count: int, wanted: Wanted) -> bool:
    """Return whether both files exist in full length; somebody may have removed them."""
    try:
        images, done = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "done"))
    except (OSError, ValueError, EOFError):
        return False
    return images.shape == (count, *wanted.pixels) and done.shape == (count,)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free - (256 << 20):
        raise IntrafusionError(
            f"decoded images need {needed / 1e9:,.1f} GB in {folder.parent}, but {free / 1e9:,.1f} GB are free; "
            "use fewer images (limit=, --limit), or set INTRAFUSION_HOME to another folder"
        )


def _decoded(file: Path, wanted: Wanted) -> np.ndarray:
    try:
        return decode(file, wanted.shape, wanted.mode, wanted.crop)
    except ValueError as error:
        raise IntrafusionError(f"{file} is not a readable image: {error}") from error


def _fill(images: Path, files: Sequence[Path], todo: Sequence[int], wanted: Wanted) -> Iterator[int]:
    """Decode these rows into the file, in any order, and yield each row once it is written."""
    count = min(os.cpu_count() or 1, _MOST_WORKERS, len(todo) // _SHARE)
    if count < 1:
        with Rows(images) as pixels:
            for row in todo:
                try:
                    pixels.write(row, _decoded(files[row], wanted))
                except OSError as error:
                    raise IntrafusionError(f"cannot write {images}: {error.strerror}") from error
                yield row
        return
    answers: queue.Queue[tuple[int, str | None] | None] = queue.Queue()
    workers = [
        _Worker(images, [(row, str(files[row])) for row in todo[first::count]], wanted, answers) for first in range(count)
    ]
    try:
        ended, got = 0, 0
        while ended < count:
            try:
                answer = answers.get(timeout=0.2)
            except queue.Empty:
                checkpoint()
                continue
            if answer is None:
                ended += 1
                continue
            row, wrong = answer
            if wrong is not None:
                unwritten = f"cannot write {images}: {wrong}"
                raise IntrafusionError(unwritten if row < 0 else f"{files[row]} is not a readable image: {wrong}")
            got += 1
            yield row
        if got < len(todo):
            raise IntrafusionError(
                f"an image decoding process stopped with {len(todo) - got:,} images left; run again to continue"
            )
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that decodes its share, and threads that feed it and put its answers into a queue; None at the end."""

    def __init__(self, images: Path, share: Sequence[tuple[int, str]], wanted: Wanted, answers: queue.Queue):
        self._process = subprocess.Popen(
            [sys.executable, "-P", _decode_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that it receives no Ctrl-C from the terminal
        )
        about = {"images": str(images), "mode": wanted.mode, "crop": wanted.crop}
        self._lines = [json.dumps(line) + "\n" for line in (about, *share)]
        self._answers = answers
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._tell, self._hear)]
        for thread in self._threads:
            thread.start()

    def _tell(self) -> None:
        assert self._process.stdin is not None
        try:
            with self._process.stdin as stdin:
                stdin.writelines(self._lines)
        except (BrokenPipeError, ValueError):  # the worker has ended
            pass

    def _hear(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                if line.endswith("\n"):
                    row, wrong = json.loads(line)
                    self._answers.put((row, wrong))
        self._answers.put(None)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()
        for thread in self._threads:
            thread.join()
