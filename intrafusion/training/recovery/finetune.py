"""Recovery by training: norms put back, the learning rate found, one loop, and the compact network again.

Every method starts from the same network, sees the same images in the same order, and is given a learning rate of its
own by the same short test.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.data.datasets import ImageData, normalise
from intrafusion.errors import IntrafusionError
from intrafusion.evaluation.accuracy import size
from intrafusion.models.card import ModelCard, card_of
from intrafusion.models.fx.sharing import plain
from intrafusion.pruning.groups.feature_maps import normalised, private
from intrafusion.pruning.groups.norms import norm_of
from intrafusion.pruning.merge import reset_norms
from intrafusion.runtime.cancellation import clock
from intrafusion.training.augment import augment_for
from intrafusion.training.checkpoint import stopped_rate
from intrafusion.training.loop import Diverged, Loss, Moment, Recipe, judged, train
from intrafusion.training.lr_search import RATES, best_rate
from intrafusion.training.recovery.batchnorm import absorb_norms, insert_norms
from intrafusion.training.recovery.distillation import distillation_loss, similarity_loss, stages, watching
from intrafusion.training.recovery.settings import Case, Facts

_HELD_SHARE, _HELD_MOST = 0.1, 1000  # of the training images, those that nothing is learned from
_PROBE = 8, 30  # steps of a learning rate's test: an eighth of the run's, within these bounds
_LOOKS = 25  # moments of a run
_MEASURED = 512  # images on which norms are measured
_SAME = 1e-2  # of the largest logit: what rounding may change where layers are replaced by what computes the same


@dataclass(frozen=True)
class TrainedRecovery:
    """How a recovery trains; without any of these it is plain fine-tuning.

    widen: makes of the compact network the one that is trained; narrow: makes the compact one again. choose: what learns.
    distil, similar: weights of the losses that compare with the dense network.
    """

    widen: Callable[[nn.Module], nn.Module] = lambda network: network
    narrow: Callable[[nn.Module], nn.Module] = lambda network: network
    choose: Callable[[nn.Module], list[nn.Parameter]] = lambda network: list(network.parameters())
    distil: float = 0.0
    similar: float = 0.0

    @property
    def compares(self) -> bool:
        """Whether the dense network runs beside the one that is trained."""
        return bool(self.distil or self.similar)


_PLAIN = TrainedRecovery()


def retrain(case: Case, method: TrainedRecovery = _PLAIN) -> Iterator[Facts | Moment]:
    """Train the case's small network, in place: what it costs, then how it goes.

    Training is in float32; the numbers of a network in another precision are rounded to that one afterwards.

    A run that diverges at the rate that the test found begins again at a smaller one: with its new costs, then how it goes.

    Raises IntrafusionError where images have no labels or are too few, where no learning rate gives a loss that is a number,
    and where nothing can take the places of the network's layers for as long as it is trained.
    """
    lesson = _Lesson(case, method)
    began = clock()
    rate = case.how.rate or stopped_rate(case.keep) or lesson.rate()
    tuning = clock() - began
    while True:
        network, learning = lesson.pupil()
        yield Facts(sum(p.numel() for p in learning), lesson.memory(), lesson.macs(network), rate, tuning)
        try:
            yield from lesson.teach(network, learning, replace(lesson.recipe, lr=rate), _LOOKS, case)
            break
        except Diverged:  # what a short test bears, a long run may not: once more, a rung lower
            if case.how.rate is not None or rate <= RATES[0]:
                raise
            rate /= 10**0.5
    answers = _answers(network, lesson.few)
    compact = method.narrow(network)
    absorb_norms(compact)
    _check(_answers(compact, lesson.few), answers)
    case.pruned.small.load_state_dict(compact.state_dict())


class _Lesson:
    """What all runs of one recovery share: the network they start from, the images, the teacher."""

    def __init__(self, case: Case, method: TrainedRecovery):
        how, self.method = case.how, method
        self.card: ModelCard = card_of(case.pruned.original)
        self.learned, self.held = hold_out(case.images(), how.seed)
        self.teacher = private(case.pruned.dense()).float()
        self.start = _start(case, self.learned, self.teacher, self.card)
        self.example = self.card.example().to(case.images().labels.device)
        self.few = normalise(self.held.images[:2], self.card.mean, self.card.std)
        _check(_answers(self.pupil()[0], self.few), _answers(self.start, self.few))
        self.layers = stages(self.teacher, self.example) if method.similar else []
        plain, ours = self.macs(self.start, False), self.macs(self.pupil()[0])
        epochs = how.epochs * plain / ours if how.budget == "compute" else how.epochs
        self.recipe = Recipe(
            epochs,
            augment_for(case.images().name),
            weight_decay=1e-4,
            seed=how.seed,
            patience=how.patience,
        )

    def pupil(self) -> tuple[nn.Module, list[nn.Parameter]]:
        """A network to train, and what learns in it."""
        network = self.method.widen(copy.deepcopy(self.start))
        return network, self.method.choose(network)

    def teach(
        self, network: nn.Module, learning: list[nn.Parameter], recipe: Recipe, looks: int, case: Case | None = None
    ) -> Iterator[Moment]:
        """Train a pupil; of a case, in a way that can be stopped and gone on with."""
        with self._loss(network) as loss:
            yield from train(
                network,
                self.learned,
                recipe,
                self.card.mean,
                self.card.std,
                parameters=learning,
                loss=loss,
                held=self.held if case else None,
                looks=looks,
                keep=case.keep if case else None,
            )

    @contextmanager
    def _loss(self, network: nn.Module) -> Iterator[Loss]:
        method, teacher, layers = self.method, self.teacher, self.layers

        def loss(logits: Tensor, labels: Tensor, inputs: Tensor) -> Tensor:
            total = F.cross_entropy(logits, labels)
            if not method.compares:
                return total
            with torch.no_grad():
                answers = teacher(inputs)
            if method.distil:
                total = (1 - method.distil) * total + method.distil * distillation_loss(logits, answers)
            alike = [similarity_loss(ours[name], theirs[name]) for name in layers]
            return total + method.similar * torch.stack(alike).mean() if alike else total

        with watching(network, layers) as ours, watching(teacher, layers) as theirs:
            yield loss

    def rate(self) -> float:
        """The peak learning rate after which a short run is best. Raises IntrafusionError when no rate learns."""
        rate = best_rate(self._probe)
        if rate is None:
            raise IntrafusionError("the loss of this network is no number: choose another merge, or fewer channels to go")
        return rate

    def _probe(self, rate: float) -> float:
        """The held-out loss after a short run."""
        steps = min(max(self.recipe.steps(len(self.learned)) // 8, _PROBE[0]), _PROBE[1])
        epochs = steps / math.ceil(len(self.learned) / self.recipe.batch)
        network, learning = self.pupil()
        try:
            for _ in self.teach(network, learning, replace(self.recipe, epochs=epochs, lr=rate), looks=1):
                pass
        except IntrafusionError:  # it went too far
            return math.inf
        loss, _ = judged(network, self.held, self.card.mean, self.card.std)
        return loss if math.isfinite(loss) else math.inf

    def macs(self, network: nn.Module, compares: bool = True) -> int:
        """Multiply-accumulates of training on one image: forward once, backward twice that, and the teacher.

        Weights that are computed from others, as low-rank changes are, are so once a step, not once an image: left out.
        """
        teacher = size(self.teacher, self.example).macs if compares and self.method.compares else 0
        return 3 * size(plain(network), self.example).macs + teacher

    def memory(self) -> int:
        """Bytes that training holds while it learns from one batch."""
        network, learning = self.pupil()
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> None:  # to give the tensor back would tie it to its own graph for ever
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()

        rows = slice(0, self.recipe.batch)
        inputs = normalise(self.learned.images[rows], self.card.mean, self.card.std)
        network.train().requires_grad_(False)
        for parameter in learning:
            parameter.requires_grad_(True)
        with self._loss(network) as loss, torch.enable_grad():
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
                total = loss(network(inputs), self.learned.labels[rows], inputs)
            del total
        weights = {p.untyped_storage().data_ptr(): p.nbytes for p in network.parameters()}
        taught = sum(p.nbytes for p in self.teacher.parameters()) if self.method.compares else 0
        passing = sum(size for place, size in held.items() if place not in weights)
        return passing + sum(weights.values()) + 2 * sum(p.nbytes for p in learning) + taught


def hold_out(data: ImageData, seed: int = 0) -> tuple[ImageData, ImageData]:
    """The images to learn from, and others to judge by: a tenth, at most 1,000, drawn by `seed`.

    Images without labels are left out. Raises IntrafusionError where fewer than 20 have one.
    """
    if (known := int((data.labels >= 0).sum())) < 20:
        raise IntrafusionError(
            f"training needs at least 20 images, all of them labelled, not {known}: give others, or choose repair"
        )
    data = data.labelled()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.labels.device)
    count = max(1, min(int(_HELD_SHARE * len(data)), _HELD_MOST))
    held, learned = order[:count].sort().values, order[count:].sort().values
    return tuple(replace(data, images=data.images[rows], labels=data.labels[rows]) for rows in (learned, held))  # type: ignore[return-value]


def _start(case: Case, data: ImageData, teacher: nn.Module, card: ModelCard) -> nn.Module:
    """The network that all methods start from, with a BatchNorm wherever the dense one had one.

    It is the pruned network as it is, or with its norms' statistics measured again, whichever answers better.
    """
    seen = data.subset(_MEASURED, case.how.seed)
    starts = [private(case.pruned.small).float()]
    try:
        reset = replace(case.pruned, small=private(case.pruned.small))
        reset_norms(reset.fit(seen))
        starts.append(reset.small.float())
    except IntrafusionError:  # no norms, or none that can be reached
        pass
    start = min(starts, key=lambda network: _number(judged(network, seen, card.mean, card.std)[0]))
    normed, batches = copy.deepcopy(start), [images for images, _ in normalised(teacher, seen)]
    insert_norms(normed, [name for name, layer in teacher.named_modules() if norm_of(layer) is not None], batches)
    _check(_answers(normed, batches[0][:2]), _answers(start, batches[0][:2]))
    return normed


def _answers(network: nn.Module, images: Tensor) -> Tensor | None:
    """Logits, (B, classes); None where the network fails."""
    with torch.inference_mode():
        try:
            return network.eval()(images)
        except Exception:  # a user's forward can fail in any way
            return None


def _check(logits: Tensor | None, expected: Tensor | None) -> None:
    """Raise IntrafusionError where the logits are not those expected, as far as these are numbers."""
    if expected is None or not expected.isfinite().all():
        return
    if logits is None or not (logits - expected).abs().max() <= _SAME * expected.abs().max():
        raise IntrafusionError(
            "this network reads its layers in a way that keeps others from taking their places while it is trained: "
            "choose repair"
        )


def _number(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
