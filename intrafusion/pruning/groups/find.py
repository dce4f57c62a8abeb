"""Channel groups of any network: found by tracing, then checked by tests that correct groups cannot fail.

All tests run on a copy on the CPU, with random weights that let every layer's signal through, so that mistakes show. Permuting
the channels of a prunable group must not change the logits. With half of the channels cut away, the network must compute the
same as with those channels zeroed, for all groups together and for subsets of them. Folding a BatchNorm must not change the
logits; a BatchNorm that fails stays in the network and counts as a layer with one weight per channel.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.models.fx.sharing import check_call, copied, twin
from intrafusion.models.precision import inputs_for
from intrafusion.pruning.groups.dependency import Graph
from intrafusion.pruning.groups.group import Group
from intrafusion.pruning.groups.norms import fold_norms, norms_of_groups
from intrafusion.pruning.groups.surgery import shrink
from intrafusion.runtime.devices import CPU

_log = logging.getLogger(__name__)
_MIXED = (
    "permuting its channels changes the logits: an operation mixes them or depends on their order, such as a shuffle, a norm"
    " over channels or a buffer with a value for each"
)
_CHANGED = "removing zeroed channels changes the logits: an operation depends on all channels"
_SCALES = (1.0, 100.0)  # of the inputs: some operations, as LocalResponseNorm, mix channels only where activations are large
_FEW = 3  # channels: in a group this small, two permutations are easily the same
_CHANCE = 1e-2  # of the largest logit: more than two equal passes differ by
_FOLDED = 5e-5  # of the largest logit: tolerance for folding a norm
_ERRORS = (RuntimeError, ValueError, IndexError, TypeError)  # raised by a network whose shapes do not fit


def find_groups(model: nn.Module, example: Tensor) -> list[Group]:
    """Find all channel groups of a network, from input to output; a group that cannot be pruned carries the reason.

    The network is not modified. example: one input, float (1, C, H, W); only its shape matters, not
    its device. Raises IntrafusionError
    if the network cannot be copied or traced at all.

    Examples
    --------
    >>> import intrafusion as itf
    >>> model = itf.load_model("digits-mlp")
    >>> [(group.name, group.size, group.reason) for group in itf.find_groups(model, model.card.example())]
    [('1', 128, None), ('3', 96, None), ('5', 10, "these channels are the network's outputs")]
    """
    check_call(model, example)
    if torch.is_inference_mode_enabled():
        raise IntrafusionError("finding groups needs gradients; call this outside of torch.inference_mode()")
    traced = twin(model).to(CPU).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    noise = inputs_for(traced, torch.randn(2, *example.shape[1:], generator=generator))
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            groups = Graph(traced, noise[:1].clone()).groups()
        with torch.inference_mode():
            logits = traced(noise.clone())
            again = traced(noise.clone())
            alone = traced(noise[:1].clone())
    except Exception as error:  # a user's forward can fail in any way
        raise IntrafusionError(
            f"cannot trace the network on an input of shape {tuple(example.shape)}: {one_line(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise IntrafusionError(f"the network must return one tensor of logits, (images, classes), {_instead(logits)}")
    if bool(torch.isfinite(logits).all()) and not _within(_CHANCE, again, logits):
        raise IntrafusionError(
            "the network is not deterministic in eval mode, for example because of F.dropout without"
            " training=self.training; make it deterministic"
        )
    if noise.dtype in (torch.float16, torch.bfloat16) and any(isinstance(one, _BatchNorm) for one in traced.modules()):
        _log.warning(
            "the network is in %s, in which folding BatchNorm would change its logits; BatchNorm is not folded; convert the "
            "network with model.float() for the results of float32",
            str(noise.dtype).removeprefix("torch."),
        )
    if not _within(_CHANCE, alone, logits[:1]):
        _log.warning(
            "the logits of an image depend on the other images in the batch, for example because of BatchNorm without running "
            "statistics; accuracies depend on the batches"
        )
    traced.requires_grad_(False)
    with torch.inference_mode():
        groups = _foldable(traced, noise[:1], groups)  # with its own weights and statistics
        _enliven(traced, generator)
        return _verified(traced, noise, _foldable(traced, noise[:1], groups))


def _instead(output: object) -> str:
    if isinstance(output, Tensor):
        return f"not a tensor of shape {tuple(output.shape)}"
    return f"not {type(output).__name__}; wrap it in a module that returns only the logits"


def _enliven(model: nn.Module, generator: torch.Generator) -> None:
    """Fill a network with random weights and statistics that let every layer's signal through, in place."""

    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data.copy_(noise * math.sqrt(2 / (parameter.numel() / parameter.shape[0])))
        else:
            parameter.data.copy_(noise * 0.1 + (0 if name.endswith("bias") else 1))
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.weight is not None:  # folding then flips the sign of every other channel, which comparisons notice
                module.weight[::2].neg_()


