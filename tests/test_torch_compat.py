import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch import fx, nn

from intrafusion import _torch_compat


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout.strip(), done.stderr


def test_torchvision_imports_and_runs_after_the_package():
    code = (
        "import intrafusion, torch; from torchvision import models, datasets, transforms; "
        "print(tuple(models.squeezenet1_1(num_classes=3)(torch.zeros(1, 3, 64, 64)).shape))"
    )
    assert run(code) == (0, "(1, 3)", "")


@pytest.mark.parametrize("name", ["nms", "qnms"])
def test_the_operators_that_torchvision_asks_for_are_declared_once(name):
    operator = getattr(torch.ops.torchvision, name).default
    assert [argument.name for argument in operator._schema.arguments] == ["dets", "scores", "iou_threshold"]
    with pytest.raises(RuntimeError):  # a second declaration fails, so one that torchvision made must not be repeated
        torch.library.Library("torchvision", "FRAGMENT").define(
            next(schema for schema in _torch_compat.SCHEMAS if schema.startswith(f"{name}("))
        )


def library_of(monkeypatch, folders):
    spec = ModuleSpec("torchvision", None, is_package=True) if folders is not None else None
    if spec is not None:
        spec.submodule_search_locations = folders
    monkeypatch.setattr(_torch_compat, "find_spec", lambda name: spec)


def test_without_torchvision_no_operators_load(monkeypatch):
    library_of(monkeypatch, None)
    assert not _torch_compat.compiled_operators_load()


def test_without_a_compiled_library_no_operators_load(monkeypatch, tmp_path):
    library_of(monkeypatch, [str(tmp_path)])
    assert not _torch_compat.compiled_operators_load()


def test_a_library_of_another_build_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "_C.so").write_bytes(b"no library for this torch")
    library_of(monkeypatch, [str(tmp_path)])
    assert not _torch_compat.compiled_operators_load()


def test_a_library_that_loads_is_enough(monkeypatch, tmp_path):
    (tmp_path / "_C.so").write_bytes(b"")
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    library_of(monkeypatch, [str(tmp_path)])
    assert _torch_compat.compiled_operators_load()
    assert loaded == [str(tmp_path / "_C.so")]


class Halting(nn.Module):
    """Waits in the middle of its forward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.halfway, self.go_on = threading.Event(), threading.Event()

    def forward(self, x):
        x = self.first(x)
        self.halfway.set()
        assert self.go_on.wait(60)
        return self.last(x)


def test_networks_run_and_are_traced_while_another_thread_traces():
    network, other, images = Halting(), nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(2, 4)
    expected, usual = other(images), (nn.Module.__call__, nn.Module.__getattr__)
    with ThreadPoolExecutor(2) as threads:
        traced = threads.submit(lambda: fx.Tracer().trace(network))
        assert network.halfway.wait(60)
        waits = threads.submit(lambda: fx.Tracer().trace(other))
        assert other(images).equal(expected)
        assert type(network.first(images)) is torch.Tensor  # of the traced network itself
        assert type(network.last.weight) is nn.Parameter
        network.go_on.set()
        assert [node.name for node in traced.result(60).nodes] == ["x", "first", "last", "output"]
        assert [node.name for node in waits.result(60).nodes] == ["input_1", "_0", "_1", "output"]
    assert (nn.Module.__call__, nn.Module.__getattr__) == usual
