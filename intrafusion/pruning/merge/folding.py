"""Folding: similar channels, found by k-means, become one.

Wang et al., "Forget the Data and Fine-Tuning! Just Fold the Network to Compress", ICLR 2025. How the norms' scales and
deviations enter k-means is a choice. The paper's formula uses them as a diagonal, which separates important channels whatever
they compute; the authors' code adds one column for each. By default they are left out, because then every kind of folding
keeps the most accuracy on CIFAR-10 ResNet-20 and ResNet-56, with 30 % and with 50 % of the channels removed.

The authors' code differs in other points too: it clusters by Hartigan's k-means after PCA (scaled robustly for fold-AR), uses
the cosines of producers and of consumers, and measures fold-R's statistics on all training images, augmented.
"""

import torch
from torch import Tensor, nn

from intrafusion._registry import MERGES
from intrafusion.errors import check_choice
from intrafusion.options import options_of
from intrafusion.pruning.groups.group import CONSUMER, PRODUCER, Group, Layer
from intrafusion.pruning.groups.norms import Norm, norm_of
from intrafusion.pruning.merge.channel_statistics import reset_norms
from intrafusion.pruning.merge.drop_and_fusion import apply
from intrafusion.pruning.merge.kmeans import gram, kmeans
from intrafusion.pruning.transport.planning import TransportPlan
from intrafusion.spec import PruneSpec

FOLD_NORMS = options_of(PruneSpec)["fold_norms"].choices  # how k-means uses the norms
_PAPER = "Wang et al., ICLR 2025"
_CLUSTERS = (
    "Lloyd's k-means on all weights, with or without BatchNorm (`fold_norms`); the authors' code uses Hartigan's k-means after "
    "PCA and with BatchNorm"
)


@MERGES.register(
    "fold",
    "each k-means cluster becomes one channel; scales restore the lost variance without data (fold-AR)",
    _PAPER,
    transports=False,
    knobs=("fold_norms",),
    differs=f"{_CLUSTERS}; cosines of the producers' weights only (authors: also of the consumers')",
)
def fold_ar(model: nn.Module, group: Group, plan: TransportPlan, fold_norms: str = "none") -> Tensor:
    return _fold(model, group, plan, fold_norms, repair=True)


@MERGES.register(
    "fold-naive",
    "each k-means cluster becomes one channel; scales and statistics are averaged",
    _PAPER,
    transports=False,
    knobs=("fold_norms",),
    differs=_CLUSTERS,
)
def fold_naive(model: nn.Module, group: Group, plan: TransportPlan, fold_norms: str = "none") -> Tensor:
    return _fold(model, group, plan, fold_norms, repair=False)


MERGES.register(
    "fold-r",
    "as fold-naive, then the statistics of every BatchNorm are recomputed on images (fold-R)",
    _PAPER,
    "images",
    fit=reset_norms,
    transports=False,
    knobs=("fold_norms",),
    differs=f"{_CLUSTERS}; statistics on the calibration images (authors: on all training images, augmented)",
)(fold_naive)


def clusters(model: nn.Module, group: Group, plan: TransportPlan, fold_norms: str = "none") -> Tensor:
    """Cluster the channels block by block, into as many clusters as channels are kept.

    Returns the membership matrix (k, n), with one 1 per column. k-means runs on the weights by which producers write and
    consumers read the channels, and keeps the best of 10 starts. fold_norms: "columns" adds the scale and the inverse deviation
    of each producer's norm. Raises IntrafusionError for a choice that is not in FOLD_NORMS.
    """
    check_choice("fold_norms", fold_norms, FOLD_NORMS)
    products = gram(part for layer in group.layers for part in _parts(model, layer, fold_norms))
    members = torch.zeros(len(plan.kept), group.size, dtype=torch.float64)
    for block in group.block.unique():
        rows, stay = (group.block == block).nonzero()[:, 0], (group.block[plan.kept] == block).nonzero()[:, 0]
        if len(stay) == 0:
            continue
        same = len(stay) == len(rows)
        labels = torch.arange(len(rows)) if same else kmeans(products[rows][:, rows], len(stay))
        members[stay[labels], rows] = 1
    return members