def _foldable(model: nn.Module, inputs: Tensor, groups: list[Group]) -> list[Group]:
    """Return the groups without the norms that cannot be folded because folding changes the logits."""
    norms = norms_of_groups(groups)
    if not norms:
        return groups
    if not bool(torch.isfinite(model(inputs.clone())).all()):  # pruning rejects such a network
        return groups

    def wrong(layers: Sequence[str]) -> bool:
        folded = copied(model)
        fold_norms(folded, {layer: norms[layer] for layer in layers})
        return not (
            _within(_FOLDED / 5, folded(inputs.clone()), model(inputs.clone()))  # in the model's own precision, which is faster
            or _within(_FOLDED, _exact(folded, inputs), _exact(model, inputs))
        )

    bad = set(_failing(list(norms), wrong))
    if not bad:
        return groups
    if bad < norms.keys() and wrong([layer for layer in norms if layer not in bad]):  # right one by one, but wrong together
        bad = set(norms)
    return [
        replace(
            group,
            layers=tuple(replace(one, norm=None) if one.name in bad else one for one in group.layers),
        )
        for group in groups
    ]


def _within(share: float, found: Tensor, expected: Tensor) -> bool:
    """Return whether all logits equal the expected ones, within `share` of the largest."""
    return bool((found - expected).abs().max() <= share * expected.abs().max())


def _failing(names: list[str], wrong: Callable[[Sequence[str]], bool]) -> list[str]:
    """Return the names that are wrong, alone or together with others, by testing halves and halves of failing halves."""
    if not names or not wrong(names):
        return []
    if len(names) == 1:
        return names
    half = len(names) // 2
    return _failing(names[:half], wrong) + _failing(names[half:], wrong)


