"""Sessions: the dense network, groups, images and cached results that all points of a study share."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intrafusion._registry import CRITERIA, RECOVERIES
from intrafusion.data.datasets import ImageData, load_calibration, load_data, train_beside
from intrafusion.errors import IntrafusionError
from intrafusion.evaluation.accuracy import Evaluation, Size, evaluate, layer_sizes, logits, size
from intrafusion.evaluation.incremental import MEMORY, Meter
from intrafusion.models.card import ModelCard
from intrafusion.models.fingerprint import of_images, of_model, of_text
from intrafusion.models.fx.sharing import copied, on_cpu
from intrafusion.models.hub import load_model
from intrafusion.options import RecoveryOptions
from intrafusion.pruning.groups.feature_maps import private
from intrafusion.pruning.groups.find import find_groups
from intrafusion.pruning.groups.group import Group
from intrafusion.pruning.groups.norms import fold_groups
from intrafusion.pruning.importance import score
from intrafusion.pruning.merge import ChannelMap, calibrate
from intrafusion.pruning.pruner import Pruned, cut
from intrafusion.pruning.transport.cost import Geometry, compare_channels
from intrafusion.pruning.transport.planning import TransportPlan, solve
from intrafusion.runtime.cache import Cache
from intrafusion.runtime.cancellation import clock
from intrafusion.runtime.code_digest import code_version, recovery_version
from intrafusion.runtime.devices import CPU, device_of
from intrafusion.runtime.paths import home
from intrafusion.spec import CUT_FIELDS, MERGE_FIELDS, NETWORK_FIELDS, PLAN_FIELDS, TRANSPORT_FIELDS, PruneSpec
from intrafusion.studies.relevant_fields import calibrates, own_code, relevant, trains
from intrafusion.training.loop import TrainingProgress
from intrafusion.training.recovery import TrainingCost, recovering

_MEMORY = 1 << 28  # bytes that a session caches of each kind of result


@dataclass(frozen=True)
class Scores:
    """Importance scores of a group's channels.

    values: float64 (n,); channels with larger scores are kept. seconds: computation time.
    """

    values: torch.Tensor
    seconds: float


@dataclass(eq=False)
class Session:
    """A dense model with its groups, its size and the evaluation images.

    The scores, distances and plans of each group in the dense network are computed once and cached.
    """

    model: nn.Module
    groups: list[Group]
    size: Size
    data: ImageData | None = None
    _known: Cache = field(default_factory=Cache)
    _seen: Cache = field(default_factory=lambda: Cache(8, memory=_MEMORY))  # calibration images
    _geometries: Cache = field(default_factory=lambda: Cache(8, memory=_MEMORY))  # about 30 MB each for wide layers
    _plans: Cache = field(default_factory=lambda: Cache(32, memory=_MEMORY))  # about 30 MB each for wide layers
    _merged: Cache = field(default_factory=lambda: Cache(4, memory=_MEMORY))  # whole networks
    _data_known: Cache = field(default_factory=Cache)

    @property
    def card(self) -> ModelCard:
        return self.model.card  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def example(self) -> torch.Tensor:
        """An all-zero input on the model's device: float (1, C, H, W)."""
        return self._known.get("example", lambda: self.card.example().to(self.device))

    @property
    def layers(self) -> dict[str, Size]:
        """The size of each layer that has multiply-accumulates, by name."""
        return self._known.get("layers", lambda: layer_sizes(self.model, self.example))

    def images(self) -> ImageData:
        """Return the labelled evaluation images. Raises IntrafusionError if none were loaded or none have labels."""
        if self.data is None:
            raise IntrafusionError(f"no {self.card.dataset} images are loaded; pass a data path, or download them")
        return self.data.labelled()

    def on(self, data: ImageData) -> "Session":
        """Return a copy of this session with other evaluation images; it shares the cached results for the groups."""
        return replace(self, data=data, _data_known=Cache())

    @property
    def folded(self) -> nn.Module:
        """The dense model with BatchNorm folded, from which all pruned networks are made. It must not be modified."""
        if self.device == CPU:
            return self.folded_weights
        return self._known.get("folded", lambda: copied(self.folded_weights).to(self.device))

    @property
    def weights(self) -> nn.Module:
        """The dense model on the CPU, where everything that needs weights alone is computed. It must not be modified."""
        return self._known.get("weights", lambda: on_cpu(self.model))

    @property
    def folded_weights(self) -> nn.Module:
        """The dense model on the CPU with BatchNorm folded. It must not be modified."""

        def fold() -> nn.Module:
            twin = private(self.weights)
            fold_groups(twin, self.groups)
            return twin

        return self._known.get("folded weights", fold)

    def fingerprints(self, spec: PruneSpec) -> tuple[str, str]:
        """Return the SHA-256 (hex) of the model and that of the images used to measure this spec."""
        learned = self.learned_from(spec)
        return self._known.get("fingerprint", lambda: of_model(self.model)), self._data_known.get(
            ("fingerprint", spec.limit, spec.seed, learned),
            lambda: of_images(self.images().subset(spec.limit, spec.seed), *(self.calibration(one) for one in learned)),
        )

    def kept_path(self, spec: PruneSpec) -> Path:
        """Return the file of the spec's recovered network; its name is a hash of all inputs, including the kind of device."""
        return self._recovered(spec, code_version(), ".pt")

    def stopped_path(self, spec: PruneSpec) -> Path:
        """Return the file with the state of a stopped recovery, which can be resumed while the training code is unchanged."""
        return self._recovered(spec, recovery_version(), ".run")

    def _recovered(self, spec: PruneSpec, version: str, suffix: str) -> Path:
        plain = relevant(spec).but(limit=None, precision="", weights=None, data_path=None)
        seen = self._known.get(
            ("seen", *self.learned_from(spec)), lambda: of_images(*map(self.calibration, self.learned_from(spec)))
        )
        what = plain.key(), *own_code(plain)
        name = of_text(*what, self.fingerprints(spec)[0], seen, self.device.type, version)
        return home() / "recovered" / f"{name}{suffix}"

    @staticmethod
    def learned_from(spec: PruneSpec) -> tuple[PruneSpec, ...]:
        """Return specs whose calibration images are those that pruning, merging and recovery use for `spec`."""
        plain = PruneSpec(dataset=spec.dataset, data_path=spec.data_path, calibration=spec.calibration, seed=spec.seed)
        learned = (plain.but(calibration=spec.training),) if trains(spec) else ()
        return ((plain,) if calibrates(relevant(spec)) else ()) + learned

    def meter(self, spec: PruneSpec, memory: int = MEMORY) -> Meter:
        """Return a meter that evaluates networks pruned from this one on the spec's evaluation images.

        memory: bytes of activations that it caches. Release the meter when done with it.
        """
        data = self.images().subset(spec.limit, spec.seed)
        key = ("batch", spec.limit, spec.precision)
        made = Meter(self.folded, data, spec.precision, spec.seed, memory, self._data_known.peek(key))
        self._data_known.get(key, lambda: made.batch)
        return made

    def dense(self, limit: int | None, seed: int = 0) -> Evaluation:
        """Return the dense model's accuracy, measured once for each choice of images."""
        return self._data_known.get((limit, seed), lambda: evaluate(self.model, self.images(), limit, seed))

    def calibration(self, spec: PruneSpec) -> ImageData:
        """Return the images for the spec's criterion and cost. Raises IntrafusionError if there are none."""
        size = self.card.input_size
        return self._seen.get(
            sight(spec),
            lambda: load_calibration(spec.dataset, spec.data_path, self.device, spec.calibration, spec.seed, input_size=size),
        )

    def training(self, spec: PruneSpec) -> ImageData:
        """Return the labelled images for training in the spec's recovery. Raises IntrafusionError if there are none."""
        data = self.calibration(spec.but(calibration=spec.training))
        if data.split != "train":
            where = Path(spec.data_path or f"{spec.dataset}_test.npz")
            beside = train_beside(where).name if where.suffix else f"{spec.dataset}_train.npz or a folder train to {where}"
            raise IntrafusionError(
                f"recovery {spec.recovery} needs training images, but only the {data.split} split was found; add {beside}"
                f"{' next to it' if where.suffix else ''}"
            )
        return data.labelled()

    def scores(self, spec: PruneSpec, group: Group) -> Scores:
        """Return the importance of a group's channels in the dense network."""

        def compute() -> Scores:
            data = self.calibration(spec) if sees else None
            start = clock()
            values = score(self.model if sees else self.weights, group, spec.criterion, data, spec.seed, spec.calibration)
            return Scores(values, clock() - start)

        sees = CRITERIA[spec.criterion].needs != "nothing"
        return self._known.get((group.name, spec.criterion, sight(spec) if sees else spec.seed), compute)

    def geometry(self, spec: PruneSpec, group: Group) -> Geometry:
        """Return the distances between a group's channels in the dense network.

        They are the same for every sparsity, criterion and solver.
        """
        sees = spec.cost == "activations"
        return self._geometries.get(
            (group.name, spec.cost, spec.distance, spec.p, spec.bias, sight(spec) if sees else None),
            lambda: compare_channels(
                self.model if sees else self.weights,
                group,
                data=self.calibration(spec) if sees else None,
                calibration=spec.calibration,
                seed=spec.seed,
                device=self.device,
                **spec.only(("cost", "distance", "p", "bias")),
            ),
        )

    def plan(self, spec: PruneSpec, group: Group) -> TransportPlan:
        """Return the transport plan of one group in the dense network."""
        share = spec.sparsity_of(group.name)
        key = (group.name, share, sight(spec), spec.part("criterion", "round_to", *TRANSPORT_FIELDS))
        return self._plans.get(
            key,
            lambda: solve(
                self.geometry(spec, group),
                self.scores(spec, group).values,
                share,
                **spec.only(("round_to", "seed", *TRANSPORT_FIELDS)),
            ),
        )

    def output_distance(self, spec: PruneSpec, group: Group) -> torch.Tensor:
        """Return how far pruning this group alone moves the logits of each calibration image: L2 distances (N,)."""

        def compute() -> torch.Tensor:
            small = pruned(spec.but(groups=(group.name,)), self)
            return (logits(small, data) - dense).norm(dim=1).cpu()

        data = self.calibration(spec)
        dense = self._known.get(("logits", sight(spec)), lambda: logits(self.model, data))
        return self._known.get(("distance", group.name, spec.part(*NETWORK_FIELDS)), compute)


