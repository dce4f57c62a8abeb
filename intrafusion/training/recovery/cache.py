"""Recoveries that trained, kept in files: what was trained once is not trained again, and what was stopped goes on."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError
from intrafusion.evaluation.accuracy import in_eval
from intrafusion.pruning.pruner import Pruned
from intrafusion.training.checkpoint import load, save
from intrafusion.training.loop import Moment
from intrafusion.training.recovery.methods import RECOVERIES
from intrafusion.training.recovery.settings import Case, Facts, RecoveryOptions

_DEFAULT = RecoveryOptions()
_log = logging.getLogger(__name__)


class Kept(NamedTuple):
    """How a recovery went: what it cost, and its moments. state: the recovered network's tensors by name."""

    facts: Facts
    moments: tuple[Moment, ...]
    state: dict[str, torch.Tensor]


def recover(
    pruned: Pruned,
    name: str,
    data: ImageData | None,
    how: RecoveryOptions = _DEFAULT,
    keep: Path | None = None,
    report: Callable[[Facts | Moment], object] = lambda told: None,
) -> None:
    """Recover a pruned network in place, by a method's name; `report` hears what it costs and how it goes.

    keep: as `recovering` has it. Raises IntrafusionError for an unknown name, or images that do not do.
    """
    for told in recovering(pruned, name, data, how, keep):
        report(told)


def recovering(
    pruned: Pruned,
    name: str,
    data: ImageData | None,
    how: RecoveryOptions = _DEFAULT,
    keep: Path | None = None,
    stopped: Path | None = None,
) -> Iterator[Facts | Moment]:
    """Recover a pruned network in place, telling what it costs and how it goes; nothing of methods that do not train.

    keep: a file for the result of training; what it holds is not trained again. stopped: one for the state of a run that is
    stopped, which goes on from there; None for one beside `keep`. The network is in eval mode meanwhile, and in its own mode
    afterwards.
    """
    with in_eval(pruned.small):
        yield from _recovering(pruned, name, data, how, keep, stopped)


def _recovering(
    pruned: Pruned, name: str, data: ImageData | None, how: RecoveryOptions, keep: Path | None, stopped: Path | None
) -> Iterator[Facts | Moment]:
    found = None if keep is None else read(keep)
    if found is not None:
        yield found.facts
        yield from found.moments
        pruned.small.load_state_dict(found.state)
        return
    stopped = stopped or (None if keep is None else keep.with_suffix(".run"))
    facts, moments = None, []  # type: Facts | None, list[Moment]
    for told in RECOVERIES[name](Case(pruned, data, how, stopped)) or ():
        if isinstance(told, Facts):
            facts, moments = told, []
        else:
            moments.append(told)
        yield told
    if keep is not None and facts is not None:
        state = {"facts": asdict(facts), "moments": [asdict(m) for m in moments], "state": pruned.small.state_dict()}
        try:
            save(state, keep)
        except IntrafusionError as error:  # the network is here; it will have to be trained again elsewhere
            _log.warning("%s", error)


def read(path: Path) -> Kept | None:
    """What was kept in a file; None where there is none. Raises IntrafusionError for a file that cannot be read."""
    if not path.exists():
        return None
    state = load(path)
    return Kept(Facts(**state["facts"]), tuple(Moment(**m) for m in state["moments"]), state["state"])
