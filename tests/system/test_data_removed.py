"""Images that are removed, or cut short, while a study of the command line looks at them."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from places import ROOT
from study_processes import STUDY, check_sound, finished, plain, read

import intrafusion as itf
from intrafusion.runtime.paths import home

FEWER, POINTS = ("--sparsity", "0.1:0.7:0.2"), 4 * 2 * 2
SEEN = 300  # images: more than are decoded without a file


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """The digits' test images, as a person's own file."""
    data = itf.load_data("digits")
    path = tmp_path / "mine.npz"
    np.savez(path, images=data.images[:SEEN].permute(0, 2, 3, 1).numpy(), labels=data.labels[:SEEN].numpy())
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The same as a folder of pictures."""
    data = itf.load_data("digits")
    for number, (image, label) in enumerate(zip(data.images[:SEEN], data.labels[:SEEN], strict=True)):
        folder = tmp_path / "mine" / str(int(label))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{number:03}.png")
    return tmp_path / "mine"


def remove(source: Path) -> None:
    if source.is_dir():
        shutil.rmtree(source)
        shutil.rmtree(home() / "decoded")
    else:
        source.unlink()


def cut_short(source: Path) -> None:
    """Leave nothing of the decoded images."""
    (file,) = home().glob("decoded/*/images.npy")
    os.truncate(file, 0)


@pytest.mark.parametrize(("kind", "harm"), [("npz", remove), ("pictures", remove), ("pictures", cut_short)])
def test_in_the_midst_of_a_study(tmp_path, request, kind, harm):
    """It goes on from what it holds; a map that is cut short ends it like a kill does, and the next one makes the map anew."""
    source, path = request.getfixturevalue(kind), tmp_path / "s.sqlite"
    about = ["--data", "own", "--data-path", str(source), *FEWER]
    undisturbed, _ = finished(tmp_path / "undisturbed.sqlite", *about)
    words = [sys.executable, "-m", "intrafusion", *STUDY, "--store", str(path), *about]
    words += ["--memory", "0"] if harm is cut_short else []  # so that it looks at the images again
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "pipesize": 4096}
    with subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as process:
        lines = [process.stdout.readline() for _ in range(5)]
        assert all(lines), process.stderr.read()
        harm(source)
        rest, err = (
            process.stdout.read(),
            process.stderr.read(),
        )  # communicate() would miss what readline() has read ahead
    printed = plain(read("".join(lines) + rest))
    check_sound(path)
    if harm is remove:
        assert process.returncode == 0, err
        assert len(err.splitlines()) == 1
    else:
        assert process.returncode == -signal.SIGBUS, err
        rows, counts = finished(path, *about)
        assert counts[1] >= len(printed)
        assert printed.items() <= plain(rows).items()
        printed = plain(rows)
    assert printed == plain(undisturbed)
    assert len(printed) == POINTS