def sight(spec: PruneSpec) -> tuple:
    """Return a key that identifies the spec's calibration images."""
    return "images", spec.dataset, spec.data_path, spec.calibration, spec.seed


def open_session(
    what: PruneSpec | str, device: str = "auto", weights: str | Path | None = None, images: bool = True, **options: Any
) -> Session:
    """Load a network, find its groups and, for a spec, load its evaluation images.

    what: a spec, or the name of a model (see `load_model`). device: by name; "auto" is the first accelerator that works, or
    else the CPU. A session opened by name has no images; add some with
    `Session.on`. weights: the weights of a named model; ignored for a spec, which names its own. images: pass False to skip
    loading a spec's images. options: passed to `load_data`. Raises IntrafusionError if the network or the images cannot be
    loaded.

    Examples
    --------
    >>> import intrafusion as itf
    >>> session = itf.open_session(itf.PruneSpec(model="digits-mlp", dataset="digits"))
    >>> [group.name for group in session.groups if not group.reason]
    ['1', '3']
    """
    name, weights = (what, weights) if isinstance(what, str) else (what.model, what.weights)
    model = load_model(name, weights, device)
    example = model.card.example()  # type: ignore[union-attr,operator]
    session = Session(model, find_groups(model, example), size(model, example))
    if isinstance(what, PruneSpec) and images:
        side = session.card.input_size
        session.data = load_data(what.dataset, path=what.data_path, device=device_of(model), input_size=side, **options)
    return session


