"""The trainers of the lab: one function each, that trains a network, tells how it goes, and returns what came of it."""

import copy
from collections.abc import Generator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.activations import normalised
from intrafusion.groups import find_groups
from intrafusion.prune import prune
from intrafusion.recover.norms import absorb_norms, balance, insert_norms
from intrafusion.registry import TRAINERS
from intrafusion.train.directional import Channels, GroupLasso, SDprun, channels_of
from intrafusion.train.fuse import SAMPLES, fuse_models
from intrafusion.train.loop import SCHEDULES, Recipe
from intrafusion.train.members import parts_of, together
from intrafusion.train.smooth import penalty, truncate
from intrafusion.train.spec import TrainSpec
from intrafusion.train.subnetwork import GumbelMask, Mask, Supermask, finalise, mask, masks, what_learns
from intrafusion.train.task import Look, Step, Task, filters, histogram, layers_of, zeros

Telling = Generator[Step, None, nn.Module]
_LI, _RUNKEL, _THEUS = "Li et al., arXiv 2107.05328", "Runkel et al., arXiv 2505.24469", "Theus et al., ICLR 2024"
_PRUNING = ("sparsity", "criterion", "merge", "rounds", "tune")
_MEASURED = 512  # images on which norms are put back into a pruned network
_DRAWS = 3  # of the masks, for the accuracy of a sampled subnetwork


@TRAINERS.register("sgd", "stochastic gradient descent with momentum and weight decay: the baseline", "", "labels")
def sgd(task: Task) -> Telling:
    model = task.network()
    yield from task.teach("training", model, task.recipe())
    return model


@TRAINERS.register(
    "sdprun", "whole channels move to zero, in directions in which the loss is flat; nothing is trained again",
    _LI, "labels", knobs=("reach", "c", "mu"),
)  # fmt: skip
def sdprun(task: Task) -> Telling:
    model = task.network()
    recipe = task.recipe(schedule="flat")
    channels = channels_of(model, find_groups(model, task.example))
    norms = torch.cat([one.norms().detach() for one in channels if isinstance(one, Channels)])
    optimiser = SDprun(channels, recipe.lr, _strength(task, recipe, norms), task.spec.mu)

    def look(model: nn.Module) -> Look:
        norms = torch.cat([one.norms(lambda p: optimiser.state[p]["v"]) for one in optimiser.channels])
        found = histogram(norms, "norm of a channel's accumulated v: below the threshold the channel is zero")
        return Look(zeros(layers_of(model)), **found, mark=optimiser.thresholds()[0])

    yield from task.teach("training", model, recipe, optimiser, look=look, settle=task.measure_norms)
    return model


@TRAINERS.register(
    "grda", "single weights move to zero, in directions in which the loss is flat", "Chao et al., NeurIPS 2020", "labels",
    knobs=("reach", "c", "mu"),
)  # fmt: skip
def grda(task: Task) -> Telling:
    model = task.network()
    recipe = task.recipe(schedule="flat")
    many = [p for p in model.parameters() if p.ndim > 1]
    few = [p for p in model.parameters() if p.ndim <= 1]
    c = _strength(task, recipe, torch.cat([p.detach().abs().flatten() for p in many]))
    optimiser = SDprun([*many, {"params": few, "c": 0.0}], recipe.lr, c, task.spec.mu)
    yield from task.teach("training", model, recipe, optimiser, settle=task.measure_norms)
    return model


@TRAINERS.register(
    "group-lasso", "SGD, each step followed by a proximal one that shrinks every channel's norm", "Yuan & Lin, 2006", "labels",
    knobs=("strength",),
)  # fmt: skip
def group_lasso(task: Task) -> Telling:
    model = task.network()
    recipe = task.recipe()
    channels = channels_of(model, find_groups(model, task.example))
    strength = 0.3 if task.spec.strength is None else task.spec.strength
    optimiser = GroupLasso(channels, recipe.lr, strength)

    def look(model: nn.Module) -> Look:
        norms = torch.cat([one.norms().detach() for one in optimiser.channels])
        return Look(zeros(layers_of(model)), **histogram(norms, "norm of a channel: its weights, bias and BatchNorm"))

    yield from task.teach("training", model, recipe, optimiser, look=look, settle=task.measure_norms)
    return model


