"""Folders of pictures: decoded once, by other processes, gone on with after a stop, a few where a few are asked for."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_folders import SHAPE, files_of, one_by_one, scattered
from PIL import Image
from places import ROOT
from store_processes import small_disk

import intrafusion as itf
from intrafusion.data import decode_cache
from intrafusion.data._decode_worker import decode
from intrafusion.data.decode_cache import Wanted, decoded
from intrafusion.runtime.cancellation import Cancelled, stoppable
from intrafusion.runtime.paths import home


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scattered(tmp_path_factory.mktemp("pictures"), 300)


def test_workers_give_what_one_process_gives(folder):
    told: list[tuple[int, int]] = []
    files = files_of(folder)
    found = decoded(folder, files, range(300), Wanted(SHAPE), lambda *progress: told.append(progress))
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, one_by_one(files))
    assert told == [(number, 300) for number in range(1, 301)]


def test_nothing_is_decoded_twice(folder, monkeypatch):
    files = files_of(folder)
    decoded(folder, files, range(300), Wanted(SHAPE))
    monkeypatch.setattr(decode_cache, "_fill", lambda images, files, todo, wanted: iter([1] * len(todo)))
    again = decoded(folder, files, range(300), Wanted(SHAPE), lambda *told: pytest.fail("something was decoded"))
    assert np.array_equal(again, one_by_one(files))


def test_some_rows_are_all_that_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(decode_cache, "_FEW", 10)
    files, rows = files_of(folder), list(range(0, 300, 9))
    some = decoded(folder, files, rows, Wanted(SHAPE))
    assert np.array_equal(some, one_by_one([files[row] for row in rows]))
    (done,) = home().glob("decoded/*/done.npy")
    assert np.load(done).nonzero()[0].tolist() == rows
    told = []
    decoded(folder, files, range(300), Wanted(SHAPE), lambda *progress: told.append(progress))
    assert told[0] == (len(rows) + 1, 300)


def test_another_folder_size_or_file_is_another_key(folder, tmp_path):
    files = files_of(folder)
    keys = {decode_cache._folder(folder, files, Wanted(shape, mode)) for shape in (SHAPE, (13, 12)) for mode in ("RGB", "L")}
    assert len(keys) == 4
    mine = scattered(tmp_path / "mine", 3)
    before = decode_cache._folder(mine, files_of(mine), Wanted(SHAPE))
    os.utime(files_of(mine)[0], (1, 1))
    assert decode_cache._folder(mine, files_of(mine), Wanted(SHAPE)) != before


def test_a_cancelled_folder_goes_on_where_it_was(folder):
    import threading

    files, stop = files_of(folder), threading.Event()

    def tell(done: int, total: int) -> None:
        if done == 120:
            stop.set()

    with pytest.raises(Cancelled), stoppable(stop):
        decoded(folder, files, range(300), Wanted(SHAPE), tell)
    told: list[tuple[int, int]] = []
    found = decoded(folder, files, range(300), Wanted(SHAPE), lambda *progress: told.append(progress))
    assert told[0][0] >= 121
    assert np.array_equal(found, one_by_one(files))


def test_a_killed_process_leaves_what_it_decoded(folder):
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom intrafusion.data.decode_cache import Wanted, decoded\n"
        "def tell(done, total):\n    if done == 100: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"folder = Path({str(folder)!r})\n"
        f"decoded(folder, sorted(folder.rglob('*.png')), range(300), Wanted({SHAPE}), tell)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert ended.returncode == -signal.SIGKILL
    (done,) = home().glob("decoded/*/done.npy")
    assert 100 <= np.load(done).sum() < 300
    files = files_of(folder)
    assert np.array_equal(decoded(folder, files, range(300), Wanted(SHAPE)), one_by_one(files))


def test_a_broken_picture_is_named_and_the_others_stay(tmp_path):
    root = scattered(tmp_path, 280)
    broken = files_of(root)[200]
    broken.write_bytes(b"no picture")
    with pytest.raises(itf.IntrafusionError) as caught:
        itf.load_data("imagenet", path=root, input_size=12)
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)
    Image.new("RGB", (20, 20), (1, 2, 3)).save(broken)
    assert len(itf.load_data("imagenet", path=root, input_size=12)) == 280


def test_a_worker_that_dies_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(decode_cache.sys, "executable", "/bin/true")
    with pytest.raises(itf.IntrafusionError, match="decoding process stopped"):
        decoded(folder, files_of(folder), range(300), Wanted(SHAPE))


def test_a_full_disk_is_refused_before(folder, monkeypatch):
    monkeypatch.setattr(decode_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(itf.IntrafusionError, match="GB are free"):
        decoded(folder, files_of(folder), range(300), Wanted(SHAPE))


def test_no_worker_stays(folder):
    before = children()
    decoded(folder, files_of(folder), range(300), Wanted((14, 14)))
    deadline = time.monotonic() + 30
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children() - before


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


class TestValidationFolder:
    """ImageNet's validation set: all pictures in one folder, their labels in a file."""

    LISTS = {  # noqa: RUF012
        "val.txt": "a.png 0\nb.png 999\nc.png 1\n",
        "labels.txt": "a n01440764\nb n15075141\nc n01443537\n",
        "LOC_val_solution.csv": "ImageId,PredictionString\na,n01440764 1 2 3 4 \nb,n15075141 1 2 n1 5 6\nc,n01443537 1\n",
        "labels.json": json.dumps({"a.png": 0, "b.png": 999, "c": 1}),
    }  # fmt: skip

    @pytest.fixture
    def flat(self, tmp_path):
        (tmp_path / "val").mkdir()
        for name in "abc":
            Image.new("RGB", (20, 20), (ord(name), 0, 0)).save(tmp_path / "val" / f"{name}.png")
        return tmp_path

    @pytest.mark.parametrize("place", ["", "val"])
    @pytest.mark.parametrize("name", LISTS)
    def test_lists_give_the_labels(self, flat, name, place):
        (flat / place / name).write_text(self.LISTS[name])
        data = itf.load_data("imagenet", path=flat, input_size=16)
        assert data.labels.tolist() == [0, 999, 1]
        assert data.images[:, 0, 5, 5].tolist() == [97, 98, 99]
        assert len(data.classes) == 1000

    @pytest.mark.parametrize(("text", "match"), [
        (None, "add a list of labels"),
        ("a.png 0\nb.png 1\n", "has no label for 1 of 3 images"),
        ("a.png 0\nb.png 1000\n", "line 2: '1000' is not a label"),
        ("a.png 0\nb.png fish\n", "line 2: 'fish'"),
        ("a.png\n", "line 1: ''"),
    ])  # fmt: skip
    def test_broken_lists_are_one_line(self, flat, text, match):
        if text is not None:
            (flat / "val.txt").write_text(text)
        with pytest.raises(itf.IntrafusionError, match=match) as caught:
            itf.load_data("imagenet", path=flat, input_size=16)
        assert "\n" not in str(caught.value)

    def test_a_limit_takes_of_each_label(self, flat):
        (flat / "val.txt").write_text("a.png 0\nb.png 0\nc.png 1\n")
        assert itf.load_data("imagenet", path=flat, input_size=16, limit=2).labels.tolist() == [0, 1]


