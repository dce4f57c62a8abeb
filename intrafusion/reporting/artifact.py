"""Make a standalone network from a spec: pruned, merged, recovered and measured, without tensors of the original."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.data.datasets import normalise
from intrafusion.evaluation.accuracy import Size, size
from intrafusion.models.card import ModelCard, card_of
from intrafusion.models.hub import architecture_of
from intrafusion.models.precision import kind_of
from intrafusion.pruning.pruner import choose_groups
from intrafusion.pruning.transport.planning import group_counts
from intrafusion.runtime.code_digest import code_version
from intrafusion.runtime.log import say
from intrafusion.runtime.progress import Progress
from intrafusion.spec import PruneSpec
from intrafusion.studies.measurement import Result, Width, check_spec, measure
from intrafusion.studies.session import Session, merged, recovery
from intrafusion.training.recovery import TrainingCost

_REAL = 16  # test images on which exported networks are verified


@dataclass(frozen=True, eq=False)
class Made:
    """A pruned network with its sizes and its measured result.

    network: on the CPU, in eval mode and float32, with BatchNorm folded and its own card. dense: the unpruned network on the
    session's device, also in float32 with BatchNorm folded; it must not be modified. before, after: the sizes of the dense
    and the pruned network. result: the measured accuracy; None if no images were loaded. real: some normalised test images,
    float (b, C, H, W), or None. note: text that says how many of the images have labels, or "".
    """

    spec: PruneSpec
    network: nn.Module
    dense: nn.Module
    before: Size
    after: Size
    widths: tuple[Width, ...]
    result: Result | None
    real: Tensor | None
    note: str = ""

    @property
    def card(self) -> ModelCard:
        return card_of(self.network)

    @property
    def example(self) -> Tensor:
        """An all-zero input on the CPU: float (1, C, H, W)."""
        return self.card.example()


def making(spec: PruneSpec, session: Session) -> Iterator[Progress[Made]]:
    """Prune, merge, recover and measure the network of `spec`; yields progress, and at last the network.

    Raises IntrafusionError if the spec cannot run on this session.
    """
    check_spec(spec, session)
    yield Progress("pruning", 0.0)
    pruned = merged(spec, session)
    for told in recovery(spec, session, pruned):
        if not isinstance(told, TrainingCost):
            yield Progress(f"recovering: {told}", 0.1 + 0.7 * told.step / told.steps)
    small = pruned.small
    result = None
    if session.data is not None:
        yield Progress("measuring", 0.8)
        meter = session.meter(spec)
        result = measure(spec, session, meter, small, len(meter))
    if (kind := kind_of(small)) != torch.float32:
        name = str(kind).removeprefix("torch.")
        say(f"the network is written in float32, but its accuracy was measured in {name}")
    network, dense = _alone(small, _card(spec, session, result)), _in_float32(session.folded)
    folded = replace(session.size, params=sum(p.numel() for p in session.folded.parameters()))
    note = session.data.note if session.data is not None else ""
    after, widths, real = size(network, network.card.example()), _widths(spec, session), _real(session)  # type: ignore[union-attr,operator]
    yield Progress("done", 1.0, Made(spec, network, dense, folded, after, widths, result, real, note))


def _alone(small: nn.Module, card: ModelCard) -> nn.Module:
    """Return a copy on the CPU, in float32, without the numbers that only further pruning needs."""
    network = copy.deepcopy(small).cpu().eval().requires_grad_(False).float()
    for module in network.modules():
        for name in ("folded_gamma", "folded_norm"):
            if hasattr(module, name):
                delattr(module, name)
    network.card = card  # type: ignore[assignment]
    return network


def _in_float32(network: nn.Module) -> nn.Module:
    return network if kind_of(network) == torch.float32 else copy.deepcopy(network).float()


def _card(spec: PruneSpec, session: Session, result: Result | None) -> ModelCard:
    from intrafusion import __version__  # imported here, because the package imports this module

    before = {key: value for key, value in session.card.details.items() if key not in ("layers", "architecture")}
    details: dict[str, Any] = {
        "made_from": before,
        "spec": spec.to_dict(),
        "intrafusion": __version__,
        "code": code_version(),
    }
    if result is not None:
        details["measured"] = {
            "images": result.count,
            "accuracy": result.accuracy,
            "interval": list(result.interval),
            "dense": result.dense_accuracy,
        }
    return replace(
        session.card,
        name=architecture_of(spec.model),
        source=f"pruned by intrafusion from {spec.model} ({session.card.source})",
        accuracy=None if result is None else result.accuracy,
        details=details,
    )


def _widths(spec: PruneSpec, session: Session) -> tuple[Width, ...]:
    """Return the widths of all prunable groups, including those that lose no channels."""
    chosen = {group.name for group in choose_groups(session.groups, spec.groups)}
    return tuple(
        Width(
            group.name,
            group.size,
            sum(group_counts(group, spec.sparsity_of(group.name), spec.round_to)) if group.name in chosen else group.size,
        )
        for group in session.groups
        if group.reason is None
    )


def _real(session: Session) -> Tensor | None:
    if session.data is None:
        return None
    return normalise(session.data.images[:_REAL].cpu(), session.card.mean, session.card.std)
