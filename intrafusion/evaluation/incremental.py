"""Fast measurement of pruned networks: unchanged layers are not run again, and only uncertain predictions use fp32.

Images are taken in an order in which every prefix is a stratified sample. The dense network's activations before the first
changed layer are cached, up to a memory limit, for all networks that change there.

With precision "exact", predictions are those of fp32 (without TF32 on a GPU); on a device with bf16 instructions, they are
computed with `bf16_screening`.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from intrafusion.data.datasets import ImageData, normalise
from intrafusion.errors import is_out_of_memory, one_line
from intrafusion.evaluation.accuracy import evaluate, stratified
from intrafusion.evaluation.bf16_screening import Screen, Values
from intrafusion.evaluation.output_mixing import remixed
from intrafusion.models.card import card_for
from intrafusion.models.fx.graph import alike
from intrafusion.models.fx.partition import Part, trace
from intrafusion.models.precision import check_accuracy, check_bf16, has_bf16, inputs_for, kind_of, low
from intrafusion.runtime.cancellation import checkpoint, clock
from intrafusion.runtime.devices import CPU, device_of, float32_without_tf32
from intrafusion.runtime.log import event, say

MEMORY = 1 << 30  # default limit on bytes of cached values
_PROBE_SECONDS, _LARGEST, _LARGEST_ON_GPU = 0.6, 512, 8192
_PATIENCE = 0.25  # most seconds between two checks for cancellation
_MISFITS = (RuntimeError, TypeError, ValueError)  # raised by a network whose code requires another dtype
_PAYS = 0.75  # bf16 must take less than this share of fp32's time to pay for running some images again


@dataclass
class _Front:
    """A cut, the part after it, and cached values at the cut, keyed by the batch's first image and whether they are in bf16."""

    names: tuple[str, ...]
    tail: Part
    trusted: bool = False
    kept: dict[tuple[int, bool], Values] = field(default_factory=dict)
    screen: Screen = field(default_factory=Screen)


@dataclass
class _Twins:
    """The forms in which a pruned network runs, kept for its next images. They share layers with the dense network.

    again: the layers whose dense outputs are mixed. whole: the network in the meter's precision. mixed: the same with mixed
    outputs. cheap: in bf16, for screening, None before it is needed. whole and mixed are None for the network itself.
    """

    again: frozenset[str]
    whole: nn.Module | None
    mixed: nn.Module | None
    cheap: nn.Module | None = None


