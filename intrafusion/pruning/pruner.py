"""Pruning of whole groups: score, plan and merge each group from output to input, then shrink the network."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Unpack

import torch
from torch import Tensor, nn

from intrafusion._registry import CRITERIA
from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.models.fx.sharing import check_call, check_finite, copied, leaves, on_cpu, placed, set_modes, twin
from intrafusion.options import TransportKeywords, TransportOptions
from intrafusion.pruning.groups.find import find_groups
from intrafusion.pruning.groups.group import Group
from intrafusion.pruning.groups.norms import fold_groups
from intrafusion.pruning.groups.surgery import shrink
from intrafusion.pruning.importance import score
from intrafusion.pruning.merge import MERGES, Fit, Merged
from intrafusion.pruning.transport.cost import compare_channels
from intrafusion.pruning.transport.planning import TransportPlan, group_counts, kept_count, solve, stay
from intrafusion.runtime.cancellation import checkpoint
from intrafusion.runtime.devices import CPU, device_of


def prune(
    model: nn.Module,
    example: Tensor,
    sparsity: float | Mapping[str, float] = 0.5,
    criterion: str = "l1",
    merge: str = "fusion",
    groups: str | Sequence[str] = "all",
    data: ImageData | None = None,
    *,
    round_to: int = 1,
    fold_norms: str = "none",
    seed: int = 0,
    calibration: int | None = 512,
    **options: Unpack[TransportKeywords],
) -> nn.Module:
    """Return a smaller copy of a network, with BatchNorm folded; each chosen group keeps `kept_count` channels.

    The network itself is not modified. Pruning runs in eval mode; the copy then gets the mode of the network, train or eval.

    Parameters
    ----------
    model : nn.Module
        Any convolutional classifier that `find_groups` can trace.
    example : Tensor
        One input, float (1, C, H, W).
    sparsity : float or mapping
        Share of channels to remove, for all groups or by group name (0 for a group that is not named).
    criterion : str
        Criterion that chooses the kept channels: a name from `registry("criterion")`.
    merge : str
        What happens to the removed channels: a name from `registry("merge")`.
    groups : str or list of str
        "all" (every prunable group), or names from `find_groups`.
    data : ImageData, optional
        Images for criteria, costs and merges that need them.
    round_to : int
        The number of kept channels is rounded to a multiple of this.
    fold_norms : str
        How the folding merges use BatchNorm, "none" or "columns".
    seed : int
        Seed for the choice of images and for all random choices.
    calibration : int, optional
        Maximum number of images to use; None for all.
    **options : TransportOptions
        Options of `plan`.

    Returns
    -------
    nn.Module

    Raises
    ------
    IntrafusionError
        For an unknown group or choice, a group that cannot be pruned, nothing to prune, or NaN or infinite weights.

    Examples
    --------
    >>> import intrafusion as itf
    >>> model = itf.load_model("digits-vgg")
    >>> small = itf.prune(model, model.card.example(), sparsity=0.5, merge="fusion")
    >>> [itf.size(network, model.card.example()).params for network in (model, small)]
    [292458, 74362]
    """
    check_call(model, example)
    check_finite(model.named_modules())
    small = prune_groups(
        model,
        find_groups(model, example),
        sparsity,
        criterion,
        merge,
        groups,
        data,
        round_to=round_to,
        fold_norms=fold_norms,
        seed=seed,
        calibration=calibration,
        **options,
    )
    set_modes(small, model)
    return small


def choose_groups(found: Sequence[Group], names: str | Sequence[str]) -> list[Group]:
    """Return the groups with these names, in the order of `found`; "all" means every prunable group.

    Raises IntrafusionError for an unknown name, for a group that cannot be pruned, and when no group is chosen.
    """
    if names == "all":
        chosen = [group for group in found if group.reason is None]
    else:
        wanted = [names] if isinstance(names, str) else list(names)
        check_names(found, wanted)
        chosen = [group for group in found if group.name in wanted]
    if not chosen:
        reasons = "; ".join(f"{group.name}: {group.reason}" for group in found[:3] if group.reason)
        raise IntrafusionError(
            f"no group to prune: the network has no prunable group, or no group was named{reasons and f' ({reasons})'}"
        )
    return chosen


def check_names(found: Sequence[Group], names: Iterable[str]) -> None:
    """Raise IntrafusionError for an unknown group name, suggesting the closest ones, or for a group that cannot be pruned."""
    by_name = {group.name: group for group in found}
    for name in names:
        if name not in by_name:
            usable = [group.name for group in found if group.reason is None]
            near = get_close_matches(str(name), usable, 3, 0.4) or usable
            raise IntrafusionError(f"no group {name!r} in this network; choose all, or {' or '.join(near)}")
        by_name[name].check_prunable()


def _check_mapping(sparsity: Mapping[str, float], found: Sequence[Group], chosen: Sequence[Group]) -> None:
    """Raise IntrafusionError if a sparsity given by name would be ignored."""
    known, pruned = ({group.name for group in groups} for groups in (found, chosen))
    asked = [name for name, share in sparsity.items() if share != 0 or name not in known]
    check_names(found, asked)
    if outside := [name for name in asked if name not in pruned]:
        raise IntrafusionError(f"sparsity names group {outside[0]}, which groups does not; add it to groups")


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network, and the merge of each group that lost channels, in the order of pruning.

    original: the network before pruning, which must not be modified. found: its groups.
    """

    small: nn.Module
    merged: tuple[Merged, ...]
    original: nn.Module
    found: Sequence[Group]

    def dense(self) -> nn.Module:
        """Return a copy of the original network with BN folded."""
        dense = twin(self.original)
        fold_groups(dense, self.found)
        return dense

    def fit(self, data: ImageData) -> Fit:
        """Return a `Fit` that fits the small network's layers in place on these images."""
        return Fit(self.dense(), self.small, self.merged, data)


