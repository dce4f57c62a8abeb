"""Our own architectures: embedded weights, CIFAR releases, or a local file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.card import ModelCard, read_card
from intrafusion.models.sources.architectures import ARCHITECTURES
from intrafusion.models.sources.files import open_file
from intrafusion.models.state_dict import cifar, located
from intrafusion.runtime.download import Progress, fetch
from intrafusion.runtime.paths import ASSETS, home

_CHENYAOFO = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download"
# the normalisation chenyaofo's weights were trained with: CIFAR-10's deviations are a well-known misprint, so keep it
_RELEASE_STATS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_RELEASES = {  # architecture -> file of the release; the suffix is the beginning of its SHA-256
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
    """Embedded ones first."""
    return sorted(ARCHITECTURES, key=lambda name: not embedded(name))


def embedded(name: str) -> bool:
    """Whether the weights of `name` lie in the project's assets."""
    return (ASSETS / f"{name}.safetensors").exists()


def check(name: str) -> None:
    """Raise IntrafusionError, naming the known models, unless this is one of them."""
    if name not in ARCHITECTURES:
        raise IntrafusionError(
            f"unknown model {name!r}: choose one of {', '.join(ARCHITECTURES)}, imagenet/<torchvision name>, "
            "timm/<timm name>, or package.module:factory"
        )


def dataset(name: str) -> str:
    check(name)
    return ARCHITECTURES[name].card.dataset


def blank(name: str, state: Mapping[str, Tensor]) -> tuple[nn.Module, ModelCard]:
    """The architecture with weights of any values, in the variant that these weights ask for."""
    check(name)
    entry = ARCHITECTURES[name]
    return entry.make(state), entry.card


def published(name: str) -> tuple[str, Path, str]:
    """Where the weights of `name` are published, where they lie once here, and how their SHA-256 begins."""
    if name not in _RELEASES:
        raise IntrafusionError(
            f"no published weights of {name} are known: pass a file as weights= (--weights), or weights='random'"
        )
    path = home() / "weights" / _RELEASES[name].rpartition("/")[2]
    return f"{_CHENYAOFO}/{_RELEASES[name]}", path, path.stem.rpartition("-")[2]


def open_model(name: str, weights: str | Path | None, progress: Progress | None) -> tuple[nn.Module, ModelCard]:
    """The model and its card; weights: None for those that come with the name, or a file."""
    check(name)
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
        "dataset": card.dataset, "weights": weights, "accuracy": card.accuracy, "summary": ARCHITECTURES[name].summary,
    }  # fmt: skip