@TRAINERS.register(
    "aslp", "weights stay as drawn; a Gumbel-Softmax mask over them learns, with a scale a layer", "Dupont et al., ICIP 2022",
    "labels", knobs=("drawn",),
)  # fmt: skip
def aslp(task: Task) -> Telling:
    return (yield from _subnetwork(task, "aslp", 50.0))


@TRAINERS.register(
    "supermask", "weights stay as drawn; masks are Bernoulli draws whose probabilities learn", "Zhou et al., NeurIPS 2019",
    "labels", knobs=("drawn",),
)  # fmt: skip
def supermask(task: Task) -> Telling:
    return (yield from _subnetwork(task, "supermask", 50.0))


@TRAINERS.register(
    "edge-popup", "weights stay as drawn; half of them stays, those with the largest learned scores",
    "Ramanujan et al., CVPR 2020", "labels", knobs=("drawn",),
)  # fmt: skip
def edge_popup(task: Task) -> Telling:
    return (yield from _subnetwork(task, "edge-popup", 0.1))


@TRAINERS.register(
    "smooth-svd", "a penalty makes weights smooth or low in rank; then every layer is its truncated SVD (reconstructed)",
    _RUNKEL, "labels", knobs=("penalty", "strength", "energy"),
)  # fmt: skip
def smooth_svd(task: Task) -> Telling:
    model = yield from _smooth(task, "nuclear", 0.5)
    small = truncate(model, energy=task.spec.energy)
    yield task.untaught("truncated", small)
    return small


@TRAINERS.register(
    "smooth-interpolation",
    "a penalty makes weights smooth or low in rank; then channels are interpolated by fewer (reconstructed)",
    _RUNKEL, "labels", knobs=("penalty", "strength", "sparsity"),
)  # fmt: skip
def smooth_interpolation(task: Task) -> Telling:
    model = yield from _smooth(task, "first", 2.0)
    small = prune(model, task.example, task.spec.sparsity, "l1", "interpolation")
    yield task.untaught("interpolated", small)
    return small


@TRAINERS.register(
    "iterative",
    "trained, then pruned and fused in rounds, each followed by fine-tuning",
    _THEUS,
    "labels",
    knobs=_PRUNING,
)
def iterative(task: Task) -> Telling:
    model = yield from _trained(task, task.spec.but(method="sgd"))
    return (yield from _prune_in_rounds(task, model))


@TRAINERS.register(
    "fap", "fuse and prune: networks trained on parts of the images are fused, fine-tuned, then pruned in rounds",
    _THEUS, "labels", knobs=(*_PRUNING, "folds", "by"),
)  # fmt: skip
def fap(task: Task) -> Telling:
    members = yield from together(task, [task.spec.but(method="sgd", **part) for part in parts_of(task.spec)])
    model = yield from _fuse(task, members)
    return (yield from _prune_in_rounds(task, model))


@TRAINERS.register(
    "paf", "prune and fuse: networks are trained on parts of the images and pruned in rounds, then fused and fine-tuned",
    _THEUS, "labels", knobs=(*_PRUNING, "folds", "by"),
)  # fmt: skip
def paf(task: Task) -> Telling:
    members = yield from together(task, [task.spec.but(method="iterative", **part) for part in parts_of(task.spec)])
    return (yield from _fuse(task, members))


def _trained(task: Task, spec: TrainSpec) -> Telling:
    """The network of another run of the lab, which is trained only once."""
    from intrafusion.train.lab import LabRun, run

    for told in run(spec, task.device):
        if isinstance(told, LabRun):
            task.seconds.update(told.outcome.seconds)
            return told.model.to(task.device)
        yield told
    raise AssertionError("a run ends with what came of it")


def _strength(task: Task, recipe: Recipe, norms: Tensor) -> float:
    """The c with which the threshold ends where the spec wants it."""
    spec = task.spec
    if spec.c is not None:
        return spec.c
    steps = recipe.steps(len(task.learned))
    rates = (recipe.lr * SCHEDULES[recipe.schedule](step / steps, recipe.warmup) for step in range(steps))
    growth = sum(lr ** (spec.mu + 0.5) * ((n + 1) ** spec.mu - n**spec.mu) for n, lr in enumerate(rates))
    return spec.reach * float(norms.median()) / growth


