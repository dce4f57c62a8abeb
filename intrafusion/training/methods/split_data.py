"""Pruning in rounds, and training on parts of the images with fusion: Theus et al., ICLR 2024."""

from collections.abc import Generator, Sequence
from dataclasses import replace

from torch import nn

from intrafusion._registry import MERGES, TRAINERS
from intrafusion.pruning.groups.feature_maps import normalised
from intrafusion.pruning.groups.find import find_groups
from intrafusion.pruning.merge import repair
from intrafusion.pruning.pruner import cut
from intrafusion.training.batchnorm import norms_of
from intrafusion.training.methods.parallel import parts_of, together
from intrafusion.training.methods.spec import TrainSpec
from intrafusion.training.methods.task import MEASURED, PhaseProgress, Task, filters, layer_weights
from intrafusion.training.methods.trainers import Telling
from intrafusion.training.model_fusion import fuse_models
from intrafusion.training.recovery.batchnorm import absorb_norms, balance, insert_norms

_PAPER = "Theus et al., ICLR 2024"
_ROUNDS = (
    "each round removes its share of the remaining channels, from output to input, followed by REPAIR and a one-cycle rate "
    "(authors: shares of the initial width, from the input, BatchNorm in training mode, a constant rate without weight decay)"
)
_PRUNING = ("sparsity", "criterion", "merge", "rounds", "tune")


@TRAINERS.register(
    "iterative",
    "training, then rounds of pruning with fusion, each followed by fine-tuning",
    _PAPER,
    "labels",
    knobs=_PRUNING,
    differs=_ROUNDS,
)
def iterative(task: Task) -> Telling:
    model = yield from _trained(task, task.spec.but(method="sgd"))
    return (yield from _prune_in_rounds(task, model))


@TRAINERS.register(
    "fap",
    "fuse and prune: networks trained on parts of the images are fused, fine-tuned and then pruned in rounds",
    _PAPER,
    "labels",
    knobs=(*_PRUNING, "folds", "by"),
    differs=_ROUNDS,
)
def fap(task: Task) -> Telling:
    members = yield from together(task, [task.spec.but(method="sgd", **part) for part in parts_of(task.spec)])
    model = yield from _fuse(task, members)
    return (yield from _prune_in_rounds(task, model))


@TRAINERS.register(
    "paf",
    "prune and fuse: networks trained on parts of the images are pruned in rounds, then fused and fine-tuned",
    _PAPER,
    "labels",
    knobs=(*_PRUNING, "folds", "by"),
    differs=_ROUNDS,
)
def paf(task: Task) -> Telling:
    members = yield from together(task, [task.spec.but(method="iterative", **part) for part in parts_of(task.spec)])
    return (yield from _fuse(task, members))


def _trained(task: Task, spec: TrainSpec) -> Telling:
    """Return the network of another run of the lab, which is trained only if it does not exist yet; yield its steps."""
    for told in task.run(spec, task.device):
        if not isinstance(told, PhaseProgress):
            task.seconds.update(told.outcome.seconds)
            return told.model.to(task.device)
        yield told
    raise AssertionError("a run did not end with its outcome")


def _fuse(task: Task, members: Sequence[nn.Module]) -> Telling:
    """Fuse networks into one, measure its statistics on images of all parts, and fine-tune it on all images."""
    seen = task.learned.subset(MEASURED, task.spec.seed)
    model = fuse_models(members, task.example, seen, task.spec.by)
    yield task.untaught("fused", model)
    yield from _tuned(task, "fused, fine-tuned", model)
    return model


def _prune_in_rounds(task: Task, model: nn.Module) -> Telling:
    """Prune in rounds, each of which removes the same share of the remaining channels, and fine-tune after each.

    If the merge uses no images, REPAIR restores the mean and deviation of every layer's outputs: summed or lost channels change
    the scale of all signals, and training from there can end in a dead network.
    """
    spec = task.spec
    share = 1 - (1 - spec.sparsity) ** (1 / spec.rounds)
    for number in range(1, spec.rounds + 1):
        seen = task.learned.subset(MEASURED, spec.seed)
        found = find_groups(model, task.example)
        pruned = cut(model, found, share, spec.criterion, spec.merge, data=seen, seed=spec.seed)
        if MERGES[spec.merge].needs == "nothing" and pruned.merged:
            repair(pruned.fit(seen))
        model = pruned.small
        yield task.untaught(f"pruned {number}", model)
        yield from _tuned(task, f"pruned {number}, fine-tuned", model)
    return model


def _tuned(task: Task, phase: str, model: nn.Module) -> Generator[PhaseProgress, None, None]:
    """Fine-tune a network in place; if the architecture has BatchNorm, put one behind every layer but the last meanwhile."""
    if task.spec.tune == 0:
        return
    card = model.card
    has_norm = any(layer.norm for group in find_groups(task.network(), task.example) for layer in group.layers)
    if has_norm and not norms_of(model):
        names = list(layer_weights(model))[:-1]
        batches = [images for images, _ in normalised(model, task.learned.subset(MEASURED, task.spec.seed))]
        insert_norms(model, names, batches)
        balance(model)
    recipe = task.recipe(epochs=task.spec.tune)
    yield from task.teach(phase, model, replace(recipe, lr=recipe.lr / 10), look=filters)
    absorb_norms(model)
    model.card = card
