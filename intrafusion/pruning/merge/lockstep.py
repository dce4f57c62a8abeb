"""Side-by-side runs, layer by layer, of a dense network and one pruned from it, on the same images."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from intrafusion.errors import IntrafusionError, is_out_of_memory, one_line
from intrafusion.models.fx.partition import FITTED, Cuts, trace
from intrafusion.pruning.merge.layer_calls import Calls
from intrafusion.runtime.cancellation import checkpoint
from intrafusion.runtime.log import event

_MET = (*FITTED, _NormBase)  # the layers at which a walk stops
_MEMORY = 1 << 30  # bytes of values to keep; values beyond that are computed from the images again
Values = dict[str, Tensor]
Pairs = Iterator[tuple[Values, Values]]


class InStep:
    """A walk of two networks from input to output, which keeps their values at the present place within a memory bound.

    dense, small: in eval mode, BN folded, of one architecture, not in use elsewhere. batches: inputs, float (B, C, H, W).
    A layer of the small network may be changed once the walk has reached it.

    cuts: the layers in their order, and the values around each. If torch.fx cannot trace the network, or its trace does not fit
    both networks, hooks find the layers: both networks then run from the images up to each layer, which takes longer, and the
    sums that layers write into are not known. Hooks work with any code, so torch.export is not needed for the remaining cases.
    """

    def __init__(self, dense: nn.Module, small: nn.Module, batches: Sequence[Tensor]):
        self.dense, self.small, self._batches = dense, small, batches
        try:
            self.cuts = _chosen(dense, small, batches[0])
        except Exception as error:  # a user's forward can fail in any way
            if is_out_of_memory(error):
                raise
            raise IntrafusionError(f"cannot fit the network: it fails on these images: {one_line(error)}") from error
        self._names: tuple[str, ...] = ()
        self._kept: dict[int, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    def at(self, layer: str, dense: Sequence[str] = (), small: Sequence[str] = ()) -> Pairs:
        """Yield, for each batch, the values of the dense and the small network just before this layer runs, by name.

        They include at least the layer's input. dense, small: names of further values that each network computes from there.
        Raises IntrafusionError, with the layer's name, if it does not run once, or if it reads or writes something other than a
        tensor.
        """
        source, _, _ = self.cuts.around(layer)
        more = tuple(dict.fromkeys((source, *dense))), tuple(dict.fromkeys((source, *small)))
        pairs = self._by_cuts(self.cuts, layer, *more) if isinstance(self.cuts, Cuts) else self._by_hooks(layer, *more)
        for pair in pairs:
            if not all(isinstance(value, Tensor) for known in pair for value in known.values()):
                raise IntrafusionError(f"cannot fit {layer}: its input or output is not one tensor; choose drop or fusion")
            yield pair

    def _by_hooks(self, layer: str, dense: Sequence[str], small: Sequence[str]) -> Pairs:
        assert isinstance(self.cuts, Calls)
        for images in self.cuts.batches(self._batches):
            checkpoint()
            yield self.cuts.heard(self.dense, layer, images, dense), self.cuts.heard(self.small, layer, images, small)

    def _by_cuts(self, cuts: Cuts, layer: str, dense: Sequence[str], small: Sequence[str]) -> Pairs:
        names, size = cuts.in_front_of({layer}), 0
        if cuts.head(self._names, names) is None:  # for example a shortcut that has run already, but is visited only now
            self._kept.clear()
        for number, images in enumerate(self._batches):
            checkpoint()
            with torch.inference_mode():  # leave it before the yield, or it would apply in the caller's loop too
                start, pair = self._names, self._kept.pop(number, None)
                if pair is None:
                    start, pair = cuts.input, ((images,), (images,))
                whole, cut = (
                    _run(cuts, network, start, names, values)
                    for network, values in zip((self.dense, self.small), pair, strict=True)
                )
                size += sum(value.nbytes for value in (*whole, *cut))
                if size <= _MEMORY:
                    self._kept[number] = whole, cut
                known = _known(cuts, self.dense, names, whole, dense), _known(cuts, self.small, names, cut, small)
            yield known
        self._names = names


def _chosen(dense: nn.Module, small: nn.Module, images: Tensor) -> Cuts | Calls:
    """Return what finds the layers of both networks: the trace, or hooks if the trace does not fit."""
    calls, cuts = Calls(dense, images), trace(dense, images)
    if cuts is None:
        return calls
    hidden = [name for name in calls.layers(*_MET) if name not in cuts.layers(*_MET)]
    told = f"{hidden[0]}: it runs within another layer" if hidden else cuts.misfit(small, images[:2])
    if told:
        event("uncut", reason=told)
    return calls if told else cuts


def _known(cuts: Cuts, network: nn.Module, names: tuple[str, ...], values: tuple[Tensor, ...], more: Sequence[str]) -> Values:
    found = dict(zip(names, values, strict=True))
    ends = tuple(name for name in more if name not in found)
    return found | dict(zip(ends, _run(cuts, network, names, ends, values), strict=True))


def _run(
    cuts: Cuts, network: nn.Module, start: tuple[str, ...], end: tuple[str, ...], values: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    if not end or start == end:
        return values[: len(end)]
    head = cuts.head(start, end)
    assert head is not None
    return head(network, *values)
