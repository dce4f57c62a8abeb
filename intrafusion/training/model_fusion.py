"""Fusion of whole networks of one architecture that were trained separately: align channels by transport, then average.

Singh & Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, applied to channel groups, so that residual sums, depthwise
convolutions and flattened features are aligned together. As in the paper, distances are squared and between vectors of length
one.
"""

import copy
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from intrafusion.data.datasets import ImageData
from intrafusion.errors import IntrafusionError, check_choice
from intrafusion.models.card import card_of
from intrafusion.models.fx.sharing import check_finite, set_modes, twin
from intrafusion.pruning.groups.feature_maps import feature_maps, normalised
from intrafusion.pruning.groups.find import find_groups
from intrafusion.pruning.groups.group import CONSUMER, PRODUCER, Group, Layer
from intrafusion.pruning.groups.norms import folded_tensors
from intrafusion.pruning.transport.solvers import pot
from intrafusion.runtime.devices import device_of, doubled
from intrafusion.training.batchnorm import restate

ALIGNED = ("activations", "weights")  # how matching channels are found
SAMPLES = 200  # images whose activations are compared
MEASURED = 512  # images on which statistics are measured
_BATCH = 128  # images in a batch, enough for meaningful statistics
_PLACES = 4096  # maximum number of values of a channel to compare in each layer that reads it
_log = logging.getLogger(__name__)


def fuse_models(
    models: Sequence[nn.Module], example: Tensor, data: ImageData | None = None, by: str = "activations"
) -> nn.Module:
    """Fuse networks of one architecture into one: align all to the first, group by group from the input, and average them.

    example: one input, float (1, C, H, W). by: how matching channels are found, by their "activations" on `data` (200 of the
    images) or by the "weights" that write them, whose inputs are aligned already. All channels have the same mass, so the
    transport between two networks' channels is a permutation, which does not change what a network computes.

    data: two images or more. An average of networks has other statistics than the networks, and is often no better than chance
    until they are corrected (`batchnorm.restate`). On 512 of the images, BatchNorm is measured again, and the outputs of layers
    without BatchNorm get the average of the networks' means and deviations. Without data, channels are aligned by weights,
    BatchNorm's statistics are averaged too, and a warning says so: measure them before the network is used.

    The result has the card, mode and device of the first network, in plain form (`sharing`). Raises IntrafusionError for fewer
    than two networks, different shapes, weights that are not finite, and fewer than two images.
    """
    check_choice("by", by, ALIGNED)
    if data is not None and len(data) < 2:
        raise IntrafusionError("BatchNorm statistics need at least two images; pass more as data=")
    first, *others = _members(models)
    found = find_groups(first, example)
    groups = [group for group in found if group.reason is None]
    seen = data.subset(SAMPLES) if data is not None and by == "activations" else None
    members = [first, *(align(other, first, groups, seen) for other in others)]
    fused = copy.deepcopy(first)
    states = [member.state_dict() for member in members]
    fused.load_state_dict({name: _average([state[name] for state in states]) for name in states[0]})
    if data is None:
        _log.warning("fused without images: BatchNorm statistics are averages; pass data=, or measure them before use")
    else:
        normed = {layer.name for group in found for layer in group.layers if layer.norm}
        restate(fused, members, _batches(first, data.subset(MEASURED)), normed)
    set_modes(fused, models[0])
    return fused


def _members(models: Sequence[nn.Module]) -> list[nn.Module]:
    """Return copies of the networks. Raises IntrafusionError if they cannot be averaged."""
    if len(models) < 2:
        raise IntrafusionError(f"fusion needs at least two networks, not {len(models)}")
    models = [twin(model).to(device_of(models[0])) for model in models]
    for model in models:
        check_finite(model.named_modules())
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in models]
    if any(shape != shapes[0] for shape in shapes):
        raise IntrafusionError("fusion needs networks of the same architecture; these differ in layers or widths")
    return models