def _parts(model: nn.Module, layer: Layer, fold_norms: str) -> list[Tensor]:
    """Return the k-means features of each channel in one layer: (n, m) each, zero if the layer does not hold the channel."""
    views, held = layer.views(model), layer.present()
    if layer.role not in (PRODUCER, CONSUMER) or not views:
        return []
    view, norm = views["weight"], norm_of(model.get_submodule(layer.name))
    positions = layer.positions.clamp(min=0)
    raw = view
    if norm is not None and layer.role == PRODUCER:
        raw = view.double() / norm.factor.view(-1, *[1] * (view.ndim - 1))
    parts = [raw[positions].flatten(1).mul_(held[:, None])]
    if layer.role == CONSUMER:
        return parts
    if norm is not None and fold_norms == "columns":
        parts += [(values[positions[:, 0]] * held)[:, None] for values in (norm.gamma, 1 / norm.std)]
    return parts


def _fold(model: nn.Module, group: Group, plan: TransportPlan, fold_norms: str, repair: bool) -> Tensor:
    members = clusters(model, group, plan, fold_norms)
    mean = members / members.sum(1, keepdim=True).clamp(min=1)
    norms = {
        layer: norm
        for layer in group.role(PRODUCER)
        if layer.positions.shape[1] == 1 and (norm := norm_of(model.get_submodule(layer.name)))
    }
    rows = {layer: _normed_rows(model, layer, norm, members, repair) for layer, norm in norms.items()}
    apply(model, group, mean, plan.kept, members)
    for layer, (weight, bias) in rows.items():
        views, held = layer.views(model), layer.present()[plan.kept]
        places = layer.positions[plan.kept[held], 0]
        views["weight"][places] = weight[held].to(views["weight"])
        views["bias"][places] = bias[held].to(views["bias"])
    return mean


def _normed_rows(model: nn.Module, layer: Layer, norm: Norm, members: Tensor, repair: bool) -> tuple[Tensor, Tensor]:
    """Return the weights (k, ...) and biases (k,), float64, of a producer whose norm is folded in."""
    held = layer.present().double()
    members = members * held
    sizes = members.sum(1)
    mean = members / sizes[:, None].clamp(min=1)
    views, at = layer.views(model), layer.positions[:, 0].clamp(min=0)
    gamma, beta, std, centre, factor = (part[at] for part in (norm.gamma, norm.beta, norm.std, norm.mean, norm.factor))
    weight, bias = views["weight"].double()[at], views["bias"].double()[at]
    raw = weight.flatten(1) / factor[:, None]  # as the layer was before its norm was folded into it
    shift = (bias - beta) / factor + centre
    if repair:
        unit, moved = raw / std[:, None], (shift - centre) / std
        scale = (mean @ gamma) * _gain(unit, members)
        rows, biases = scale[:, None] * (mean @ unit), scale * (mean @ moved) + mean @ beta
    else:
        scale = (mean @ gamma) / (mean @ std.square()).clamp(min=1e-12).sqrt()
        rows, biases = scale[:, None] * (mean @ raw), scale * (mean @ (shift - centre)) + mean @ beta
    return rows.reshape(-1, *weight.shape[1:]), biases


def _gain(rows: Tensor, members: Tensor) -> Tensor:
    """Compute N / sqrt(N + (N^2 - N) E), where E is the mean cosine between two of a cluster's N rows: (k,)."""
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    sizes = members.sum(1)
    pairs = (sizes.square() - sizes).clamp(min=1)
    cosine = ((members @ unit).square().sum(1) - members @ unit.square().sum(1)) / pairs
    return torch.where(sizes > 1, sizes / (sizes + (sizes.square() - sizes) * cosine).clamp(min=1e-6).sqrt(), 1.0)
