"""Pruning whole groups: score, plan and merge each one from the output to the input, then cut the network down."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from intrafusion.channels import Group
from intrafusion.data import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.fold import fold_groups
from intrafusion.groups import find_groups
from intrafusion.importance import score
from intrafusion.merge import MERGES
from intrafusion.shrink import shrink
from intrafusion.transport import TransportPlan, group_counts, kept_count, plan


def prune(
    model: nn.Module,
    example: Tensor,
    sparsity: float = 0.5,
    criterion: str = "l1",
    merge: str = "fusion",
    groups: str | Sequence[str] = "all",
    data: ImageData | None = None,
    *,
    cost: str = "weights",
    distance: str = "lp",
    p: float = 1,
    source: str = "uniform",
    target: str = "uniform",
    anchors: str = "important",
    solver: str = "exact",
    reg: float = 0.02,
    reg_m: float = 5.0,
    mass: float = 0.9,
    normalise: str = "source",
    bias: bool = False,
    seed: int = 0,
    calibration: int | None = 512,
) -> nn.Module:
    """A smaller copy of `model`, BN folded: in each chosen group int(n (1 - sparsity)) channels stay.

    example: one input, float (1, C, H, W). groups: "all" (every prunable one) or names from `find_groups`. data: images
    for criteria and costs that look at some. The other keywords are `plan`'s. The input model is not touched.
    Raises IntrafusionError for an unknown group or choice, a group that cannot be pruned, or nothing to prune.
    """
    return prune_groups(
        model, find_groups(model, example), sparsity, criterion, merge, groups, data,
        cost=cost, distance=distance, p=p, source=source, target=target, anchors=anchors, solver=solver, reg=reg,
        reg_m=reg_m, mass=mass, normalise=normalise, bias=bias, seed=seed, calibration=calibration,
    )  # fmt: skip


def choose_groups(found: Sequence[Group], names: str | Sequence[str]) -> list[Group]:
    """The groups of these names, in the order found; "all" means every prunable one.

    Raises IntrafusionError for a name that is not there or cannot be pruned, and when nothing is left.
    """
    if names == "all":
        chosen = [group for group in found if group.reason is None]
    else:
        wanted = [names] if isinstance(names, str) else list(names)
        by_name = {group.name: group for group in found}
        for name in wanted:
            if name not in by_name:
                usable = ", ".join(group.name for group in found if group.reason is None)
                raise IntrafusionError(f"no group {name!r} in this network: choose all, or from {usable}")
            if by_name[name].reason:
                raise IntrafusionError(f"group {name} cannot be pruned: {by_name[name].reason}")
        chosen = [group for group in found if group.name in wanted]
    if not chosen:
        raise IntrafusionError("no group to prune: the network has no prunable group, or none was named")
    return chosen


def prune_groups(
    model: nn.Module,
    found: Sequence[Group],
    sparsity: float,
    criterion: str = "l1",
    merge: str = "fusion",
    groups: str | Sequence[str] = "all",
    data: ImageData | None = None,
    *,
    seed: int = 0,
    calibration: int | None = 512,
    first: Callable[[], TransportPlan] | None = None,
    **knobs,
) -> nn.Module:
    """`prune` with the groups of the model found before (as every point of a curve shares them).

    first: gives the plan of the last chosen group, where it may be known: that group is pruned first, and sees the network
    unchanged.
    """
    kept_count(2, sparsity)  # refuses a bad sparsity before any work
    merge_function = MERGES[merge]
    chosen = choose_groups(found, groups)
    small = copy.deepcopy(model)
    fold_groups(small, found)
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        for group in reversed(chosen):
            if sum(group_counts(group, sparsity)) == group.size:
                continue
            if first is not None and group is chosen[-1]:
                group_plan = first()
            else:
                scores = score(small, group, criterion, data, seed, calibration)
                group_plan = plan(
                    small, group, scores, sparsity, data=data, seed=seed, calibration=calibration, **knobs
                )
            merge_function(small, group, group_plan)
            kept[group.name] = group_plan.kept
    shrink(small, {group: kept[group.name] for group in chosen if group.name in kept})
    return small
