"""Subnetworks of untrained networks: weights stay as drawn, and only a mask over them is trained.

ASLP: Dupont et al., "Extracting Effective Subnetworks with Gumbel-Softmax", ICIP 2022. Supermask: Zhou et al., NeurIPS 2019.
Edge-popup: Ramanujan et al., CVPR 2020. All masks are unstructured, so they do not make a network faster.

Differences from ASLP's authors' code:

- biases are zero (theirs are drawn uniformly, and frozen);
- "signed" weights apply to all layers (theirs to convolutions alone: linear layers are drawn again afterwards);
- the scale is always trained (theirs is off by default);
- Supermask is decided by a threshold, and rescaled (theirs is evaluated as the mean of ten drawn masks);
- edge-popup is scaled to compensate for the removed weights (theirs is not);
- a norm's scale and shift, which their networks lack, stay unchanged.

The lab trains with a one-cycle rate for a fixed time and takes the last masks (theirs: a constant rate until held-out images
stop improving, and the best masks on these).
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
    """Mask that multiplies a weight (n, ...): drawn anew at each use in training mode, fixed in eval mode.

    `scores` have the weight's shape; `kept()` derives from them which weights are kept.
    """

    def __init__(self, weight: Tensor, generator: torch.Generator):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))
        self.generator = generator

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.drawn() if self.training else self.decided())

    def kept(self) -> Tensor:
        """Return which weights are kept in eval mode: bool, in the weight's shape."""
        return self.scores.detach() >= 0

    def share(self) -> Tensor:
        """Return the probability that each weight is kept, in the weight's shape."""
        return self.scores.detach().sigmoid()

    def drawn(self) -> Tensor:
        raise NotImplementedError

    def decided(self) -> Tensor:
        raise NotImplementedError

    def _uniform(self) -> Tensor:
        """Draw random numbers in (0, 1), in the weight's shape."""
        drawn = torch.rand(self.scores.shape, generator=self.generator).clamp(_TINY, 1 - _TINY)
        return drawn.to(self.scores)

    def get_extra_state(self) -> Tensor:
        """Return the state of the random numbers, so that stopped training resumes with the same ones."""
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
    """Mask by a hard Gumbel-Softmax of [m, 0] at temperature 1; the layer has one learned scale (smart rescale).

    Equivalent form: soft = sigmoid(m + logit(u)), keep if soft > 1/2, gradients through soft.
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
    """Mask by Bernoulli draws with probability sigmoid(m), gradients through the probability.

    The kept weights are scaled up to compensate for the removed ones.
    """

    def drawn(self) -> Tensor:
        share = self.scores.sigmoid()
        hard = (self._uniform() < share).to(share)
        return (hard + share - share.detach()) * (hard.numel() / hard.sum().clamp(min=1))

    def decided(self) -> Tensor:
        kept = self.kept().to(self.scores)
        return kept * (kept.numel() / kept.sum().clamp(min=1))


class EdgePopup(Mask):
    """Mask that keeps the half of the weights with the largest |score|, with gradients as if all were kept.

    The kept weights are scaled for the share that is kept.
    """

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
    """Return a copy of a network with frozen weights and a mask over those of each convolution and linear layer.

    Only the masks' scores (and ASLP's scales) require gradients. method: "aslp", "supermask" or "edge-popup". weights:
    "kaiming", drawn from the normal distribution of He et al. (fan_in, ReLU), biases zero; "signed", the signs of such a draw
    times the layer's deviation, biases zero; "keep", those that the model has. Raises IntrafusionError for an unknown method or
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
    """Return the masks of a masked network by the dotted names of their layers. Raises IntrafusionError if there are none."""
    found = {
        name: layer.parametrizations["weight"][0]
        for name, layer in masked.named_modules()
        if parametrize.is_parametrized(layer, "weight")
    }
    if not found or not all(isinstance(one, Mask) for one in found.values()):
        raise IntrafusionError("this network has no masks; create it with intrafusion.training.mask")
    return found


def what_learns(masked: nn.Module, lr: float = 50.0, scale_lr: float = 1e-3) -> list[dict[str, Any]]:
    """Return the scores and scales of a masked network's masks, each with its learning rate, for an optimizer."""
    found = masks(masked).values()
    scales = [one.scale for one in found if isinstance(one, GumbelMask)]
    kinds = [{"params": [one.scores for one in found], "lr": lr}, {"params": scales, "lr": scale_lr}]
    return [kind for kind in kinds if kind["params"]]


def finalise(masked: nn.Module) -> nn.Module:
    """Return a plain copy of a masked network: each weight, in its shape, times its mask in eval mode.

    The parameters are in their order before masking, so that an optimizer's state still fits.
    Raises IntrafusionError for a network without masks.
    """
    masks(masked)
    plain = copy.deepcopy(masked).eval()
    for layer in list(plain.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            _make_plain(layer)
    return plain.requires_grad_(False)


def _make_plain(layer: Any) -> None:
    """Replace the parametrization by the masked weight. torch's own function would change the class of every copy."""
    weight, others = layer.weight.detach().clone(), dict(layer._parameters)
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    layer._parameters.clear()
    layer.weight = nn.Parameter(weight)
    layer._parameters.update(others)