class Meter:
    """Measures networks that were pruned from one dense network, on one set of images.

    model: the dense network, with BN folded, in eval mode and without in-place operations; it is not changed. data: uint8
    images, moved to the model's device; those without labels are left out. precision: "exact" or "fast" (bf16). batch: images
    per batch; None to find it by a short probe. memory: most bytes of cached activations. Raises IntrafusionError if the data
    do not fit the model, or if precision "fast" is not available.
    """

    @float32_without_tf32()
    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        precision: str = "exact",
        seed: int = 0,
        memory: int = MEMORY,
        batch: int | None = None,
    ):
        card, data = card_for(model, data), data.to(device_of(model)).labelled()
        self.model = self._exact = model
        self.card, self.precision, self.memory = card, precision, memory
        self.data, self.order = data, stratified(data.labels.cpu(), seed).to(data.labels.device)
        self.labels = data.labels[self.order]
        self._cuts = trace(model, self._input(0, 3))
        self._plain = _Front((), lambda network, images: (network(images.clone()),), True)  # for networks that cannot be cut
        self._fronts: dict[tuple[tuple[str, ...], frozenset[str]], _Front] = {}
        self._front, self._older, self._bytes = self._plain, self._plain, 0
        self._twins: WeakKeyDictionary[nn.Module, _Twins] = WeakKeyDictionary()
        self._dense = torch.zeros(0, dtype=torch.bool)
        if precision == "fast":
            check_bf16(self.labels.device)
            self._lower()
        self.batch = batch or self._probe(self.model)
        self._cheap = self._screening_twin() if self.precision == "exact" else None
        if self.precision == "fast":
            check_accuracy(evaluate(model, data, None).accuracy, float(self.dense(len(self)).float().mean()))

    def _lower(self) -> None:
        """Measure in bf16 from now on, if the network's code allows it; otherwise report that it is measured as it is."""
        cheap = low(self.model)
        try:
            with torch.inference_mode():
                cheap(inputs_for(cheap, self._input(0, 1)))
        except _MISFITS as error:
            say(f"measuring without precision fast: the network does not run in bf16 ({one_line(error)})")
            self.precision = "exact"
        else:
            self.model = cheap

    def __len__(self) -> int:
        return len(self.labels)

    def up_to(self, count: int) -> int:
        """Return the smallest number of images, at least `count`, that fills whole batches, or all images."""
        return min(len(self), -(-count // self.batch) * self.batch)

    @float32_without_tf32()
    def dense(self, stop: int) -> Tensor:
        """Return which of the first `stop` images the dense network gets right: bool (stop,)."""
        if stop > len(self._dense):
            front = self._turn_to((), self.model, self.model)  # uncut: only a pruned network can show that a cut is right
            more = self._correct(self.model, self._cheap, front, range(len(self._dense), stop), float("inf"))
            self._dense = torch.cat([self._dense, more])
        return self._dense[:stop]

    @float32_without_tf32()
    def correct(
        self, network: nn.Module, changed: Collection[str], start: int, stop: int, patience: float = float("inf")
    ) -> Tensor:
        """Return which of the images `start` to `stop` a network gets right.

        The network must not change between calls. changed: the layers in which it differs from the dense network. Stops
        early, after a whole batch, once `patience` seconds have passed: bool (at most stop - start,), on the CPU.
        """
        if network not in self._twins:
            self._twins[network] = self._twins_of(network, changed)
        twins = self._twins[network]
        whole, mixed = (network if one is None else one for one in (twins.whole, twins.mixed))
        cut = self._cuts.in_front_of(changed, twins.again) if self._cuts else ()
        front = self._turn_to(cut, whole, mixed, twins.again)
        tail = whole if front is self._plain else mixed
        if self._cheap and twins.cheap is None:
            twins.cheap = low(tail, self._cheap, changed)
        return self._correct(tail, twins.cheap if self._cheap else None, front, range(start, stop), patience)

    def _twins_of(self, network: nn.Module, changed: Collection[str]) -> _Twins:
        mixed, again = network, frozenset()  # type: nn.Module, frozenset[str]
        if self.labels.device == CPU:  # a GPU has the operations to spare, and would wait for the solutions
            mixed, again = remixed(self._exact, network, self._cuts.first_of(changed) if self._cuts else ())
        if self.precision == "fast":
            whole = low(network, self.model, changed)
            return _Twins(again, whole, low(mixed, self.model, changed) if again else whole)
        return _Twins(again, None, mixed if again else None)

    def forget(self) -> None:
        """Release all cached values."""
        for front in self._fronts.values():
            front.kept.clear()
        self._bytes = 0
        self._twins.clear()

    def _turn_to(
        self, names: tuple[str, ...], network: nn.Module, mixed: nn.Module, again: frozenset[str] = frozenset()
    ) -> _Front:
        """Make the cut at these values the current one; the values of the previous cut may help to compute its own."""
        key = names, again
        if key not in self._fronts:
            tail = self._cuts.tail(names, again) if self._cuts and names else None
            self._fronts[key] = _Front(names, tail) if tail else self._plain
        front = self._fronts[key]
        if not front.trusted:
            front.trusted = self._agrees(front, network, mixed)
            front = self._fronts[key] = front if front.trusted else self._plain
        if front is not self._front:
            self._bytes -= _bytes(self._older.kept)
            self._older.kept.clear()
            self._older, self._front = self._front, front
            cast = [key for key in self._older.kept if key[1]]  # bf16 values are no input of a step between cuts
            self._bytes -= _bytes({key: self._older.kept.pop(key) for key in cast})
        return front

    def _agrees(self, front: _Front, network: nn.Module, mixed: nn.Module) -> bool:
        """Return whether head and tail compute the same as the whole network: false if the trace hard-coded a shape."""
        images = self._input(0, 2)
        with torch.inference_mode():
            try:
                agrees = alike(front.tail(mixed, *self._head(front, images))[0], network(images.clone()))
            except Exception:  # a user's forward can raise anything
                agrees = False
            if not agrees and self._cuts:
                event("uncut", reason=self._cuts.misfit(network, images))
        return agrees

    def _correct(self, network: nn.Module, cheap: nn.Module | None, front: _Front, images: range, patience: float) -> Tensor:
        """Compute `correct` behind a cut, without waiting for the device in the loop.

        cheap: the network in bf16, for screening; None for no screening.
        """

        def batches() -> Iterator[tuple[int, slice]]:
            began = clock()
            for at in range(images.start // self.batch * self.batch, images.stop, self.batch):
                checkpoint()
                yield at, slice(max(images.start - at, 0), images.stop - at)
                if clock() - began > patience:
                    return

        def again(rows: Tensor) -> Values:
            places = rows + images.start  # sorted, so that those of a batch are adjacent
            batches, counts = (places // self.batch).unique_consecutive(return_counts=True)
            within = (places % self.batch).to(self.labels.device).split(counts.tolist())
            found = [
                self._values(front, batch * self.batch, part) for batch, part in zip(batches.tolist(), within, strict=True)
            ]
            return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

        def exact(values: Values) -> Tensor:
            return front.tail(network, *values)[0]

        with torch.inference_mode():
            best = None
            if cheap is not None:
                pairs = ((self._values(front, at, part, low=True), self._values(front, at, part)) for at, part in batches())
                try:
                    best = front.screen.predictions(
                        pairs, lambda values: front.tail(cheap, *values)[0], exact, again, self.batch
                    )
                except _MISFITS as error:
                    if is_out_of_memory(error):
                        raise
                    self._cheap = None  # its code requires another dtype behind this cut
            if best is None:
                best = torch.cat([exact(self._values(front, at, part)).argmax(1) for at, part in batches()])
            return (best == self.labels[images.start : images.start + len(best)]).cpu()

    def _values(self, front: _Front, at: int, part: slice | Tensor, low: bool = False) -> Values:
        """Return the dense network's values at the cut for some images of a batch; cache the batch's if there is room.

        low: in bf16, for values of the network's own dtype.
        """
        if (at, low) not in front.kept:
            values = self._values(front, at, slice(None)) if low else self._computed(front, at)
            if low:
                values = tuple(value.to(torch.bfloat16) if value.dtype == self._dtype else value for value in values)
            size = sum(value.nbytes for value in values)
            if self._bytes + size > self.memory:
                return tuple(value[part] for value in values)
            front.kept[at, low] = values
            self._bytes += size
        return tuple(value[part] for value in front.kept[at, low])

    def _computed(self, front: _Front, at: int) -> Values:
        """Compute one batch's values, from those of the previous cut if they are cached; these are then released."""
        near = self._older.kept.pop((at, False), ()) if self._older is not front else ()
        self._bytes -= sum(value.nbytes for value in near)
        step = self._cuts.head(self._older.names, front.names) if near and self._cuts and front.names else None
        return step(self.model, *near) if step else self._head(front, self._input(at, at + self.batch))

    def _head(self, front: _Front, images: Tensor) -> Values:
        head = self._cuts.head(self._cuts.input, front.names) if self._cuts and front.names else None
        return head(self.model, images) if head else (images,)

    def _input(self, start: int, stop: int) -> Tensor:
        """Return some images as network inputs: (B, C, H, W), channels last."""
        images = normalise(self.data.images[self.order[start:stop]], self.card.mean, self.card.std)
        return inputs_for(self.model, images).contiguous(memory_format=torch.channels_last)

    @property
    def _dtype(self) -> torch.dtype:
        return kind_of(self.model)

    def _probe(self, network: nn.Module) -> int:
        """Return the batch size at which this network is fastest here, while a cancellation still takes effect quickly."""
        most = min(len(self), _LARGEST if self.labels.device == CPU else _LARGEST_ON_GPU)
        size = min(64, most)
        if self.labels.device != CPU:  # the first pass on a GPU loads libraries, which may take a second
            self._seconds(network, 1)
        began = clock()
        while math.isinf(seconds := self._seconds(network, size)):
            size //= 2
            most = max(1, size // 2)  # a batch that barely fits leaves no room for anything else
        while seconds > _PATIENCE and size > 1:
            size //= 2
            seconds /= 2
        best = seconds / size, size
        while 2 * size <= most and 2 * seconds <= _PATIENCE and clock() - began < _PROBE_SECONDS:
            size *= 2
            seconds = self._seconds(network, size)
            best = min(best, (seconds / size, size))
        return min(best[1], most)

    def _screening_twin(self) -> nn.Module | None:
        """Return the dense network in bf16 if screening with bf16 saves time, else None."""
        if not has_bf16(self.labels.device) or self._dtype != torch.float32:
            return None
        cheap = low(self.model)
        try:
            pays = self._seconds(cheap, self.batch) < _PAYS * self._seconds(self.model, self.batch)
        except _MISFITS as error:  # its code creates or requires float32
            if is_out_of_memory(error):
                raise
            return None
        return cheap if pays else None

    def _seconds(self, network: nn.Module, count: int) -> float:
        """Return this network's time for `count` images: the faster of two runs, after a warm-up run.

        Infinite if memory does not suffice for `count` images; if it does not suffice for one, the error is raised.
        """
        run = (self._cuts.tail(self._cuts.input) if self._cuts else None) or self._plain.tail
        times = []
        try:
            images = inputs_for(network, self._input(0, count))
            with torch.inference_mode():
                for _ in range(3):
                    checkpoint()
                    began = clock()
                    run(network, images)[0].argmax(1).cpu()
                    times.append(clock() - began)
        except (MemoryError, RuntimeError) as error:
            if count == 1 or not is_out_of_memory(error):
                raise
            return math.inf
        return min(times[1:])


def _bytes(kept: Mapping[tuple[int, bool], Values]) -> int:
    return sum(value.nbytes for values in kept.values() for value in values)
