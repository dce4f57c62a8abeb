"""Kill each writer of kept files at random moments, and run it on a full disk: the old or the new file must be intact.

python tests/support/writers.py KILLS SEED [DISK]: KILLS kills of each writer. If DISK is given, a folder that is a disk of
6 MB, each writer also runs on that disk when it is full. One process loads the library and forks the writers, so that a kill
needs no new start.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import own_files
import pytest
import torch
from picture_folders import SHAPE, files_of, one_by_one, scattered
from quick_runs import QUICK, plain

import intrafusion as itf
from intrafusion.data import decode_cache
from intrafusion.data.datasets import kept_data
from intrafusion.data.decode_cache import Wanted, decoded
from intrafusion.models.hub import describe, keep, kept_names
from intrafusion.reporting import export
from intrafusion.runtime import stale_files
from intrafusion.runtime.atomic_write import remove_path
from intrafusion.runtime.cancellation import Cancelled
from intrafusion.runtime.paths import home
from intrafusion.studies.session import Session, open_session
from intrafusion.studies.uploads import remove, take_data, take_weights
from intrafusion.training.checkpoint import load
from intrafusion.training.methods.runs import run_training, runs

SPEC = itf.PruneSpec(model="digits-mlp", sparsity=0.5, limit=50)


class Keeping:
    """Writer that keeps two networks under one name, in turn."""

    def __init__(self, folder: Path):
        self.networks = [itf.load_model(name) for name in ("digits-mlp", "digits-resnet")]
        keep(self.networks[0], "mine")

    def work(self) -> None:
        for network in reversed(self.networks):
            keep(network, "mine")

    def check(self) -> None:
        assert kept_names() == ["kept/mine"]
        assert describe("kept/mine")["weights"] == "kept"
        model = itf.load_model("kept/mine")
        assert any(
            [*model.state_dict()] == [*known.state_dict()]
            and torch.equal(model(known.card.example()), known(known.card.example()))
            for known in self.networks
        )


class Training:
    """Writer of a lab run that is stopped, resumed, stopped again, and completed."""

    def __init__(self, folder: Path):
        *self.steps, self.whole = run_training(QUICK)
        self.path = self.whole.path
        remove_path(self.path)

    def work(self) -> None:
        for stop in (2, 5, 10_000):
            told = run_training(QUICK)
            with suppress(Cancelled):
                for number, _ in enumerate(told):
                    if number == stop:
                        told.throw(Cancelled())
        remove_path(self.path)

    def check(self) -> None:
        for found in runs():
            assert found.outcome.accuracy == self.whole.outcome.accuracy
        for state in self.path.with_suffix(".phases").glob("[!.]*"):
            assert json.loads(state.read_text()) if state.suffix == ".looks" else load(state)

    def finish(self) -> None:
        *steps, whole = run_training(QUICK)
        assert plain(steps) == plain(self.steps)
        assert whole.outcome.accuracy == self.whole.outcome.accuracy


class Exporting:
    """Writer of an export folder, which appears only when complete."""

    FILES = ("model.json", "model.safetensors", "report.html", "report.md", "spec.json")

    def __init__(self, folder: Path):
        self.session: Session = open_session(SPEC)
        self.out = folder / "exports" / "net"

    def work(self) -> None:
        for _ in export(SPEC, self.session, self.out, ["safetensors"]):
            pass
        self.out.rename(self.out.with_name(f"done{random.random()}"))

    def check(self) -> None:
        for made in self.out.parent.glob("[!.]*"):
            assert tuple(sorted(file.name for file in made.iterdir())) == self.FILES
            itf.load_model("digits-mlp", made / "model.safetensors")
            remove_path(made)

    def finish(self) -> None:
        self.work()
        assert not [*self.out.parent.glob(".*")]


class Decoding:
    """Writer that decodes pictures into a cache file."""

    def __init__(self, folder: Path):
        decode_cache._SHARE = 10_000  # decode in this process; tests/data/test_decode_cache.py kills decoders with workers
        self.pictures = scattered(folder / "pictures", 300)
        self.files = files_of(self.pictures)
        self.expected = one_by_one(self.files)

    def work(self) -> None:
        remove_path(home() / "decoded")
        decoded(self.pictures, self.files, range(300), Wanted(SHAPE))

    def check(self) -> None:
        assert np.array_equal(decoded(self.pictures, self.files, range(300), Wanted(SHAPE)), self.expected)
        assert len([*(home() / "decoded").glob("*")]) == 1


class Uploading:
    """Writer that checks and keeps uploaded weights and images, and removes them."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.weights = own_files.save_state(folder / "w.safetensors", own_files.mlp_state())
        self.images = folder / "x.npz"
        np.savez(self.images, images=np.zeros((500, 8, 8, 1), np.uint8), labels=np.arange(500) % 3)

    def work(self) -> None:
        take_weights(self.weights, "digits-mlp", "theirs")
        take_data([self.images], "theirs")
        self.finish()

    def check(self) -> None:
        for name in kept_names():
            assert describe(name)["weights"] == "kept"
            itf.load_model(name)
        for name in kept_data():
            assert len(itf.load_data(name)) == 500
        self.finish()

    def finish(self) -> None:
        for kind, known in (("models", "kept/theirs" in kept_names()), ("images", "kept/theirs" in kept_data())):
            if known:
                remove(kind, "theirs")


