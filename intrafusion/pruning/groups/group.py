"""Channel groups: the rows, columns and norms that hold the same channels, and their positions."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from intrafusion.errors import IntrafusionError

PRODUCER, CONSUMER, CHANNELWISE, PAD = "producer", "consumer", "channelwise", "pad"


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's part in a group.

    role: "producer" (its output channels), "consumer" (its input channels), "channelwise" (depthwise and grouped
    convolutions, norms, PReLU) or "pad" (a zero-padded shortcut's output).
    positions: int64 (n, m); row j holds the positions of channel j on that axis. m > 1 after a flatten or in a grouped
    convolution. A row is -1 if the layer does not hold the channel. norm: the BatchNorm that folds into this layer, if any.
    """

    name: str
    role: str
    positions: Tensor
    norm: str | None = None

    def present(self) -> Tensor:
        """Return whether the layer holds each channel: bool (n,)."""
        return self.positions[:, 0] >= 0

    def views(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the layer's tensors in `model` as views with this group's axis first; empty for a norm that was folded."""
        module = model.get_submodule(self.name)
        if isinstance(module, _BatchNorm):
            names = ("weight", "bias", "running_mean", "running_var")
            return {n: t.data for n in names if (t := getattr(module, n)) is not None}
        if isinstance(module, nn.PReLU):
            return {"weight": module.weight.data}
        if not isinstance(module, _ConvNd | nn.Linear):
            return {}
        if self.role == CONSUMER:
            return {"weight": module.weight.data.transpose(0, 1)}
        return {n: t.data for n in ("weight", "bias") if (t := getattr(module, n)) is not None}


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that must be pruned together.

    name: dotted name of the first layer that writes them. size: n, the number of channels (or of whole convolution
    groups). reason: why the group cannot be pruned; None if it can. block: int64 (n,), the block of each channel. Channels
    of one block are held by the same layers, and only channels of the same block may be fused. There is a single block except
    behind zero-padded shortcuts.
    """

    name: str
    size: int
    layers: tuple[Layer, ...]
    block: Tensor
    reason: str | None = None

    def check_prunable(self) -> None:
        """Raise IntrafusionError if the group cannot be pruned."""
        if self.reason:
            raise IntrafusionError(f"group {self.name} cannot be pruned: {self.reason}")

    def role(self, *roles: str) -> list[Layer]:
        """Return the layers with one of these roles."""
        return [layer for layer in self.layers if layer.role in roles]


def coupling(group: Group) -> str:
    """Describe as text why these layers belong together."""
    writers, readers = group.role(PRODUCER), group.role(CONSUMER)
    parts = [f"produced by {_names(writers)}" + (", whose outputs are summed" if len(writers) > 1 else "")]
    if through := [layer for layer in group.role(CHANNELWISE) if layer.positions.shape[1] > 1]:
        parts.append(f"whole convolution groups of {_names(through)}")
    if readers:
        parts.append(f"read by {_names(readers)}")
    if spread := [layer for layer in readers if layer.positions.shape[1] > 1]:
        parts.append(f"each channel gives {spread[0].positions.shape[1]} inputs of {spread[0].name} after flattening")
    if pads := group.role(PAD):
        parts.append(f"stages joined by zero-padded shortcuts {_names(pads)}")
    return "; ".join(parts)


def _names(layers: list[Layer]) -> str:
    names = [layer.name for layer in layers]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more"