def _batches(model: nn.Module, data: ImageData) -> list[Tensor]:
    """Return the images as the model expects them, float (B, C, H, W), in batches of similar size."""
    images = torch.cat([images for images, _ in normalised(model, data)])
    return list(images.tensor_split(-(-len(images) // _BATCH)))


def align(model: nn.Module, target: nn.Module, groups: Sequence[Group], data: ImageData | None = None) -> nn.Module:
    """Return a copy of `model` that computes the same, with its channels in the order of the most similar ones of `target`.

    groups: the prunable groups of either network, from input to output. data: images to compare activations on; None: compare
    weights.
    """
    aligned = copy.deepcopy(model)
    if not hasattr(aligned, "card"):
        aligned.card = card_of(target)  # type: ignore[assignment]
    for group, rows, writers in _schedule(groups):
        ours, theirs = (_vectors(one, group, writers, data)[rows] for one in (aligned, target))
        order = torch.arange(group.size)
        order[rows] = rows[_matched(theirs, ours)]
        permute_channels(aligned, group, order)
    return aligned


def _schedule(groups: Sequence[Group]) -> Iterator[tuple[Group, Tensor, list[Layer]]]:
    """Yield (group, rows, writers): the channels to match, block by block, and the layers to compare them by.

    A layer can be used once all channels that it reads are aligned. Each block is first matched by such layers (a residual
    stream by its stem), and in the end by all layers that write it.
    """
    reads: dict[str, set[tuple[str, int]]] = {}
    for group in groups:
        for layer in group.role(CONSUMER):
            blocks = group.block[layer.present()].unique().tolist()
            reads.setdefault(layer.name, set()).update((group.name, block) for block in blocks)
    places = [(group, int(block)) for group in groups for block in group.block.unique()]
    settled: set[tuple[str, int]] = set()
    while True:
        told = len(settled)
        for group, block in places:
            rows = (group.block == block).nonzero()[:, 0]
            writers = [
                layer
                for layer in group.role(PRODUCER)
                if layer.present()[rows].all() and reads.get(layer.name, set()) <= settled
            ]
            if (group.name, block) not in settled and writers:
                settled.add((group.name, block))
                yield group, rows, writers
        if len(settled) == told:
            break
    for group, block in places:  # blocks in cycles, and all others again with all their writers
        yield group, (group.block == block).nonzero()[:, 0], group.role(PRODUCER)


def permute_channels(model: nn.Module, group: Group, order: Tensor) -> None:
    """Reorder a group's channels in place; the network computes the same.

    order: int64 (n,), a permutation within blocks.
    """
    for layer in group.layers:
        held = layer.present()
        places, sources = layer.positions[held].flatten(), layer.positions[order][held].flatten()
        for view in layer.views(model).values():
            view[places] = view[sources].clone()


def _vectors(model: nn.Module, group: Group, writers: Sequence[Layer], data: ImageData | None) -> Tensor:
    """Return the vectors by which channels are compared: float64 (n, d)."""
    if data is not None:
        return torch.cat([_sampled(maps) for maps in _maps(model, group, data)], 1)
    parts = []
    for layer in writers:
        weight, bias = folded_tensors(model, layer.name, layer.norm)
        rows = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)
        parts.append(_held(rows, layer))
    return torch.cat(parts, 1)


def _held(rows: Tensor, layer: Layer) -> Tensor:
    found = rows[layer.positions.clamp(min=0)].flatten(1)
    return found * layer.present()[:, None]


def _maps(model: nn.Module, group: Group, data: ImageData) -> list[Tensor]:
    """Return the values of each channel that each consumer reads: (n, values) each."""
    found: dict[Layer, list[Tensor]] = {}
    for batch in feature_maps(model, group, data):
        for layer, maps in batch:
            found.setdefault(layer, []).append(maps.transpose(0, 1).flatten(1))
    return [torch.cat(parts, 1).cpu().double() for parts in found.values()]


def _sampled(maps: Tensor) -> Tensor:
    """Return at most _PLACES of the values (n, values), from the same places for every network."""
    if maps.shape[1] <= _PLACES:
        return maps
    places = torch.randperm(maps.shape[1], generator=torch.Generator().manual_seed(0))[:_PLACES]
    return maps[:, places]


def _matched(targets: Tensor, sources: Tensor) -> Tensor:
    """Return, for each target, the source that the transport plan of equal masses assigns to it: int64 (n,)."""
    cost = torch.cdist(_unit(targets), _unit(sources)).square().numpy()
    mass = np.full(len(cost), 1 / len(cost))
    return torch.from_numpy(pot().emd(mass, mass, cost).argmax(1))


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _average(values: Sequence[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0]
    return torch.stack([doubled(value) for value in values]).mean(0).to(values[0])