def prune_groups(model: nn.Module, found: Sequence[Group], *choices, **knobs) -> nn.Module:
    """Return the small network that `cut` makes."""
    return cut(model, found, *choices, **knobs).small


def cut(
    model: nn.Module,
    found: Sequence[Group],
    sparsity: float | Mapping[str, float],
    criterion: str = "l1",
    merge: str = "fusion",
    groups: str | Sequence[str] = "all",
    data: ImageData | None = None,
    *,
    round_to: int = 1,
    fold_norms: str = "none",
    seed: int = 0,
    calibration: int | None = 512,
    first: Callable[[Group], TransportPlan] | None = None,
    share: bool = False,
    weights: nn.Module | None = None,
    **options: Unpack[TransportKeywords],
) -> Pruned:
    """Prune as `prune` does, with the groups of the model already found (all points of a study share them).

    first: returns the plan of a group in the network before pruning, which may be known already. It is used for the first
    group to be pruned, the last one that loses channels in network order, because that group still sees the unpruned network.
    share: layers outside the groups that lose channels are shared with the model, not copied, and must not be modified.
    weights: a copy of the model on the CPU, in the plain form of `twin`; made here if None. Channels are merged there, in
    float64, while networks that need images run on the model's device.
    """
    merging = MERGES[merge]
    if merging.needs != "nothing" and data is None:
        raise IntrafusionError(f"merge {merge} needs {merging.needs}; pass data=")
    shares = _losing(found, sparsity, groups, round_to)
    moves = merging.transports or TransportOptions(**options).anchors != "important"

    device = device_of(model)
    looks = CRITERIA[criterion].needs != "nothing" or (moves and options.get("cost") == "activations")  # at images

    def planned(network: nn.Module, group: Group) -> TransportPlan:
        if looks and device != CPU:
            network = copied(network).to(device)
        scores = score(network, group, criterion, data, seed, calibration)
        if not moves:
            return stay(group, scores, shares[group], round_to)
        points = compare_channels(
            network, group, data=data, calibration=calibration, seed=seed, device=device, measured=False, **options
        )
        return solve(points, scores, shares[group], round_to=round_to, seed=seed, **options)

    own = {"fold_norms": fold_norms} if "fold_norms" in merging.knobs else {}
    known = next(reversed(shares), None) if moves and first else None  # the group whose plan `first` returns
    weights = weights or on_cpu(model)
    small = _copy(weights, shares if share and not merging.fit else None)  # a fit may change any layer
    with torch.no_grad():
        fold_groups(small, found)
        merged: list[Merged] = []
        for group in reversed(shares):
            checkpoint()
            group_plan = first(group) if first and group is known else planned(small, group)
            merged.append(Merged(group, merging(small, group, group_plan, **own), group_plan.kept))
        shrink(small, {one.group: one.kept for one in merged})
        pruned = Pruned(small if device == CPU else placed(small, weights, model), tuple(merged), model, found)
        if merging.fit and merged and data is not None:
            merging.fit(pruned.fit(data.subset(calibration, seed)))
    return pruned


def _losing(
    found: Sequence[Group], sparsity: float | Mapping[str, float], groups: str | Sequence[str], round_to: int
) -> dict[Group, float]:
    """Return the chosen groups that lose channels, in network order, with the share that each loses."""
    chosen = [] if sparsity == 0 and groups == "all" else choose_groups(found, groups)
    if isinstance(sparsity, Mapping):
        _check_mapping(sparsity, found, chosen)
    shares = {group: sparsity_of(group, sparsity) for group in chosen}
    return {group: share for group, share in shares.items() if sum(group_counts(group, share, round_to)) < group.size}


def _copy(model: nn.Module, losing: Collection[Group] | None) -> nn.Module:
    """Return a copy of the model that shares its layers outside these groups; None to share none."""
    if losing is None:
        return twin(model)
    touched = {layer.name for group in losing for layer in group.layers}
    return twin(model, {name: layer for name, layer in leaves(model).items() if name not in touched})


def sparsity_of(group: Group, sparsity: float | Mapping[str, float]) -> float:
    """Return the share of this group's channels to remove. Raises IntrafusionError unless it is in [0, 1)."""
    share = sparsity.get(group.name, 0.0) if isinstance(sparsity, Mapping) else sparsity
    kept_count(group.size, share)
    return share
