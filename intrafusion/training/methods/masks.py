"""Subnetworks of untrained networks: weights stay as they were drawn, and a mask over them is what learns.

ASLP: Dupont et al., "Extracting Effective Subnetworks with Gumbel-Softmax", ICIP 2022. Supermask: Zhou et al., NeurIPS
2019. Edge-popup: Ramanujan et al., CVPR 2020. All are unstructured: they make no network faster.

Differences from ASLP's authors' code: biases are zero (theirs are drawn uniformly, and frozen); "signed" weights are those of
all layers (theirs of convolutions alone: linear layers draw theirs anew afterwards); the scale always learns (theirs is off
by default); Supermask is decided by a threshold, and rescaled (theirs is judged by the mean of ten drawn masks); edge-popup
is scaled for what goes (theirs is not); a norm's scale and shift, which their networks lack, stay as they are. The lab
trains at a one-cycle rate for a fixed time and takes the last masks (theirs: a constant rate until held-out images stop
improving, and the best masks by these).
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from intrafusion.errors import IntrafusionError, check_choice

METHODS = ("aslp", "supermask", "edge-popup")
WEIGHTS = ("kaiming", "signed", "keep")
_TINY = 1e-7  # keeps a random number's logarithm finite


class Mask(nn.Module):
    """What a weight (n, ...) is multiplied by: drawn anew each time in training mode, decided in eval mode.

    Subclasses have `scores` in the weight's shape, of which those that stay are `kept()`.
    """

    def __init__(self, weight: Tensor, generator: torch.Generator):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))
        self.generator = generator

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.drawn() if self.training else self.decided())

    def kept(self) -> Tensor:
        """Which weights stay in the end: bool, in their shape."""
        return self.scores.detach() >= 0

    def share(self) -> Tensor:
        """How probable it is that each weight stays, in its shape."""
        return self.scores.detach().sigmoid()

    def drawn(self) -> Tensor:
        raise NotImplementedError

    def decided(self) -> Tensor:
        raise NotImplementedError

    def _uniform(self) -> Tensor:
        """Random numbers in (0, 1), in the weight's shape."""
        drawn = torch.rand(self.scores.shape, generator=self.generator).clamp(_TINY, 1 - _TINY)
        return drawn.to(self.scores)

    def get_extra_state(self) -> Tensor:
        """The state of the random numbers, so that training which is stopped goes on with the same ones."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())

    def __deepcopy__(self, memo: dict) -> "Mask":
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        state = {name: value for name, value in self.__dict__.items() if name != "generator"}
        twin.__dict__.update(copy.deepcopy(state, memo))
        twin.generator = torch.Generator()
        twin.generator.set_state(self.generator.get_state())
        return twin


class GumbelMask(Mask):
    """Keep or drop by a hard Gumbel-Softmax of [m, 0] at temperature 1; the layer has one learned scale (smart rescale).

    In another form: soft = sigmoid(m + logit(u)), keep where soft > 1/2, gradients through soft.
    """

    def __init__(self, weight: Tensor, generator: torch.Generator):
        super().__init__(weight, generator)
        self.scale = nn.Parameter(weight.new_ones(()))

    def drawn(self) -> Tensor:
        soft = torch.sigmoid(self.scores + torch.logit(self._uniform()))
        return self.scale * ((soft > 0.5).to(soft) + soft - soft.detach())

    def decided(self) -> Tensor:
        return self.scale * self.kept()


class Supermask(Mask):
    """Bernoulli draws with probability sigmoid(m), gradients through the probability; what stays makes up for what goes."""

    def drawn(self) -> Tensor:
        share = self.scores.sigmoid()
        hard = (self._uniform() < share).to(share)
        return (hard + share - share.detach()) * (hard.numel() / hard.sum().clamp(min=1))

    def decided(self) -> Tensor:
        kept = self.kept().to(self.scores)
        return kept * (kept.numel() / kept.sum().clamp(min=1))


class EdgePopup(Mask):
    """The half of the weights with the largest |score| stays, gradients as if all did; scaled for the share that stays."""

    keep = 0.5

    def __init__(self, weight: Tensor, generator: torch.Generator):
        super().__init__(weight, generator)
        bound = math.sqrt(3 / weight[0].numel())
        self.scores.data = (2 * self._uniform() - 1) * bound

    def kept(self) -> Tensor:
        size = self.scores.detach().abs().flatten()
        count = max(1, round(self.keep * len(size)))
        kept = torch.zeros_like(size, dtype=torch.bool)
        kept[size.topk(count).indices] = True
        return kept.view_as(self.scores)

    def share(self) -> Tensor:
        return self.kept().to(self.scores)

    def drawn(self) -> Tensor:
        size = self.scores.abs()
        return (self.kept().to(size) + size - size.detach()) / math.sqrt(self.keep)

    def decided(self) -> Tensor:
        return self.kept().to(self.scores) / math.sqrt(self.keep)


_MASKS: dict[str, Callable[[Tensor, torch.Generator], Mask]] = {
    "aslp": GumbelMask,
    "supermask": Supermask,
    "edge-popup": EdgePopup,
}


def mask(model: nn.Module, method: str = "aslp", seed: int = 0, weights: str = "kaiming") -> nn.Module:
    """Freeze the weights of a copy of the network, and put a mask over those of each convolution and linear layer.

    Its only parameters that want gradients are the masks' scores (and ASLP's scales). method: "aslp", "supermask" or
    "edge-popup". weights: "kaiming", drawn from the normal distribution of He et al. (fan_in, ReLU), biases zero; "signed",
    these signs times the layer's deviation; "keep", those that the model has. Raises IntrafusionError for an unknown method or
    choice.

    Examples
    --------
    >>> import intrafusion as itf
    >>> masked = itf.mask(itf.load_model("digits-mlp"), "edge-popup")
    >>> plain = itf.finalise(masked)
    >>> float((plain[1].weight == 0).float().mean()) > 0.3
    True
    """
    check_choice("method", method, METHODS)
    check_choice("weights", weights, WEIGHTS)
    masked, generator = copy.deepcopy(model).requires_grad_(False), torch.Generator().manual_seed(seed)
    for layer in list(masked.modules()):
        if type(layer) in (nn.Conv2d, nn.Linear):
            if weights != "keep":
                _draw(layer, generator, weights == "signed")
            own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
            made = _MASKS[method](layer.weight.data, own)  # type: ignore[arg-type]
            parametrize.register_parametrization(layer, "weight", made)
    return masked


def _draw(layer: Any, generator: torch.Generator, signed: bool) -> None:
    std = math.sqrt(2 / layer.weight[0].numel())
    drawn = torch.randn(layer.weight.shape, generator=generator) * std
    layer.weight.data = (drawn.sign() * std if signed else drawn).to(layer.weight)
    if layer.bias is not None:
        layer.bias.data.zero_()


def masks(masked: nn.Module) -> dict[str, Mask]:
    """The masks of a masked network, by the dotted names of their layers. Raises IntrafusionError where there are none."""
    found = {
        name: layer.parametrizations["weight"][0]
        for name, layer in masked.named_modules()
        if parametrize.is_parametrized(layer, "weight")
    }
    if not found or not all(isinstance(one, Mask) for one in found.values()):
        raise IntrafusionError("this network has no masks: make it by intrafusion.training.mask")
    return found


def what_learns(masked: nn.Module, lr: float = 50.0, scale_lr: float = 1e-3) -> list[dict[str, Any]]:
    """The scores and the scales of a masked network's masks, each with its learning rate, for an optimizer."""
    found = masks(masked).values()
    scales = [one.scale for one in found if isinstance(one, GumbelMask)]
    kinds = [{"params": [one.scores for one in found], "lr": lr}, {"params": scales, "lr": scale_lr}]
    return [kind for kind in kinds if kind["params"]]


def finalise(masked: nn.Module) -> nn.Module:
    """A plain copy of a masked network: each weight times what its mask decided, of the shape that it always had.

    Its parameters are in the order that they had before they were masked, so that an optimizer's state still fits.
    Raises IntrafusionError for a network without masks.
    """
    masks(masked)
    plain = copy.deepcopy(masked).eval()
    for layer in list(plain.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            _make_plain(layer)
    return plain.requires_grad_(False)


def _make_plain(layer: Any) -> None:
    """Put the masked weight in the place of its parts. torch's own way would change the class of every copy."""
    weight, others = layer.weight.detach().clone(), dict(layer._parameters)
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    layer._parameters.clear()
    layer.weight = nn.Parameter(weight)
    layer._parameters.update(others)
