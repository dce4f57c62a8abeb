"""The trainers of the lab: one function each, which trains a network, yields its progress, and returns the result."""

import copy
from collections.abc import Generator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion._registry import TRAINERS
from intrafusion.pruning.groups.feature_maps import normalised
from intrafusion.pruning.groups.find import find_groups
from intrafusion.pruning.merge import reset_norms
from intrafusion.pruning.pruner import cut
from intrafusion.training.batchnorm import norms_of
from intrafusion.training.loop import SCHEDULES, Recipe
from intrafusion.training.methods.masks import Mask, finalise, mask, masks, what_learns
from intrafusion.training.methods.sdprun import Channels, GroupLasso, SDprun, channels_of
from intrafusion.training.methods.smooth import penalty, truncate
from intrafusion.training.methods.task import MEASURED, Look, PhaseProgress, Task, histogram, layer_weights, zeros

Telling = Generator[PhaseProgress, None, nn.Module]
_LI, _RUNKEL = "Li et al., arXiv 2107.05328", "Runkel et al., arXiv 2505.24469"
_FROZEN = (
    "one-cycle rate and the last masks (authors: a constant rate, the masks that are best on held-out images); biases are zero "
    "(authors: random); `signed` for all layers (authors: convolutions); BatchNorm, which their networks lack, is kept"
)
_RELATIVE = "penalties are relative to the size of the weights, and averaged over layers"
_DRAWS = 3  # draws of the masks for the accuracy of a sampled subnetwork


@TRAINERS.register(
    "sgd",
    "stochastic gradient descent with momentum and weight decay: the baseline",
    "",
    "labels",
    differs="SDprun and gRDA use neither momentum nor weight decay, nor does the SGD of their papers",
)
def sgd(task: Task) -> Telling:
    model = task.network()
    yield from task.teach("training", model, task.recipe())
    return model


@TRAINERS.register(
    "sdprun",
    "whole channels move to zero along flat directions of the loss, without retraining",
    _LI,
    "labels",
    knobs=("reach", "c", "mu"),
    reconstructed="for channels, from gRDA",
    differs="a group is a channel's incoming weights, across a residual stream; `reach` sets the strength unless `c` is set",
)
def sdprun(task: Task) -> Telling:
    model = task.network()
    recipe = task.recipe(schedule="flat")
    channels = channels_of(model, find_groups(model, task.example))
    norms = torch.cat([one.norms().detach() for one in channels if isinstance(one, Channels)])
    optimiser = SDprun(channels, recipe.lr, _strength(task, recipe, norms), task.spec.mu)

    def look(model: nn.Module) -> Look:
        norms = torch.cat([one.norms(lambda p: optimiser.state[p]["v"]) for one in optimiser.channels])
        found = histogram(norms, "norm of a channel's accumulated v: below the threshold the channel is zero")
        return Look(zeros(layer_weights(model)), **found, mark=optimiser.thresholds()[0])

    yield from task.teach("training", model, recipe, optimiser, look=look, settle=task.measure_norms)
    return model


@TRAINERS.register(
    "grda",
    "single weights move to zero along flat directions of the loss",
    "Chao et al., NeurIPS 2020",
    "labels",
    knobs=("reach", "c", "mu"),
    differs="biases and BatchNorm are not shrunk (authors: everything is); `reach` sets the strength unless `c` is set",
)
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
    "group-lasso",
    "SGD with a proximal step after each step, which shrinks the norm of every channel",
    "Yuan & Lin, 2006",
    "labels",
    knobs=("strength",),
)
def group_lasso(task: Task) -> Telling:
    model = task.network()
    recipe = task.recipe()
    channels = channels_of(model, find_groups(model, task.example))
    strength = 0.3 if task.spec.strength is None else task.spec.strength
    optimiser = GroupLasso(channels, recipe.lr, strength)

    def look(model: nn.Module) -> Look:
        norms = torch.cat([one.norms().detach() for one in optimiser.channels])
        return Look(zeros(layer_weights(model)), **histogram(norms, "norm of a channel: its weights, bias and BatchNorm"))

    yield from task.teach("training", model, recipe, optimiser, look=look, settle=task.measure_norms)
    return model


