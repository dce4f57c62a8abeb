"""Pretrained classifiers by name: embedded ones, CIFAR releases, torchvision's ImageNet models, or a local weights file.

Networks that a person keeps are here too, as "kept/NAME".
A model is a plain nn.Module in eval mode (normalised NCHW float -> logits) with its ModelCard as `model.card`.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafusion.architectures import ARCHITECTURES
from intrafusion.cards import ModelCard, card_of, read_card
from intrafusion.download import Progress, fetch, stream
from intrafusion.errors import IntrafusionError, one_line
from intrafusion.places import ASSETS, home
from intrafusion.saved import check_name, save_network, set_layers
from intrafusion.weights import canonical, load_state, read_state

_CHENYAOFO = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download"
# the normalisation chenyaofo's weights were trained with: CIFAR-10's deviations are a well-known misprint, so keep it
_RELEASE_STATS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)),
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


def embedded(name: str) -> bool:
    """Whether the weights of `name` lie in the project's assets."""
    return (ASSETS / f"{name}.safetensors").exists()


def model_names(imagenet: bool = True) -> list[str]:
    """Every name `load_model` knows, kept and embedded ones first; `imagenet` adds torchvision's classification models."""
    names = sorted(ARCHITECTURES, key=lambda name: not embedded(name))
    names = kept_names() + names
    if imagenet:
        from torchvision import models

        names += [f"imagenet/{name}" for name in models.list_models(module=models)]
    return names


def kept_names() -> list[str]:
    """The networks that were kept on this machine, in the order of their names."""
    return sorted(f"kept/{path.stem}" for path in (home() / "models").glob("*.safetensors"))


def kept_when(name: str) -> int:
    """When a kept network was written, in nanoseconds: another one of its name has another time."""
    return _kept(name)[0].stat().st_mtime_ns


def keep(model: nn.Module, name: str) -> str:
    """Keep a network, of whatever widths, so that "kept/NAME" opens it; that name. model: with the card of its architecture.

    A network of that name is replaced. Raises IntrafusionError for a name that is none, or where it cannot be written.
    """
    card = card_of(model)
    architecture = card.details.get("architecture", card.name)
    base = ARCHITECTURES[architecture].make(model.state_dict())
    save_network(model, base, replace(card, name=architecture), home() / "models" / check_name(name))
    return f"kept/{name}"


def _kept(name: str) -> tuple[Path, ModelCard]:
    """The file of a kept network, and its card."""
    path = home() / "models" / f"{check_name(name.removeprefix('kept/'))}.safetensors"
    if not path.is_file():
        raise IntrafusionError(
            f"no network is kept as {name!r}: choose one of {', '.join(kept_names()) or '(none yet)'}"
        )
    blank = ModelCard(name, (0.0,), (1.0,), (1, 1, 1), 1, "")
    return path, read_card(path.with_suffix(".json"), blank)


def architecture_of(name: str) -> str:
    """The name of a model's architecture: its own, or of a kept network that which it was made from."""
    if not name.startswith("kept/"):
        return name
    architecture = _kept(name)[1].details.get("architecture")
    if architecture not in ARCHITECTURES:
        raise IntrafusionError(
            f"the card of {name} names no architecture that is known here: remove it and keep it again"
        )
    return architecture


def dataset_of(name: str) -> str:
    """The dataset that a model was trained on; names the known models when there is no such one."""
    if name.startswith("kept/"):
        return ARCHITECTURES[architecture_of(name)].card.dataset
    if name.startswith("imagenet/"):
        return "imagenet"
    if name not in ARCHITECTURES:
        raise IntrafusionError(
            f"unknown model {name!r}: choose one of {', '.join(ARCHITECTURES)}, or imagenet/<torchvision name>"
        )
    return ARCHITECTURES[name].card.dataset


def is_local(name: str, weights: str | None = None) -> bool:
    """Whether `load_model` would find everything on this machine, without a download."""
    return bool(weights) or name.startswith("kept/") or embedded(name) or _published(name)[1].exists()


def stream_weights(name: str) -> Iterator[tuple[int, int]]:
    """Download the published weights of `name` to where `load_model` looks, yielding (bytes done, bytes in all)."""
    yield from stream(*_published(name))


def _published(name: str, weights: str | Path | None = None) -> tuple[str, Path, str]:
    """Where the weights of `name` are published, where they lie once here, and how their SHA-256 begins."""
    if name.startswith("imagenet/"):
        url = _torchvision_weights(name, weights).url
    elif name in _RELEASES:
        url = f"{_CHENYAOFO}/{_RELEASES[name]}"
    else:
        raise IntrafusionError(
            f"no published weights of {name} are known: pass a file as weights= (--weights), or weights='random'"
        )
    path = home() / "weights" / url.rpartition("/")[2]
    return url, path, path.stem.rpartition("-")[2]


