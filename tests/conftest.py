"""Shared fixtures: the reference folder beside the checkout, and small networks with every kind of coupling."""

import contextlib
import functools
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pretend_device
import pytest
import torch
import torch.nn.functional as F
from places import ROOT, TESTS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import intrafusion as itf  # before torchvision, which it makes importable
from intrafusion.models.architectures import ResNet, Vgg, mlp
from intrafusion.runtime import sandbox

# processes that tests start find the modules of tests/support, too
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS / "support"), os.environ.get("PYTHONPATH")]))

# tests never write to the user's own store; the dashboards of the browser tests share this one
os.environ["INTRAFUSION_HOME"] = tempfile.mkdtemp(prefix="intrafusion-tests-")
os.environ["INTRAFUSION_STORE"] = str(Path(os.environ["INTRAFUSION_HOME"]) / "studies.sqlite")

NO_DEVICE = pretend_device.install()  # before any backward pass

torch.set_num_threads(1)  # the networks are tiny: on a shared machine, waiting for a second thread would take ten times longer

SHARED = Path(os.environ.get("INTRAFUSION_SHARED", ROOT.parent / "shared"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedule each test file in one process, and all browser tests in a single process."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "browser" if "browser/" in path else path

    config.option.loadscopereorder = False  # keep the browser tests first, because they take longest
    return Scheduling(config, log)


_PROCESSES = (
    "shutdown sandbox cluster in_memory main landscape_command studies_commands hostile_flags tutorial documents light_imports"
)
_LARGE = re.compile(r"cifar100?-|imagenet|timm|mobilenet|densenet|resnet18|resnet-projection|squeezenet|vgg1")  # networks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what drives browsers, starts processes, reads real data, or runs a large network."""
    files = {f"test_{name}.py" for name in _PROCESSES.split()}  # besides those in system/, all of which do
    for item in items:
        uses = {"reference", "child"} & {*getattr(item, "fixturenames", ())}
        if uses or {"browser", "system"} & {*item.path.parts} or item.path.name in files or _LARGE.search(item.name):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Path]:
    """Return a function that finds a file of the reference folder by relative path, and skips the test if it is absent."""

    def path(relative: str) -> Path:
        file = SHARED / relative
        if not file.exists():
            pytest.skip(f"no {file}: set INTRAFUSION_SHARED to the folder that holds {relative}")
        return file

    return path


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test an empty home and store, so that it measures and trains by itself."""
    folder = tmp_path_factory.mktemp("store")
    monkeypatch.setenv("INTRAFUSION_STORE", str(folder / "studies.sqlite"))
    monkeypatch.setenv("INTRAFUSION_HOME", str(folder))


@pytest.fixture(autouse=True)
def cuda(request: pytest.FixtureRequest) -> Generator[None]:
    """Give tests marked gpu the machine's CUDA device, or a pretended one."""
    if "gpu" not in request.keywords or torch.cuda.is_available():
        yield
        return
    if NO_DEVICE:
        assert "INTRAFUSION_TEST_GPU" not in os.environ, NO_DEVICE
        pytest.skip(NO_DEVICE)
    with pretend_device.present():
        yield


@pytest.fixture
def child() -> None:
    """Let a test read files in real child processes, each of which takes seconds to import PyTorch."""


@pytest.fixture(autouse=True)
def own_files_are_read_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the file tasks of child processes in this process, unless the test uses the fixture `child`."""
    if "child" not in request.fixturenames:
        monkeypatch.setattr(sandbox, "steps", _steps)


def _steps(
    task: str, folder: Path, what: str, limits: Any, arguments: dict[str, Any], note: Any
) -> Generator[tuple[int, int], None, Any]:
    """Do the work of `sandbox.steps` without a child process."""
    module, _, name = task.partition(":")
    told: list[tuple[int, int]] = []
    work = getattr(importlib.import_module(module), name)
    (folder / "given").mkdir(exist_ok=True)
    with contextlib.chdir(folder / "given"):
        answer = work(folder, lambda *step: told.append(step), **json.loads(json.dumps(arguments)))
    yield from told
    return json.loads(json.dumps(answer))


@pytest.fixture(autouse=True)
def own_main(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore `__main__` after each test: Streamlit's page tests replace it, and a later child process would run it."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


def randomise(model: nn.Module) -> nn.Module:
    """Randomise weights so that the signal reaches the last layer, and norms so that they are not trivial, to reveal errors."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, _BatchNorm):
            if module.track_running_stats:
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                module.weight.data[::3] *= -1
                nn.init.normal_(module.bias, 0, 0.3)
    return model.eval().requires_grad_(False)


class Pooled(nn.Module):
    """A body, global average pooling, and a linear head."""

    def __init__(self, body: nn.Module, channels: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def conv(n_in: int, n_out: int, groups: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2, groups=groups)


def conv_bn(n_in: int, n_out: int, groups: int = 1, kernel: int = 3) -> list[nn.Module]:
    return [conv(n_in, n_out, groups, kernel), nn.BatchNorm2d(n_out), nn.ReLU()]


class Fire(nn.Module):
    """SqueezeNet's fire module: squeeze, then two concatenated expansions of different widths (Iandola et al. 2016)."""

    def __init__(self, n_in: int, squeeze: int, one: int, three: int):
        super().__init__()
        self.squeeze = nn.Conv2d(n_in, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, one, 1), conv(squeeze, three)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class PreActivation(nn.Module):
    """A residual block whose norms read the sum and so cannot be folded (He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.conv1 = conv(3, 6), nn.BatchNorm2d(6), conv(6, 4)
        self.norm2, self.conv2, self.norm3 = nn.BatchNorm2d(4), conv(4, 6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return F.relu(self.norm3(x))


class SqueezeExcite(nn.Module):
    """A block that multiplies channels by gates computed from the channel means (Hu et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 6), nn.BatchNorm2d(6)
        self.down, self.up = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Doubled(nn.Module):
    """A network that concatenates the same channels twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = conv(3, 4), conv(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return F.relu(self.mix(torch.cat([x, x], 1)))


def _densenet() -> nn.Module:
    from torchvision.models.densenet import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=5)


def _mobilenet() -> nn.Module:
    from torchvision.models import MobileNetV2
    from torchvision.ops import Conv2dNormActivation

    blocks = [
        [1, 16, 1, 1],
        [6, 24, 2, 2],
        [6, 32, 2, 2],
    ]  # expansion, width, repeats, stride: one block of each kind, and one residual sum
    model = MobileNetV2(num_classes=5, width_mult=0.5, inverted_residual_setting=blocks, dropout=0.0)
    last = model.features[-1][0].in_channels  # torchvision's last layer has at least 1,280 channels; replace it
    model.features[-1] = Conv2dNormActivation(last, 48, kernel_size=1, activation_layer=nn.ReLU6)
    model.classifier[1] = nn.Linear(48, 5)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "mlp": (lambda: mlp((12, 8, 6, 5)), (3, 2, 2)),
    "vgg": (lambda: Vgg((6, "M", 8), (32, 7, 5)), (3, 4, 4)),
    "resnet-projection": (lambda: ResNet(2, (4, 6), 5, shortcut="projection"), (3, 8, 8)),
    "resnet-pad": (lambda: ResNet(1, (4, 7, 12), 5, shortcut="pad"), (3, 8, 8)),
    "cifar10-resnet20": (lambda: itf.load_model("cifar10-resnet20", weights="random"), (3, 32, 32)),
    "digits-vgg": (lambda: itf.load_model("digits-vgg", weights="random"), (1, 8, 8)),
    "pre-activation": (lambda: Pooled(PreActivation(), 6), (3, 8, 8)),
    "fire": (lambda: Pooled(nn.Sequential(conv(3, 6), nn.ReLU(), Fire(6, 3, 4, 5), Fire(9, 2, 3, 3)), 6), (3, 8, 8)),
    "densenet": (_densenet, (3, 32, 32)),
    "mobilenet": (_mobilenet, (3, 32, 32)),
    "resnext": (lambda: Pooled(nn.Sequential(*conv_bn(3, 8), *conv_bn(8, 8, groups=4), conv(8, 6)), 6), (3, 8, 8)),
    "multiplier": (lambda: Pooled(nn.Sequential(*conv_bn(3, 4), *conv_bn(4, 8, groups=4), conv(8, 6)), 6), (3, 8, 8)),
    "squeeze-excite": (lambda: Pooled(SqueezeExcite(), 6), (3, 8, 8)),
    "doubled": (lambda: Pooled(Doubled(), 6), (3, 8, 8)),
    "flat-norm": (
        lambda: nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 5)),
        (3, 4, 4),
    ),
    "plain-norm": (
        lambda: Pooled(nn.Sequential(conv(3, 6), nn.BatchNorm2d(6, affine=False), nn.ReLU(), conv(6, 4)), 4),
        (3, 8, 8),
    ),
}


@dataclass(frozen=True)
class Network:
    """A network with random weights and norms. Tests share it, so it must not be modified."""

    name: str
    model: nn.Module
    example: Tensor
    images: Tensor
    logits: Tensor
    groups: tuple[itf.Group, ...]
    data: itf.ImageData  # noise with random labels

    @property
    def prunable(self) -> list[itf.Group]:
        return [group for group in self.groups if group.reason is None]

    @functools.cached_property
    def folded(self) -> nn.Module:
        return itf.fold(self.model, self.example)

    @property
    def kinds(self) -> list[itf.Group]:
        """One prunable group, of the fewest layers, for each set of roles that kinds of layers play in a group."""
        found: dict[frozenset, itf.Group] = {}
        for group in sorted(self.prunable, key=lambda group: len(group.layers)):
            roles = ((layer.role, type(self.model.get_submodule(layer.name))) for layer in group.layers)
            found.setdefault(frozenset(roles), group)
        return list(found.values())

    def group(self, name: str) -> itf.Group:
        return next(group for group in self.groups if group.name == name)


@functools.cache
def _network(name: str) -> Network:
    make, size = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, images = randomise(make()), torch.randn(4, *size)
    example = torch.zeros(1, *size)
    logits, generator = model(images), torch.Generator().manual_seed(0)
    model.card = itf.ModelCard(name, (0.5,) * size[0], (0.3,) * size[0], size, logits.shape[1], "noise")
    noise = torch.randint(0, 256, (24, *size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, logits.shape[1], (24,), generator=generator)
    data = itf.ImageData("noise", "train", noise, labels, tuple(map(str, range(logits.shape[1]))))
    return Network(name, model, example, images, logits, tuple(itf.find_groups(model, example)), data)


# ResNet-20 has the couplings of resnet-pad in a hundred times the computation: tests that need its size ask for it by name
SMALL = [name for name in NETWORKS if name != "cifar10-resnet20"]


@pytest.fixture(scope="session", params=SMALL)
def network(request: pytest.FixtureRequest) -> Network:
    """Return each of the small networks in turn."""
    return _network(request.param)


@pytest.fixture(scope="session")
def networks() -> Callable[[str], Network]:
    """Return a function that gives a small network by name."""
    return _network


@pytest.fixture(scope="session")
def random_weights() -> Callable[[nn.Module], nn.Module]:
    """Return a function that fills a network in place with weights and norms that are neither dead nor trivial."""
    return randomise


@pytest.fixture(scope="session")
def same_logits() -> Callable[..., None]:
    """Return a function that asserts that two networks' logits agree.

    The tolerance is 1e-4 of the logits' spread over the images, because all images share the bias.
    """

    def check(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
        assert actual.shape == expected.shape
        spread = float((expected - expected.mean(0)).abs().max())
        error = float((actual - expected).abs().max())
        assert error <= tolerance * spread + 1e-6 * float(expected.abs().max()), f"off by {error} of {spread}"

    return check
