"""The architectures of our own zoo by name: a card without weights, and a maker that looks at the weights for its variant."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from intrafusion.models.architectures import CONV_WIDTHS, SLIM, VGG_WIDTHS, ResNet, Vgg, conv_net, mlp
from intrafusion.models.card import ModelCard

_CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100_STATS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


@dataclass(frozen=True)
class Architecture:
    """One entry of the zoo: a card without weights, and a maker that looks at the weights for its variant."""

    card: ModelCard
    make: Callable[[Mapping[str, Tensor]], nn.Module]  # an empty mapping asks for the default variant
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
