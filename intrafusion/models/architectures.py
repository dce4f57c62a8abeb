"""Architectures of the built-in model zoo, laid out to match their published weights."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG_WIDTHS: dict[int, tuple[int | str, ...]] = {
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    16: (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
}

SLIM = (32, 32, "M", 64, 64, "M", 128, 128, "M")
CONV_WIDTHS = (64, 128, 256)  # one width per pair of convolutions in Conv2, Conv4 and Conv6


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Build an MLP: flatten, then linear layers of the given widths with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_net(widths: Sequence[int], head: Sequence[int], in_channels: int = 3, size: int = 32) -> nn.Sequential:
    """Build a VGG-style CNN (Frankle & Carbin 2019): two 3x3 conv-ReLU and a max-pool per width, then linear layers."""
    layers: list[nn.Module] = []
    for width in widths:
        for n_in in (in_channels, width):
            layers += [nn.Conv2d(n_in, width, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        in_channels, size = width, size // 2
    return nn.Sequential(*layers, *mlp((in_channels * size * size, *head)))


class Vgg(nn.Module):
    """Conv-BN-ReLU chain with max-pooling at each "M", flattened into `head` linear layers (Simonyan & Zisserman 2015).

    The layout (`features.N`, `classifier.N`, dropout between linear layers) matches chenyaofo/pytorch-cifar-models.
    """

    def __init__(self, widths: Sequence[int | str], head: Sequence[int], in_channels: int = 3):
        super().__init__()
        features: list[nn.Module] = []
        for width in widths:
            if isinstance(width, str):
                features.append(nn.MaxPool2d(2))
            else:
                features += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                in_channels = width
        self.features = nn.Sequential(*features)
        classifier: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(head):
            classifier += [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout()]
        self.classifier = nn.Sequential(*classifier[:-2])

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class PadShortcut(nn.Module):
    """Parameter-free shortcut (option A of He et al. 2016): keep every `stride`th pixel, pad with zero channels.

    `channels` is the number of input channels. `before` and `after` count the zero channels around them. Pruning changes all
    three.
    """

    def __init__(self, channels: int, before: int, after: int, stride: int = 2):
        super().__init__()
        if stride < 1:
            raise ValueError(f"a stride of {stride}")
        self.channels, self.before, self.after, self.stride = channels, before, after, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        stride = f", stride={self.stride}" if self.stride != 2 else ""
        return f"{self.channels}, before={self.before}, after={self.after}{stride}"


class BasicBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module
        if stride == 1 and n_in == n_out:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = PadShortcut(n_in, (n_out - n_in) // 2, (n_out - n_in + 1) // 2)
        else:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet of He et al. 2016: a 3x3 stem, one stage per width, and a linear head.

    Each stage after the first halves the image. `shortcut` is "pad" (option A) or "projection" (1x1 convolution with BN).
    """

    def __init__(self, blocks: int, widths: Sequence[int], classes: int, in_channels: int = 3, shortcut: str = "pad"):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        n_in = widths[0]
        for stage, width in enumerate(widths, start=1):
            rows = []
            for block in range(blocks):
                rows.append(BasicBlock(n_in, width, 2 if stage > 1 and block == 0 else 1, shortcut))
                n_in = width
            self.add_module(f"layer{stage}", nn.Sequential(*rows))
        self.stages = len(widths)
        self.linear = nn.Linear(n_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