WRITERS = {"keep": Keeping, "lab": Training, "export": Exporting, "decode": Decoding, "upload": Uploading}


@dataclass
class Kills:
    """Kills of one writer. midway: how many came while a file was partially written."""

    name: str
    kills: int = 0
    midway: int = 0
    seconds: float = 0.0


def forked(work: Callable[[], None]) -> int:
    """Fork a process that repeats `work` until it is killed, and return its id. Errors go to stderr."""
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                work()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return pid


def killed(number: int, seed: int, folder: Path) -> Iterator[Kills]:
    """Kill each writer `number` times. Raise AssertionError if a partial file is visible or left behind."""
    chance = random.Random(seed)
    for name, kind in WRITERS.items():
        os.environ["INTRAFUSION_HOME"] = str(folder / name / "home")
        began, tally, writer = time.monotonic(), Kills(name), kind(folder / name)
        writer.work()
        start = time.monotonic()
        writer.work()
        whole = time.monotonic() - start
        while tally.kills < number:
            pid = forked(writer.work)
            time.sleep(chance.uniform(0, 1.5 * whole))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert os.WIFSIGNALED(status), f"{name} failed by itself"
            tally.kills += 1
            tally.midway += any(True for _ in stale_files.temporary()) or any((folder / name).rglob(".*.part"))
            stale_files.remove_stale()
            assert not [*stale_files.temporary()]
            writer.check()
        if hasattr(writer, "finish"):
            writer.finish()
        tally.seconds = time.monotonic() - began
        yield tally


def full(folder: Path) -> None:
    """Run each writer on a full disk.

    It must fail with a one-line error, keep the old file and leave no partial one, and then succeed once space is free.
    """
    for name, kind in WRITERS.items():
        os.environ["INTRAFUSION_HOME"] = str(folder / name)
        with tempfile.TemporaryDirectory() as elsewhere:
            writer = kind(folder / name if name == "export" else Path(elsewhere))
            if name == "decode":
                decode_cache._check_room = lambda folder, needed: None
            ballast = folder / "ballast"
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with pytest.raises(itf.IntrafusionError, match=r"is full; free|No space left") as caught:
                writer.work()
            print(name, caught.value)
            assert "\n" not in str(caught.value)
            assert not [*stale_files.temporary(), *folder.rglob(".*.part")]
            if name == "keep":
                writer.check()
            ballast.unlink()
            writer.work()
            writer.check()
        remove_path(folder / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        tempfile.tempdir = place  # a folder that only this process writes to
        for found in killed(int(sys.argv[1]), int(sys.argv[2]), Path(place)):
            print(
                f"  {found.name}: {found.kills} kills, {found.midway} of them while something was half-written, "
                f"in {found.seconds:.0f} s; what was there was whole",
                flush=True,
            )
        if len(sys.argv) > 3:
            full(Path(sys.argv[3]))