def _exact(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return a network's logits as float64, computed in float64 if its code allows that."""
    try:
        return copied(model).double()(inputs.double()).double()
    except Exception:  # a user's forward can fail in any way
        return model(inputs.clone()).double()  # a network may modify its input in place


def _verified(model: nn.Module, inputs: Tensor, groups: list[Group]) -> list[Group]:
    """Return the groups, with a reason added to each one that fails its test. All groups are tested together first."""
    prunable = [group for group in groups if group.reason is None]
    if _Trial(model, inputs).failure(prunable) is None:
        return groups
    trial = _Trial(*_in_double(model, inputs))
    found = _failures(trial, prunable)
    passed: list[Group] = []
    right = [group for group in prunable if group.name not in found]
    if right and trial.failure(right):  # each passes alone or in its half, but not together: add them one by one
        for group in right:
            if reason := trial.failure([*passed, group]):
                found[group.name] = reason
            else:
                passed.append(group)
    return [replace(group, reason=group.reason or found.get(group.name)) for group in groups]


def _in_double(model: nn.Module, inputs: Tensor) -> tuple[nn.Module, Tensor]:
    """Return the model and inputs in float64, because float32 errors can look like another answer.

    They are returned unchanged if the model's code fails in float64.
    """
    try:
        exact = copied(model).double()
        exact(inputs.double())
        return exact, inputs.double()
    except Exception:  # a user's forward can fail in any way
        return model, inputs


def _failures(trial: "_Trial", groups: list[Group]) -> dict[str, str]:
    """Return group name -> reason for the groups that fail, by testing halves and halves of failing halves."""
    reason = trial.failure(groups)
    if reason is None or len(groups) < 2:
        return {group.name: reason for group in groups if reason}
    half = len(groups) // 2
    return _failures(trial, groups[:half]) | _failures(trial, groups[half:])


class _Trial:
    """A network with random weights and its logits for inputs at each scale; groups are tested on copies of it."""

    def __init__(self, model: nn.Module, inputs: Tensor):
        self.model = model
        tried = [(inputs * scale, model(inputs * scale)) for scale in _SCALES]  # new inputs each: some work in place
        self.pairs = tried[:1] + [pair for pair in tried[1:] if bool(torch.isfinite(pair[1]).all())]

    def failure(self, groups: list[Group]) -> str | None:
        """Return why these groups fail, all together or a subset without the others; None if none fails."""
        if not groups:
            return None
        small = [group for group in groups if group.size <= _FEW]  # their random permutations may coincide
        turned = (_permuted(self.model, some, 1) for some in (groups, *_selections(small)))
        if not all(self._same(*self.pairs[0], model) for model in turned):
            return _MIXED
        mixed = _permuted(self.model, groups)
        if not all(self._same(*pair, mixed) for pair in self.pairs):
            return _MIXED
        kept = {group: _half(group) for group in groups}
        zeroed, (inputs, _) = _zeroed(self.model, kept), self.pairs[0]
        expected = zeroed(inputs.clone())
        try:
            for some in (groups, *_selections(groups)):
                cut = copied(zeroed)
                shrink(cut, {group: kept[group] for group in some})
                if not self._same(inputs, expected, cut):
                    return _CHANGED
        except _ERRORS as error:
            return f"the network fails after channels are removed, for example because of a hard-coded shape: {one_line(error)}"
        return None

    def _same(self, inputs: Tensor, expected: Tensor, model: nn.Module) -> bool:
        """Return whether a network's logits are as expected.

        The tolerance is a thousandth of the largest difference between the original network's logits of the two images.
        """
        before = next(logits for images, logits in self.pairs if images is inputs)
        return bool((model(inputs.clone()) - expected).abs().max() <= 1e-3 * (before[0] - before[1]).abs().max())


def _selections(groups: list[Group]) -> Iterator[list[Group]]:
    """Yield subsets of the groups such that, of any two groups, some subset has one without the other."""
    for bit in range((len(groups) - 1).bit_length()):
        yield [group for place, group in enumerate(groups) if place >> bit & 1]


def _blocks(group: Group) -> list[Tensor]:
    return [(group.block == block).nonzero()[:, 0] for block in group.block.unique()]


def _permuted(model: nn.Module, groups: list[Group], turn: int | None = None) -> nn.Module:
    """Return a copy with each group's channels permuted within their blocks: at random, or rolled by `turn` places."""
    model, generator = copied(model), torch.Generator().manual_seed(0)
    for group in groups:
        order = torch.arange(group.size)
        for members in _blocks(group):
            order[members] = members[torch.randperm(len(members), generator=generator)] if turn is None else members.roll(turn)
        for layer in group.layers:
            held = layer.present()
            for view in layer.views(model).values():
                view[layer.positions[held].flatten()] = view[layer.positions[order][held].flatten()].clone()
    return model


def _half(group: Group) -> Tensor:
    """Return every second channel of each block, at least one: int64, sorted."""
    return torch.cat([members[::2] for members in _blocks(group)]).sort().values


def _zeroed(model: nn.Module, kept: dict[Group, Tensor]) -> nn.Module:
    """Return a copy in which the channels that are not kept are zero."""
    model = copied(model)
    for group, stays in kept.items():
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[stays] = False
        for layer in group.layers:
            for name, view in layer.views(model).items():
                if not name.startswith("running"):
                    view[layer.positions[gone & layer.present()].flatten()] = 0
    return model
