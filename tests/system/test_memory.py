"""Memory that really runs out: processes whose address space is bounded, so that what is big does not fit and the rest does."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from places import ROOT
from study_processes import PATIENCE, told

from intrafusion.cli.main import main
from intrafusion.errors import IntrafusionError, is_out_of_memory, reason
from intrafusion.studies.store.sqlite import Store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's address space")
SAID = "out of memory; use fewer images (limit, calibration), cache less (--memory) or leave out wide groups"
ALONE = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # a thread's arena takes 128 MB of the addresses
BOUND = """
import resource
def bound(room):
    '''Let this process have so many bytes more than it has.'''
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
"""
# a group of 5,000 channels, whose distances are 200 MB and made of twice that, in front of one of 16
WIDE = f"""
import os
import ot, scipy.optimize, sklearn.cluster, torch, torch_pruning  # a library that is not there yet needs room, too
{BOUND}
CARD = {{"mean": [0.5], "std": [0.3], "input_size": [1, 8, 8], "classes": 10, "dataset": "digits"}}
def make():
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 5000), torch.nn.ReLU(), torch.nn.Linear(5000, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
    if "ROOM" in os.environ and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        bound(int(os.environ["ROOM"]))
    return torch.nn.Sequential(torch.nn.Flatten(), *layers)
"""


def test_a_point_without_room_fails_alone_and_is_tried_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "wide_network.py").write_text(WIDE)
    words = ["sweep", "--model", "wide_network:make", "--data", "digits", "--limit", "all", "--sparsity", "0.05",
             "--name", "s", "--store", str(tmp_path / "s.sqlite"), "--json"]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, **ALONE, "PYTHONPATH": path, "ROOM": "190000000"}
    small = subprocess.run(
        [sys.executable, "-m", "intrafusion", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert small.returncode == 1, small.stderr
    assert [json.loads(line)["groups"] for line in small.stdout.splitlines()] == [["3"], ["3"]]
    *failed, summary = small.stderr.splitlines()
    assert failed == [f"failed: 1, l1, 5%, {merge}: {SAID}" for merge in ("drop", "fusion")]
    assert summary == "4 points: 0 from the store, 2 measured, 2 failed"
    with Store(tmp_path / "s.sqlite") as store:
        assert list(store.failures("s").values()) == [SAID, SAID]

    monkeypatch.syspath_prepend(tmp_path)
    assert main(words) == 0
    assert told(capsys.readouterr().err) == (4, 2, 2, 0)
    with Store(tmp_path / "s.sqlite") as store:
        assert (store.study("s").done, store.study("s").failed) == (4, 0)


ONE_BY_ONE = f"""
import torch, intrafusion as itf
from intrafusion.evaluation.incremental import Meter
{BOUND}
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 128, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    torch.nn.Linear(128, 5)
).eval()
model.card = itf.ModelCard("m", (0.5,), (0.3,), (1, 96, 96), 5, "noise")
noise = torch.randint(0, 256, (80, 1, 96, 96), dtype=torch.uint8)
data = itf.ImageData("noise", "test", noise, torch.arange(80) % 5, tuple("abcde"))
expected = Meter(model, data, batch=10).dense(80)
bound(120_000_000)
meter = Meter(model, data)
assert meter.batch < 64, meter.batch
assert torch.equal(meter.dense(80), expected)
"""


def test_a_network_that_64_images_are_too_much_for_sees_fewer_at_once():
    env = {**os.environ, **ALONE}
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr


def refused_by_torch():
    torch.empty(1 << 60, dtype=torch.uint8)


def refused_by_numpy():
    np.ones(1 << 60, np.uint8)


def refused_by_python():
    bytearray(1 << 62)


def refused_by_a_device():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB")


def refused_by_a_library():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    "act", [refused_by_torch, refused_by_numpy, refused_by_python, refused_by_a_device, refused_by_a_library]
)
def test_memory_is_said_in_words_whoever_refuses_it(act):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        act()
    assert reason(caught.value) == SAID


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("mat1 and mat2 shapes\nmore"), "RuntimeError: mat1 and mat2 shapes"),
        (ValueError("out of memory"), "ValueError: out of memory"),
        (IntrafusionError("no file at x"), "no file at x"),
        (KeyError(), "KeyError: KeyError"),
    ],
)
def test_other_failures_are_not_taken_for_it(error, said):
    assert not is_out_of_memory(error)
    assert reason(error) == said
