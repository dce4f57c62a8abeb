"""Cache of recoveries in files: a finished training is not repeated, and a stopped one resumes."""

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
from intrafusion.runtime.devices import device_of
from intrafusion.training.checkpoint import load, save
from intrafusion.training.loop import TrainingProgress
from intrafusion.training.recovery.methods import RECOVERIES
from intrafusion.training.recovery.settings import Case, RecoveryOptions, TrainingCost

_DEFAULT = RecoveryOptions()
_log = logging.getLogger(__name__)


class Kept(NamedTuple):
    """A cached recovery: its cost, its training progress, and `state`, the recovered network's tensors by name."""

    facts: TrainingCost
    moments: tuple[TrainingProgress, ...]
    state: dict[str, torch.Tensor]


def recover(
    pruned: Pruned,
    name: str,
    data: ImageData | None,
    how: RecoveryOptions = _DEFAULT,
    keep: Path | None = None,
    report: Callable[[TrainingCost | TrainingProgress], object] = lambda told: None,
) -> None:
    """Recover a pruned network in place.

    Parameters
    ----------
    pruned : Pruned
        The pruned network.
    name : str
        Name of the recovery method.
    data : ImageData or None
        Images, on any device; labelled ones if the method needs labels.
    how : RecoveryOptions
        Options of the method.
    keep : Path, optional
        File that caches the result of training, see `recovering`.
    report : callable
        Called with the cost (`TrainingCost`) and with each `TrainingProgress` of training.

    Returns
    -------
    None

    Raises
    ------
    IntrafusionError
        For an unknown name, and for missing or unsuitable images.
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
) -> Iterator[TrainingCost | TrainingProgress]:
    """Recover a pruned network in place, and yield the cost and progress of training.

    Methods that do not train yield nothing. The network is in eval mode in the meantime, and gets its own mode back afterwards.

    Parameters
    ----------
    pruned : Pruned
        The pruned network.
    name : str
        Name of the recovery method.
    data : ImageData or None
        Images, on any device; labelled ones if the method needs labels.
    how : RecoveryOptions
        Options of the method.
    keep : Path, optional
        File for the result of training. If it exists, its result is used and nothing is trained.
    stopped : Path, optional
        File for the state of a stopped run, from which the run resumes; None for a file beside `keep`.

    Returns
    -------
    iterator of TrainingCost or TrainingProgress
        The cost (`TrainingCost`), then each `TrainingProgress` of training. A run that diverges starts again, with a new cost.

    Raises
    ------
    IntrafusionError
        For an unknown name, missing or unsuitable images, and a file `keep` that cannot be read.
    """
    with in_eval(pruned.small):
        yield from _recovering(pruned, name, data, how, keep, stopped)


def _recovering(
    pruned: Pruned, name: str, data: ImageData | None, how: RecoveryOptions, keep: Path | None, stopped: Path | None
) -> Iterator[TrainingCost | TrainingProgress]:
    found = None if keep is None else read_recovery(keep)
    if found is not None:
        yield found.facts
        yield from found.moments
        pruned.small.load_state_dict(found.state)
        return
    stopped = stopped or (None if keep is None else keep.with_suffix(".run"))
    facts, moments = None, []  # type: TrainingCost | None, list[TrainingProgress]
    data = None if data is None else data.to(device_of(pruned.small))
    for told in RECOVERIES[name](Case(pruned, data, how, stopped)) or ():
        if isinstance(told, TrainingCost):
            facts, moments = told, []
        else:
            moments.append(told)
        yield told
    if keep is not None and facts is not None:
        state = {"facts": asdict(facts), "moments": [asdict(m) for m in moments], "state": pruned.small.state_dict()}
        try:
            save(state, keep)
        except IntrafusionError as error:  # the network is recovered; only the cache is missing
            _log.warning("%s", error)


def read_recovery(path: Path) -> Kept | None:
    """Read a cached recovery from a file; None without a file. Raises IntrafusionError if the file cannot be read."""
    if not path.exists():
        return None
    state = load(path)
    return Kept(TrainingCost(**state["facts"]), tuple(TrainingProgress(**m) for m in state["moments"]), state["state"])