@TRAINERS.register(
    "aslp",
    "frozen random weights; a Gumbel-Softmax mask over them is trained, with one scale per layer",
    "Dupont et al., ICIP 2022",
    "labels",
    knobs=("drawn",),
    differs=f"{_FROZEN}; the scale is always trained (authors: off by default)",
)
def aslp(task: Task) -> Telling:
    return (yield from _subnetwork(task, "aslp", 50.0))


@TRAINERS.register(
    "supermask",
    "frozen random weights; masks are Bernoulli samples whose probabilities are trained",
    "Zhou et al., NeurIPS 2019",
    "labels",
    knobs=("drawn",),
    differs=f"{_FROZEN}; accuracy of the likelier half of each mask, rescaled (authors: mean accuracy of ten sampled masks)",
)
def supermask(task: Task) -> Telling:
    return (yield from _subnetwork(task, "supermask", 50.0))


@TRAINERS.register(
    "edge-popup",
    "frozen random weights; the half with the largest trained scores is kept",
    "Ramanujan et al., CVPR 2020",
    "labels",
    knobs=("drawn",),
    differs=f"{_FROZEN}; kept weights are scaled to make up for removed ones (the baseline of ASLP's authors: not)",
)
def edge_popup(task: Task) -> Telling:
    return (yield from _subnetwork(task, "edge-popup", 0.1))


@TRAINERS.register(
    "smooth-svd",
    "training with a penalty for low-rank or smooth weights, then a truncated SVD of each layer",
    _RUNKEL,
    "labels",
    knobs=("penalty", "strength", "energy"),
    reconstructed="from the abstract",
    differs=f"{_RELATIVE}; each layer keeps a share of its squared singular values",
)
def smooth_svd(task: Task) -> Telling:
    model = yield from _smooth(task, "nuclear", 0.5)
    small = truncate(model, energy=task.spec.energy)
    task.measure_norms(small)
    yield task.untaught("truncated", small)
    return small


@TRAINERS.register(
    "smooth-interpolation",
    "training with a penalty for smooth or low-rank weights, then interpolation to fewer channels",
    _RUNKEL,
    "labels",
    knobs=("penalty", "strength", "sparsity"),
    reconstructed="from the abstract",
    differs=_RELATIVE,
)
def smooth_interpolation(task: Task) -> Telling:
    model = yield from _smooth(task, "first", 2.0)
    groups, seen = find_groups(model, task.example), task.learned.subset(MEASURED, task.spec.seed)
    made = cut(model, groups, task.spec.sparsity, "l1", "interpolation")
    if norms_of(model):
        reset_norms(made.fit(seen))
    yield task.untaught("interpolated", made.small)
    return made.small


def _strength(task: Task, recipe: Recipe, norms: Tensor) -> float:
    """Return the strength c of the spec, or the one with which the final threshold is `reach` median norms."""
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
        zero = {name: 1 - float(one.kept().float().mean()) for name, one in found.items()}
        if method == "edge-popup":
            sizes = torch.cat([one.scores.detach().abs().flatten() for one in found.values()])
            return Look(zero, **histogram(sizes, "size of a weight's score"))
        probable = torch.cat([one.share().flatten() for one in found.values()])
        drawn = _sampled(task, masked)
        return Look(zero, **histogram(probable, "probability that a weight stays", 1.0), sampled=drawn)

    yield from task.teach("training", masked, recipe, optimiser, look=look, settle=task.measure_norms)
    return finalise(masked)


def _sampled(task: Task, masked: nn.Module) -> float:
    """Return the mean accuracy on the held-out images over several draws of the masks."""
    drawn = copy.deepcopy(masked)  # with its own random numbers
    for layer in drawn.modules():
        layer.training = isinstance(layer, Mask | _BatchNorm)  # use each batch's own statistics, as in training
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
        weights = layer_weights(model)
        spectra = [torch.linalg.svdvals(weight.flatten(1)) for weight in weights.values()]
        relative = torch.cat([values / values.max().clamp(min=1e-12) for values in spectra])
        return Look(zeros(weights), **histogram(relative, "singular value, as a share of its layer's largest", 1.0))

    yield from task.teach("training", model, task.recipe(), loss=loss, look=look)
    return model
