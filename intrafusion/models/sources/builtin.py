"""The built-in architectures, with weights that are embedded, from CIFAR releases, or from a local file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from intrafusion.errors import IntrafusionError, unknown
from intrafusion.models.architectures import CONV_WIDTHS, SLIM, VGG_WIDTHS, ResNet, Vgg, conv_net, mlp
from intrafusion.models.card import ModelCard, read_card
from intrafusion.models.sources.files import open_file
from intrafusion.models.state_dict import cifar, located
from intrafusion.runtime.cancellation import OnProgress
from intrafusion.runtime.download import fetch
from intrafusion.runtime.paths import ASSETS, home

_CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100_STATS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


@dataclass(frozen=True)
class Architecture:
    """One entry of the model zoo: a card without weights, and a factory that picks the variant to suit the weights."""

    card: ModelCard
    make: Callable[[Mapping[str, Tensor]], nn.Module]  # an empty mapping gives the default variant
    summary: str


def _cifar_resnet(depth: int, classes: int, state: Mapping[str, Tensor]) -> nn.Module:
    shortcut = "projection" if any(".shortcut." in key for key in state) else "pad"
    return ResNet((depth - 2) // 6, (16, 32, 64), classes, shortcut=shortcut)


def _architectures() -> dict[str, Architecture]:
    table: dict[str, Architecture] = {}

    def add(card: ModelCard, make: Callable[[Mapping[str, Tensor]], nn.Module], summary: str) -> None:
        table[card.name] = Architecture(card, make, summary)

    digits = partial(ModelCard, mean=(0.3054,), std=(0.3758,), input_size=(1, 8, 8), classes=10, dataset="digits")
    add(digits("digits-mlp"), lambda state: mlp((64, 128, 96, 10)), "two hidden layers, no BatchNorm")
    add(
        digits("digits-vgg"),
        lambda state: Vgg((32, 32, "M", 64, 64, "M", 128, 128), (512, 10), in_channels=1),
        "six conv-BN-ReLU layers, flattened into a linear classifier",
    )
    add(
        digits("digits-resnet"),
        lambda state: ResNet(2, (16, 32, 64), 10, in_channels=1, shortcut="projection"),
        "ResNet-14 with residual sums and projection shortcuts",
    )
    for data, classes, (mean, std) in (("cifar10", 10, _CIFAR10_STATS), ("cifar100", 100, _CIFAR100_STATS)):
        cifar = partial(ModelCard, mean=mean, std=std, input_size=(3, 32, 32), classes=classes, dataset=data)
        for depth in (20, 32, 44, 56, 110):
            add(
                cifar(f"{data}-resnet{depth}"),
                partial(_cifar_resnet, depth, classes),
                f"He et al.'s CIFAR ResNet-{depth}",
            )
        add(
            cifar(f"{data}-resnet18"),
            partial(lambda c, state: ResNet(2, (64, 128, 256, 512), c, shortcut="projection"), classes),
            "ResNet-18 with the 3x3 CIFAR stem",
        )
        for depth in (11, 16):
            add(
                cifar(f"{data}-vgg{depth}_bn"),
                partial(lambda d, c, state: Vgg(VGG_WIDTHS[d], (512, 512, 512, c)), depth, classes),
                f"VGG-{depth} with BatchNorm",
            )
        add(
            cifar(f"{data}-vgg-slim"),
            partial(lambda c, state: Vgg(SLIM, (2048, c)), classes),
            "six conv-BN-ReLU layers of 32 to 128 channels",
        )
        for depth in (2, 4, 6):
            add(
                cifar(f"{data}-conv{depth}"),
                partial(lambda d, c, state: conv_net(CONV_WIDTHS[: d // 2], (256, 256, c)), depth, classes),
                f"{depth} convolutions and three linear layers, without BatchNorm: the subnetwork papers' Conv{depth}",
            )
    return table


ARCHITECTURES = _architectures()

_CHENYAOFO = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download"
# normalisation used to train chenyaofo's weights; keep CIFAR-10's deviations, a well-known misprint
_RELEASE_STATS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_RELEASES = {  # architecture -> release file; the suffix is the start of its SHA-256
    "cifar10-resnet20": "resnet/cifar10_resnet20-4118986f.pt",
    "cifar10-resnet32": "resnet/cifar10_resnet32-ef93fc4d.pt",
    "cifar10-resnet44": "resnet/cifar10_resnet44-2a3cabcb.pt",
    "cifar10-resnet56": "resnet/cifar10_resnet56-187c023a.pt",
    "cifar10-vgg11_bn": "vgg/cifar10_vgg11_bn-eaeebf42.pt",
    "cifar10-vgg16_bn": "vgg/cifar10_vgg16_bn-6ee7ea24.pt",
    "cifar100-resnet20": "resnet/cifar100_resnet20-23dac2f1.pt",
    "cifar100-resnet32": "resnet/cifar100_resnet32-84213ce6.pt",
    "cifar100-resnet44": "resnet/cifar100_resnet44-ffe32858.pt",
    "cifar100-resnet56": "resnet/cifar100_resnet56-f2eff4c8.pt",
    "cifar100-vgg11_bn": "vgg/cifar100_vgg11_bn-57d0759e.pt",
    "cifar100-vgg16_bn": "vgg/cifar100_vgg16_bn-7d8c4031.pt",
}


def names() -> list[str]:
    """Return the names of all architectures, those with embedded weights first."""
    return sorted(ARCHITECTURES, key=lambda name: not embedded(name))


def embedded(name: str) -> bool:
    """Return whether the project's assets include the weights of `name`."""
    return (ASSETS / f"{name}.safetensors").exists()