@pytest.mark.reference
def test_the_thousand_images_are_the_same_from_the_file(reference):
    root = reference("data/imagenet_samples")
    whole = itf.load_data("imagenet", path=root)
    few = itf.load_data("imagenet", path=root, limit=200)  # decoded in this process
    assert len(whole) == 1000
    rows = [int((whole.labels == label).nonzero()[0]) for label in few.labels]
    assert torch.equal(whole.images[rows], few.images)
    assert torch.equal(itf.load_data("imagenet", path=root, limit=900).images, whole.images[:900])


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("name", ["images.npy", "done.npy"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda file: os.truncate(file, 0)])
def test_a_damaged_file_is_made_anew(folder, monkeypatch, name, damage):
    monkeypatch.setattr(decode_cache, "_FEW", 10)
    files = files_of(folder)[:20]
    decoded(folder, files, range(20), Wanted(SHAPE))
    (file,) = home().glob(f"decoded/*/{name}")
    damage(file)
    assert np.array_equal(decoded(folder, files, range(20), Wanted(SHAPE)), one_by_one(files))


def test_a_picture_that_goes_away_meanwhile_is_one_line(folder):
    files = [*files_of(folder), folder / "gone.png"]
    with pytest.raises(itf.IntrafusionError, match=r"gone\.png was removed"):
        decoded(folder, files, range(301), Wanted(SHAPE))


def fill_the_disk(folder: Path) -> None:
    """Another program fills the disk of `home()` after there was room: in this process, and in workers."""
    os.environ["INTRAFUSION_HOME"] = str(folder)
    decode_cache._check_room = lambda folder, needed: None
    pictures = scattered(folder / "pictures", 300)
    files, ballast = files_of(pictures), folder / "ballast"
    decode_cache._FEW = 10
    for number, rows in ((40, range(40)), (300, range(300))):  # which are few enough for one process, and which are not
        wanted = Wanted((64, 64))
        decoded(pictures, files[:number], [0, *range(2, 12)], wanted)
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with pytest.raises(itf.IntrafusionError, match=r"cannot write .*: No space left") as caught:
            decoded(pictures, files[:number], rows, wanted)
        assert "\n" not in str(caught.value)
        ballast.unlink()
        found = decoded(pictures, files[:number], rows, wanted)
        assert np.array_equal(found, np.stack([decode(file, (64, 64), "RGB", "always") for file in files[:number]]))
        del found
        shutil.rmtree(folder / "decoded")


def test_a_disk_that_is_full_meanwhile_is_one_line(tmp_path):
    script = "import sys, test_decode_cache as t; t.fill_the_disk(t.Path(sys.argv[1]))"
    command = [*small_disk(tmp_path), shlex.join([sys.executable, "-c", script, str(tmp_path)])]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
