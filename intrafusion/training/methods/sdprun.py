"""Structured directional pruning: an optimizer that moves whole channels to zero in flat directions of the loss.

Li et al., "Structured Directional Pruning via Perturbation Orthogonal Projection", arXiv 2107.05328. The group form is
reconstructed from its parent gRDA (Chao et al., "Directional Pruning of Deep Neural Networks", NeurIPS 2020): a group is
everything that writes a channel, in every layer of a residual stream. With plain parameters the optimizer is gRDA. The lab's
gRDA leaves out biases and norms, which the authors' code shrinks as well. The lab sets the strength by the final threshold
("reach", in median norms), unless the papers' c is given.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.pruning.groups.bn_folding import fold
from intrafusion.pruning.groups.find import find_groups
from intrafusion.pruning.groups.group import CHANNELWISE, PRODUCER, Group
from intrafusion.pruning.importance import score
from intrafusion.pruning.pruner import prune


@dataclass(frozen=True, eq=False)
class Channels:
    """Everything that writes a group's channels, as groups for a proximal step: one group per channel.

    name: of the channel group. parts: parameters, with channels along their first axis, each with the places (n, m) of the n
    channels there; -1 for a channel that the parameter does not hold.
    """

    name: str
    parts: tuple[tuple[nn.Parameter, Tensor], ...]

    @property
    def size(self) -> int:
        return len(self.parts[0][1])

    def norms(self, values: Callable[[nn.Parameter], Tensor] = lambda p: p) -> Tensor:
        """Return the Euclidean norm of each channel over all parts: (n,).

        values: maps each parameter to the values to use.
        """
        squares = sum(_rows(values(p), places).flatten(1).square().sum(1) for p, places in self.parts)
        return squares.sqrt()  # type: ignore[union-attr]

    def scale_(self, factors: Tensor, values: Callable[[nn.Parameter], Tensor]) -> None:
        """Set each channel to `factors` (n,) times `values`, in place."""
        for p, places in self.parts:
            held = places[:, 0] >= 0
            at = places[held].flatten()
            weights = factors[held].repeat_interleave(places.shape[1])
            p.data[at] = values(p)[at] * weights.view(-1, *[1] * (p.ndim - 1)).to(p.dtype)


def _rows(values: Tensor, places: Tensor) -> Tensor:
    """Return each channel's values: (n, m, ...), zero for channels that are not held."""
    rows = values[places.clamp(min=0)]
    return rows * (places >= 0).view(*places.shape, *[1] * (rows.ndim - 2))


def channels_of(model: nn.Module, groups: Iterable[Group]) -> list[Channels | dict[str, Any]]:
    """Return a model's prunable groups for `SDprun`, and all its other parameters with zero strength.

    A channel consists of the rows that write it in every layer, their biases, and the scales and shifts of the norms behind
    them: once these are zero, nothing of the channel is left. groups: from `find_groups`, on this model.
    """
    found: list[Channels | dict[str, Any]] = []
    taken: set[int] = set()
    for group in groups:
        parts: dict[int, tuple[nn.Parameter, Tensor]] = {}
        for layer in group.role(PRODUCER, CHANNELWISE):
            for name in (layer.name, layer.norm):
                module = model.get_submodule(name) if name else nn.Identity()
                for parameter in module.parameters(recurse=False):
                    parts[id(parameter)] = parameter, layer.positions.to(parameter.device)
        if group.reason is None and parts:
            found.append(Channels(group.name, tuple(parts.values())))
            taken |= parts.keys()
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [*found, {"params": rest, "c": 0.0}] if rest else found