def pruned(spec: PruneSpec, session: Session) -> nn.Module:
    """Return the network of `spec`, pruned, merged and recovered.

    Without recovery it shares unchanged layers with the session's network.
    """
    made = merged(spec, session)
    for _ in recovery(spec, session, made):
        pass
    return made.small


def merged(spec: PruneSpec, session: Session) -> Pruned:
    """Return the network of `spec` before recovery; all recoveries start from copies of the same merged network."""
    if spec.recovery == "none":
        return _cut(spec, session, share=True)
    made: Pruned = session._merged.get(spec.part(*CUT_FIELDS), lambda: _cut(spec, session, share=False))
    return replace(made, small=copy.deepcopy(made.small))


def _cut(spec: PruneSpec, session: Session, share: bool) -> Pruned:
    return cut(
        session.folded,
        session.groups,
        spec.sparsity if spec.sparsities is None else dict(zip(spec.groups, spec.sparsities, strict=True)),
        spec.criterion,
        spec.merge,
        spec.groups,
        session.calibration(spec) if calibrates(relevant(spec)) else None,
        first=lambda group: session.plan(spec, group),
        share=share,
        weights=session.folded_weights,
        **spec.only((*PLAN_FIELDS, *MERGE_FIELDS)),
    )


def channel_maps(spec: PruneSpec, session: Session) -> list[ChannelMap]:
    """Return the maps from kept channels to all channels for each consumer of the spec's groups.

    They are fitted as in the calibrated merge.
    """
    fit = merged(spec.but(merge="drop"), session).fit(session.calibration(spec))
    calibrate(fit)
    return fit.maps


def recovery(spec: PruneSpec, session: Session, made: Pruned) -> Iterator[TrainingCost | TrainingProgress]:
    """Recover a merged network in place with the spec's method; yields the cost of training and its progress.

    The trained network is saved to a file and is not trained again.
    """
    needs = RECOVERIES[spec.recovery].needs
    data = session.training(spec) if needs == "labels" else session.calibration(spec) if needs == "images" else None
    keep, stopped = (session.kept_path(spec), session.stopped_path(spec)) if needs == "labels" else (None, None)
    return recovering(made, spec.recovery, data, RecoveryOptions.of(spec), keep, stopped)
