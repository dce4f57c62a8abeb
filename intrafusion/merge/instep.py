"""A dense network and one pruned from it, run layer by layer side by side, on the same images."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from intrafusion.cuts import Cuts, trace
from intrafusion.errors import IntrafusionError
from intrafusion.pace import checkpoint

_MEMORY = 1 << 30  # bytes of values kept; what finds no room is computed from the images again
Values = dict[str, Tensor]


class InStep:
    """Walks from input to output; what both networks make of every batch up to the present place is kept, within a bound.

    dense, small: in eval mode, BN folded, of one architecture. batches: inputs, float (B, C, H, W). The small network's
    layers may be changed once their turn has come. Raises IntrafusionError where torch.fx cannot follow the networks.
    """

    def __init__(self, dense: nn.Module, small: nn.Module, batches: Sequence[Tensor]):
        cuts = trace(dense)
        self.dense, self.small, self._batches = dense, small, batches
        if cuts is None or not all(_follows(cuts, network, batches[0][:2]) for network in (dense, small)):
            raise IntrafusionError("this merge needs a network whose layers can be traced: choose drop or fusion")
        self.cuts: Cuts = cuts
        self._names = cuts.input
        self._kept: dict[int, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}

    def at(self, layer: str, dense: Sequence[str] = (), small: Sequence[str] = ()) -> Iterator[tuple[Values, Values]]:
        """For each batch what the two networks know just before this layer runs, by the names of the graph's values.

        dense, small: further values that each is to compute from there.
        """
        names, size = self.cuts.in_front_of({layer}), 0
        if self.cuts.head(self._names, names) is None:  # as of a shortcut that was run, but whose own turn comes now
            self._kept.clear()
        for number, images in enumerate(self._batches):
            checkpoint()
            with torch.inference_mode():  # left before the yield, or it would hold in the caller's loop too
                start, pair = self._names, self._kept.pop(number, None)
                if pair is None:
                    start, pair = self.cuts.input, ((images,), (images,))
                whole, cut = (
                    self._run(network, start, names, values)
                    for network, values in zip((self.dense, self.small), pair, strict=True)
                )
                size += sum(value.nbytes for value in (*whole, *cut))
                if size <= _MEMORY:
                    self._kept[number] = whole, cut
                known = self._known(self.dense, names, whole, dense), self._known(self.small, names, cut, small)
            yield known
        self._names = names

    def _known(
        self, network: nn.Module, names: tuple[str, ...], values: tuple[Tensor, ...], more: Sequence[str]
    ) -> Values:
        found = self._run(network, names, tuple(more), values) if more else ()
        return dict(zip((*names, *more), (*values, *found), strict=True))

    def _run(
        self, network: nn.Module, start: tuple[str, ...], end: tuple[str, ...], values: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        if start == end:
            return values
        head = self.cuts.head(start, end)
        assert head is not None
        return head(network, *values)


def _follows(cuts: Cuts, network: nn.Module, images: Tensor) -> bool:
    tail = cuts.tail(cuts.input)
    with torch.inference_mode():
        try:
            expected, found = network(images), tail(network, images)[0] if tail else None
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
    return found is not None and bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())