def describe(name: str) -> dict[str, Any]:
    """One row of the list of models: what it is, where its weights come from, and its published or measured accuracy."""
    if name.startswith("imagenet/"):
        card, summary = (
            ModelCard(name, (), (), (3, 224, 224), 1000, "imagenet", "torchvision"),
            "torchvision classifier",
        )
        weights = "download"
    elif name.startswith("kept/"):
        card, summary, weights = _kept(name)[1], f"{architecture_of(name)}, kept on this machine", "kept"
    else:
        card, summary = ARCHITECTURES[name].card, ARCHITECTURES[name].summary
        weights = "embedded" if embedded(name) else "download" if name in _RELEASES else "local file"
        if weights == "embedded":
            card = read_card(ASSETS / f"{name}.json", card)
    return {
        "name": name,
        "dataset": card.dataset,
        "weights": weights,
        "accuracy": card.accuracy,
        "summary": summary,
    }


def load_model(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> nn.Module:
    """A pretrained classifier in eval mode, its card in `.card`.

    weights: None for the embedded or else the published ones (downloaded), "random" for the architecture alone, a
    torchvision weights enum ("IMAGENET1K_V1"), or a local .safetensors / .pt / .pth / .th file (a state dict, possibly
    nested under "state_dict", keys possibly prefixed "module."; loaded without running code). `FILE.json` beside the
    file, when there, is its card. Raises IntrafusionError in one line when the name, file or download does not work.
    """
    from_torchvision = dataset_of(name) == "imagenet"
    model, card = (_imagenet if from_torchvision else _ours)(name, weights, progress)
    model.card = card  # type: ignore[assignment]
    return model.eval().requires_grad_(False).to(_device(device))


def _device(name: str | torch.device) -> torch.device:
    try:
        if torch.device(name).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("no such hardware")
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise IntrafusionError(f"device {name!r} is not available here: use cpu ({one_line(error)})") from error


def _ours(name: str, weights: str | Path | None, progress: Progress | None) -> tuple[nn.Module, ModelCard]:
    architecture = architecture_of(name)
    entry = ARCHITECTURES[architecture]
    if weights == "random":
        return entry.make({}), entry.card
    card = entry.card
    if weights is not None:
        path = Path(os.path.expanduser(weights))
    elif name != architecture:
        path, card = _kept(name)[0], replace(card, name=name)
    elif embedded(name):
        path = ASSETS / f"{name}.safetensors"
    else:
        path, card = _release(name, card, progress)
    state = canonical(read_state(path))
    model = entry.make(state)
    card = read_card(path.with_suffix(".json"), replace(card, source=card.source if weights is None else str(path)))
    set_layers(model, card.details.get("layers", {}))
    load_state(model, state, path, name)
    return model, card


def _release(name: str, card: ModelCard, progress: Progress | None) -> tuple[Path, ModelCard]:
    path = fetch(*_published(name), progress)
    mean, std = _RELEASE_STATS[card.dataset]
    return path, replace(card, mean=mean, std=std, source="chenyaofo/pytorch-cifar-models", licence="BSD-3-Clause")


def _imagenet(name: str, weights: str | Path | None, progress: Progress | None) -> tuple[nn.Module, ModelCard]:
    from torchvision import models

    short = _torchvision_name(name)
    options = {"init_weights": False} if short in ("googlenet", "inception_v3") else {}
    model = models.get_model(short, weights=None, **options)
    if hasattr(model, "aux_logits"):
        model.aux_logits, model.aux1, model.aux2, model.AuxLogits = False, None, None, None
    named = weights is None or str(weights) in models.get_model_weights(short).__members__
    chosen = _torchvision_weights(name, weights if named else None)
    card = _imagenet_card(name, chosen)
    if weights == "random":
        return model, replace(card, source="random initialisation", accuracy=None)
    if named:
        path = fetch(*_published(name, weights), progress)
    else:
        path = Path(os.path.expanduser(str(weights)))
        card = read_card(path.with_suffix(".json"), replace(card, source=str(path), accuracy=None))
    state = {k: v for k, v in read_state(path).items() if not k.startswith(("aux1.", "aux2.", "AuxLogits."))}
    load_state(model, state, path, name)
    return model, card


def _torchvision_name(name: str) -> str:
    from torchvision import models

    short = name.removeprefix("imagenet/")
    if short not in models.list_models(module=models):
        raise IntrafusionError(f"torchvision has no classification model {short!r}: `models --imagenet` lists them all")
    return short


def _torchvision_weights(name: str, weights: str | Path | None) -> Any:
    """A member of the model's weights enum: the named one, else torchvision's default (every classifier has one)."""
    from torchvision import models

    short = _torchvision_name(name)
    enum = models.get_model_weights(short)
    return enum.DEFAULT if weights is None else enum[str(weights)]


def _imagenet_card(name: str, weights: Any) -> ModelCard:
    """The card of torchvision weights, read from their own transforms and metadata."""
    preset = weights.transforms()
    crop, accuracy = preset.crop_size[0], weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100
    return ModelCard(
        name,
        tuple(preset.mean),
        tuple(preset.std),
        (3, crop, crop),
        1000,
        "imagenet",
        f"torchvision {weights}",
        accuracy,
        "BSD-3-Clause",
    )