def _subnetwork(task: Task, method: str, lr: float) -> Telling:
    spec = task.spec
    masked = mask(task.network(None if spec.drawn == "keep" else "random"), method, spec.seed, spec.drawn)
    recipe = task.recipe(lr, 256)
    optimiser = torch.optim.SGD(what_learns(masked, recipe.lr), momentum=0.9)

    def look(masked: nn.Module) -> Look:
        found = masks(masked)
        probable = torch.cat([one.share().flatten() for one in found.values()])
        zero = {name: 1 - float(one.kept().double().mean()) for name, one in found.items()}
        title = "probability that a weight stays" if method != "edge-popup" else "size of a weight's score"
        values = (
            probable
            if method != "edge-popup"
            else torch.cat([m.scores.detach().abs().flatten() for m in found.values()])
        )
        return Look(
            zero, **histogram(values, title, 1.0 if method != "edge-popup" else None), sampled=_sampled(task, masked)
        )

    yield from task.teach("training", masked, recipe, optimiser, look=look, settle=task.measure_norms)
    return finalise(masked)


def _sampled(task: Task, masked: nn.Module) -> float | None:
    """Mean accuracy on the held-out images with masks drawn; None where nothing is drawn."""
    drawn = copy.deepcopy(masked)  # with random numbers of its own
    found = masks(drawn)
    if not any(isinstance(one, GumbelMask | Supermask) for one in found.values()):
        return None
    for layer in drawn.modules():
        layer.training = isinstance(layer, Mask | _BatchNorm)  # a batch's own statistics, as while it learns
    right = 0
    with torch.inference_mode():
        for _ in range(_DRAWS):
            for images, labels in normalised(drawn, task.held):
                right += int((drawn(images).argmax(1) == labels).sum())
    return right / (_DRAWS * len(task.held))


def _smooth(task: Task, kind: str, strength: float) -> Telling:
    model, spec = task.network(), task.spec
    kind, strength = spec.penalty or kind, strength if spec.strength is None else spec.strength

    def loss(logits: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) + strength * penalty(model, kind)

    def look(model: nn.Module) -> Look:
        weights = layers_of(model)
        spectra = [torch.linalg.svdvals(weight.flatten(1)) for weight in weights.values()]
        relative = torch.cat([values / values.max().clamp(min=1e-12) for values in spectra])
        return Look(zeros(weights), **histogram(relative, "singular value, as a share of its layer's largest", 1.0))

    yield from task.teach("training", model, task.recipe(), loss=loss, look=look)
    return model


def _fuse(task: Task, members: Sequence[nn.Module]) -> Telling:
    """The networks as one, fine-tuned on all images."""
    data = task.learned.subset(SAMPLES, task.spec.seed) if task.spec.by == "activations" else None
    model = fuse_models(members, task.example, data)
    yield task.untaught("fused", model)
    yield from _tuned(task, "fused, fine-tuned", model)
    return model


def _prune_in_rounds(task: Task, model: nn.Module) -> Telling:
    """Channels go in equal shares of those that are left."""
    spec = task.spec
    share = 1 - (1 - spec.sparsity) ** (1 / spec.rounds)
    for number in range(1, spec.rounds + 1):
        seen = task.learned.subset(_MEASURED, spec.seed)
        model = prune(model, task.example, share, spec.criterion, spec.merge, data=seen, seed=spec.seed)
        yield task.untaught(f"pruned {number}", model)
        yield from _tuned(task, f"pruned {number}, fine-tuned", model)
    return model


def _tuned(task: Task, phase: str, model: nn.Module) -> Generator[Step, None, None]:
    """Fine-tune a network in place, with BatchNorm behind every layer but the last for as long as that takes."""
    if task.spec.tune == 0:
        return
    card = model.card
    has_norm = any(layer.norm for group in find_groups(task.network(), task.example) for layer in group.layers)
    if has_norm and not any(isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d) for layer in model.modules()):
        names = list(layers_of(model))[:-1]
        batches = [images for images, _ in normalised(model, task.learned.subset(_MEASURED, task.spec.seed))]
        insert_norms(model, names, batches)
        balance(model)
    recipe = task.recipe(epochs=task.spec.tune)
    yield from task.teach(phase, model, replace(recipe, lr=recipe.lr / 10), look=filters)
    absorb_norms(model)
    model.card = card
