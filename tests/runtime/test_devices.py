import os
import subprocess
import sys
import threading

import pretend_device
import pytest
import torch

import intrafusion as itf
from intrafusion.runtime.devices import (
    CPU,
    choose_device,
    deterministic,
    device_names,
    device_of,
    doubled,
    float32_without_tf32,
    has_float64,
)


def test_without_an_accelerator_auto_is_the_cpu():
    assert choose_device() == CPU == choose_device("cpu")
    assert device_names()[-1] == "cpu"


@pytest.mark.gpu
def test_with_an_accelerator_auto_is_the_first_one():
    assert device_names()[0] == "cuda:0"
    assert choose_device() == torch.device("cuda:0")
    assert itf.open_session("digits-mlp").device == torch.device("cuda:0")


@pytest.mark.gpu
def test_an_accelerator_that_does_not_work_is_passed_over(monkeypatch):
    def broken(*_, device=None, **__):
        raise RuntimeError("CUDA driver version is insufficient\nfor CUDA runtime version")

    monkeypatch.setattr(torch, "ones", broken)
    assert choose_device() == CPU
    with pytest.raises(itf.IntrafusionError, match=r"not available \(.*insufficient.*; choose auto or cuda:0 or cpu$"):
        choose_device("cuda:0")


@pytest.mark.parametrize("name", ["", "meta", "gpu", "cuda:99", "cuda:-1", "mps", "xpu"])
def test_another_device_is_one_line_that_names_those_there_are(name):
    with pytest.raises(itf.IntrafusionError, match=r"choose auto or .*cpu$") as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


def test_the_device_of_a_network_without_parameters_is_that_of_its_buffers():
    norm = torch.nn.BatchNorm2d(3, affine=False).to("meta")
    assert (device_of(norm), device_of(torch.nn.ReLU())) == (torch.device("meta"), CPU)


@pytest.mark.parametrize("switch", [float32_without_tf32, deterministic])
def test_settings_hold_until_the_last_thread_has_left(switch):
    before, inside, go = switch._read(), threading.Event(), threading.Event()

    def other() -> None:
        with switch():
            inside.set()
            go.wait(10)

    thread = threading.Thread(target=other)
    with switch():
        thread.start()
        inside.wait(10)
    assert switch._read() == switch._values
    go.set()
    thread.join()
    assert switch._read() == before


class TestPretended:
    """What the pretended device must do for other tests to mean anything."""

    pytestmark = pytest.mark.skipif(pretend_device.install() is not None, reason=str(pretend_device.install()))

    def test_it_is_there_only_while_it_is_present(self):
        assert not torch.cuda.is_available()
        with pretend_device.present():
            assert torch.cuda.get_device_name() == pretend_device.NAME
            assert torch.ones(2, device="cuda").device == torch.device("cuda:0")
        assert not torch.cuda.is_available()
        assert os.environ.get("PRETEND_DEVICE") is None

    def test_two_devices_in_one_operator_are_refused_as_are_arrays(self):
        with pretend_device.present():
            there = torch.ones(2, device="cuda")
            with pytest.raises(RuntimeError, match="two devices"):
                there + torch.ones(2)
            with pytest.raises(TypeError, match="numpy"):
                there.numpy()
            assert (there + torch.tensor(1.0)).tolist() == [2, 2]

    def test_kernels_copies_and_waits_are_counted(self):
        with pretend_device.present():
            with pretend_device.counting() as found:
                there = torch.ones(3).to("cuda")
                for _ in range(5):
                    there = there * 2
                assert there[0].item() == 32
            assert (found["kernel aten::mul.out"], found["sync aten::_local_scalar_dense"]) == (5, 1)
            assert (found["copies"], found["waits"], found["bytes up"]) == (1, 2, 12)

    def test_memory_ends(self):
        with pretend_device.present():
            pretend_device.limit(1000)
            with pytest.raises(torch.OutOfMemoryError):
                torch.ones(1000, device="cuda")

    def test_without_float64_doubles_are_made_on_the_cpu(self):
        with pretend_device.present(no_double=True):
            there = torch.ones(3, device="cuda")
            with pytest.raises(TypeError, match="float64"):
                there.double()
            assert not has_float64(there.device)
            assert doubled(there).device == CPU
        with pretend_device.present():
            assert doubled(torch.ones(3, device="cuda")).device == torch.device("cuda:0")

    def test_a_child_process_has_it_too(self):
        with pretend_device.present():
            command = [sys.executable, "-c", "import torch; print(torch.ones(2, device='cuda').sum().item())"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.stdout == "2.0\n", done.stderr