class SDprun(torch.optim.Optimizer):
    """SGD on accumulated values v; the network's weights are v with each group shrunk towards zero.

    v <- v - lr g(w);  a <- a + c lr^(mu + 1/2) (t^mu - (t-1)^mu);  w_g = max(0, 1 - a / ||v_g||) v_g, gradients taken at w.

    groups_or_params: `Channels` (one group per channel), parameters (one group per weight, which is gRDA), and dicts of
    "params" with their own "c". lr: learning rate, may be scheduled. c: strength. mu: how fast the threshold a grows, in
    (0, 1). relative: c is in units of the median norm of all channels at the start, so that it means the same in every network.
    Raises IntrafusionError for settings out of range, or nothing to optimise.
    """

    def __init__(
        self,
        groups_or_params: Iterable[Channels | nn.Parameter | dict[str, Any]],
        lr: float = 0.1,
        c: float = 5e-4,
        mu: float = 0.51,
        relative: bool = False,
    ):
        for name, value, fits, span in (
            ("lr", lr, lr > 0, "above 0"),
            ("c", c, c >= 0, "of at least 0"),
            ("mu", mu, 0 < mu < 1, "between 0 and 1"),
        ):
            if not fits or not value < float("inf"):
                raise IntrafusionError(f"{name} must be a number {span}, not {value!r}")
        items = list(groups_or_params)
        self.channels: list[Channels] = [item for item in items if isinstance(item, Channels)]
        grouped = list({id(p): p for channels in self.channels for p, _ in channels.parts}.values())
        alone = [item for item in items if isinstance(item, Tensor)]
        others = [item for item in items if isinstance(item, dict)]
        kinds: Sequence[dict[str, Any]] = [{"params": grouped, "by": "channel"}, {"params": alone}, *others]
        if not any(kind["params"] for kind in kinds):
            raise IntrafusionError("no parameters to optimise; pass parameters, or channels_of(model, groups)")
        super().__init__([kind for kind in kinds if kind["params"]], {"lr": lr, "c": c, "mu": mu, "by": "weight"})
        unit = float(torch.cat([one.norms().detach() for one in self.channels]).median()) if relative and self.channels else 1.0
        for group in self.param_groups:
            group |= {"c": group["c"] * unit, "threshold": 0.0, "steps": 0}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; closure, if given, computes the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
            t, mu, lr = group["steps"], group["mu"], group["lr"]
            group["threshold"] += group["c"] * lr ** (mu + 0.5) * (t**mu - (t - 1) ** mu)
            for p in group["params"]:
                state = self.state[p]
                if "v" not in state:
                    state["v"] = p.detach().clone()
                if p.grad is not None:
                    state["v"].add_(p.grad, alpha=-lr)
                p.copy_(state["v"])
                if group["by"] == "weight" and group["threshold"] > 0:
                    p.copy_(state["v"].sign() * (state["v"].abs() - group["threshold"]).clamp(min=0))
            if group["by"] == "channel" and group["threshold"] > 0:
                for channels in self.channels:
                    norms = channels.norms(self._v)
                    factors = (1 - group["threshold"] / norms.clamp(min=1e-30)).clamp(min=0)
                    channels.scale_(factors, self._v)
        return loss

    def _v(self, p: nn.Parameter) -> Tensor:
        return self.state[p]["v"]

    def thresholds(self) -> list[float]:
        """Return the current threshold of each kind of group."""
        return [group["threshold"] for group in self.param_groups]


class GroupLasso(torch.optim.SGD):
    """SGD with momentum, each step followed by the proximal step of a group lasso: w_g <- max(0, 1 - lr c / ||w_g||) w_g.

    channels: from `channels_of`; other parameters are not shrunk. c: weight of the sum of the channels' norms in the loss.
    """

    def __init__(self, channels: Iterable[Channels | dict[str, Any]], lr: float = 0.1, c: float = 0.01):
        if not 0 <= c < float("inf"):
            raise IntrafusionError(f"c must be a number of at least 0, not {c!r}")
        items = list(channels)
        self.channels = [item for item in items if isinstance(item, Channels)]
        self.c = c
        grouped = list({id(p): p for one in self.channels for p, _ in one.parts}.values())
        others = [p for item in items if isinstance(item, dict) for p in item["params"]]
        super().__init__([{"params": grouped}, {"params": others}], lr=lr, momentum=0.9, nesterov=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; closure, if given, computes the loss again."""
        loss = super().step(closure)
        threshold = self.param_groups[0]["lr"] * self.c
        for one in self.channels:
            norms = one.norms()
            one.scale_((1 - threshold / norms.clamp(min=1e-30)).clamp(min=0), lambda p: p.data.clone())
        return loss


def zeroed(channels: Iterable[Channels | dict[str, Any]]) -> dict[str, Tensor]:
    """Return which channels of each group are exactly zero: bool (n,) by the group's name."""
    return {one.name: one.norms() == 0 for one in channels if isinstance(one, Channels)}


def without_zeroed(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a smaller copy of `model`, BN folded, without the channels that nothing writes; its outputs are the same.

    example: one input, float (1, C, H, W). The blocks of a group lose channels in proportion, so the block with the smallest
    share of such channels sets the limit. One channel of each block is kept.
    """
    groups = [group for group in find_groups(model, example) if group.reason is None]
    shares = {}
    for group in groups:
        gone = score(model, group, "filter") == 0
        blocks = group.block.unique()
        share = min(float(gone[group.block == block].double().mean()) for block in blocks)
        shares[group.name] = max(0.0, share - 0.5 / group.size) if share else 0.0  # rounding must not remove one more
    if not any(shares.values()):
        return fold(model, example)
    return prune(model, example, shares, "filter", "drop")