def check_builtin(name: str) -> None:
    """Raise IntrafusionError, listing the known models, if `name` is not one of them."""
    if name not in ARCHITECTURES:
        others = "imagenet/<torchvision name>", "timm/<timm name>", "package.module:factory"
        raise unknown("model", name, [*ARCHITECTURES, *others])


def dataset(name: str) -> str:
    check_builtin(name)
    return ARCHITECTURES[name].card.dataset


def blank(name: str, state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelCard]:
    """Return the architecture with arbitrary weights, in the variant that the given weights need, and its card."""
    check_builtin(name)
    entry = ARCHITECTURES[name]
    return entry.make(state), entry.card


def published(name: str) -> tuple[str, Path, str]:
    """Return the URL of the published weights of `name`, their local path, and the start of their SHA-256."""
    if name not in _RELEASES:
        raise IntrafusionError(f"{name} has no published weights; pass a file as weights= (--weights), or weights='random'")
    path = home() / "weights" / _RELEASES[name].rpartition("/")[2]
    return f"{_CHENYAOFO}/{_RELEASES[name]}", path, path.stem.rpartition("-")[2]


def open_model(name: str, weights: str | Path | None, progress: OnProgress | None) -> tuple[nn.Module, ModelCard]:
    """Load the model and its card. weights: a file, or None for the embedded or published weights."""
    check_builtin(name)
    card, key = ARCHITECTURES[name].card, None
    if weights is not None:
        path, key = located(weights)
        card = replace(card, source=str(path))
    elif embedded(name):
        path = ASSETS / f"{name}.safetensors"
    else:
        path = fetch(*published(name), progress)
        mean, std = _RELEASE_STATS[card.dataset]
        card = replace(card, mean=mean, std=std, source="chenyaofo/pytorch-cifar-models", licence="BSD-3-Clause")
    return open_file(path, lambda state: (blank(name, state)[0], card), key, cifar, heads=True)


def is_local(name: str) -> bool:
    return embedded(name) or published(name)[1].exists()


def describe(name: str) -> dict[str, Any]:
    card = ARCHITECTURES[name].card
    weights = "embedded" if embedded(name) else "download" if name in _RELEASES else "local file"
    if weights == "embedded":
        card = read_card(ASSETS / f"{name}.json", card)
    return {
        "dataset": card.dataset,
        "weights": weights,
        "accuracy": card.accuracy,
        "summary": ARCHITECTURES[name].summary,
    }
