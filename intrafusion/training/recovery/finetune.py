"""Recovery by training: reinsert norms, find the learning rate, train in one loop, and return to the compact network.

Every method starts from the same network, sees the same images in the same order, and gets its own learning rate from the same
short test.
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
from intrafusion.models.fx.sharing import with_plain_weights
from intrafusion.pruning.groups.feature_maps import normalised, private
from intrafusion.pruning.groups.norms import norm_of
from intrafusion.pruning.merge import reset_norms
from intrafusion.runtime.cancellation import clock
from intrafusion.training.augment import augment_for
from intrafusion.training.checkpoint import stopped_rate
from intrafusion.training.loop import Diverged, Loss, Recipe, TrainingProgress, judged, train
from intrafusion.training.lr_search import RATES, best_rate
from intrafusion.training.recovery.batchnorm import absorb_norms, insert_norms
from intrafusion.training.recovery.distillation import distillation_loss, similarity_loss, stages, watching
from intrafusion.training.recovery.settings import Case, TrainingCost

_HELD_SHARE, _HELD_MOST = 0.1, 1000  # of the training images: share and maximum number held out
_PROBE = 8, 30  # bounds on the steps of a learning rate test, an eighth of the run's
_LOOKS = 25  # moments of a run
_MEASURED = 512  # images on which norms are measured
_SAME = 1e-2  # of the largest logit: tolerance for rounding where layers are replaced by equivalent ones


@dataclass(frozen=True)
class TrainedRecovery:
    """Settings of a recovery that trains; the defaults give plain fine-tuning.

    widen: turns the compact network into the one to train. narrow: turns it back into the compact one. choose: returns the
    parameters to train. distil, similar: weights of the losses that compare with the dense network.
    """

    widen: Callable[[nn.Module], nn.Module] = lambda network: network
    narrow: Callable[[nn.Module], nn.Module] = lambda network: network
    choose: Callable[[nn.Module], list[nn.Parameter]] = lambda network: list(network.parameters())
    distil: float = 0.0
    similar: float = 0.0

    @property
    def compares(self) -> bool:
        """Whether the dense network runs beside the trained one."""
        return bool(self.distil or self.similar)


_PLAIN = TrainedRecovery()


def retrain(case: Case, method: TrainedRecovery = _PLAIN) -> Iterator[TrainingCost | TrainingProgress]:
    """Train the case's small network in place, and yield its cost, then its progress.

    Training is in float32; the values of a network in another precision are rounded to it afterwards.

    If a run diverges at the rate that the test found, it starts again at a smaller rate, with new costs and progress.

    Raises IntrafusionError if there are too few labelled images, if no learning rate gives a finite loss, and if the network's
    layers cannot be replaced while it is trained.
    """
    lesson = _Lesson(case, method)
    began = clock()
    rate = case.how.rate or stopped_rate(case.keep) or lesson.rate()
    tuning = clock() - began
    while True:
        network, learning = lesson.pupil()
        yield TrainingCost(sum(p.numel() for p in learning), lesson.memory(), lesson.macs(network), rate, tuning, lesson.where)
        try:
            yield from lesson.teach(network, learning, replace(lesson.recipe, lr=rate), _LOOKS, case)
            break
        except Diverged:  # a rate that suits a short test may be too high for a long run: retry with a lower rate
            if case.how.rate is not None or rate <= RATES[0]:
                raise
            rate /= 10**0.5
    answers = _answers(network, lesson.few)
    compact = method.narrow(network)
    absorb_norms(compact)
    _check(_answers(compact, lesson.few), answers)
    case.pruned.small.load_state_dict(compact.state_dict())


class _Lesson:
    """What all training runs of one recovery share: the initial network, the images and the teacher."""

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
        self.where = self.recipe.where(self.example.device)

    def pupil(self) -> tuple[nn.Module, list[nn.Parameter]]:
        """Return a new network to train, and the parameters to train."""
        network = self.method.widen(copy.deepcopy(self.start))
        return network, self.method.choose(network)

    def teach(
        self, network: nn.Module, learning: list[nn.Parameter], recipe: Recipe, looks: int, case: Case | None = None
    ) -> Iterator[TrainingProgress]:
        """Train a pupil; with a case, training evaluates held-out images and can be stopped and resumed."""
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
        """Find the peak learning rate with the best short run. Raises IntrafusionError if no rate gives a finite loss."""
        rate = best_rate(self._probe)
        if rate is None:
            raise IntrafusionError(
                "the loss is NaN or infinite at every learning rate; choose another merge or a lower sparsity"
            )
        return rate

    def _probe(self, rate: float) -> float:
        """Return the held-out loss after a short run; inf if the run fails."""
        steps = min(max(self.recipe.steps(len(self.learned)) // 8, _PROBE[0]), _PROBE[1])
        epochs = steps / math.ceil(len(self.learned) / self.recipe.batch)
        network, learning = self.pupil()
        try:
            for _ in self.teach(network, learning, replace(self.recipe, epochs=epochs, lr=rate), looks=1):
                pass
        except IntrafusionError:  # it diverged
            return math.inf
        loss, _ = judged(network, self.held, self.card.mean, self.card.std)
        return loss if math.isfinite(loss) else math.inf

    def macs(self, network: nn.Module, compares: bool = True) -> int:
        """Return the multiply-accumulates of training on one image: forward once, backward twice that, and the teacher.

        Computing weights from other parameters, as for low-rank changes, is not counted: it happens once a step, not per image.
        """
        teacher = size(self.teacher, self.example).macs if compares and self.method.compares else 0
        return 3 * size(with_plain_weights(network), self.example).macs + teacher

    def memory(self) -> int:
        """Return the bytes that training holds while it processes one batch."""
        network, learning = self.pupil()
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> None:  # returning the tensor would create a reference cycle with its graph
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
    """Split images into those to train on and held-out ones: a tenth, at most 1,000, drawn by `seed`.

    Images without labels are left out. Raises IntrafusionError if fewer than 20 images have labels.
    """
    if (known := int((data.labels >= 0).sum())) < 20:
        raise IntrafusionError(f"training needs at least 20 labelled images, not {known}; pass more, or choose recovery repair")
    data = data.labelled()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.labels.device)
    count = max(1, min(int(_HELD_SHARE * len(data)), _HELD_MOST))
    held, learned = order[:count].sort().values, order[count:].sort().values
    return tuple(replace(data, images=data.images[rows], labels=data.labels[rows]) for rows in (learned, held))  # type: ignore[return-value]


def _start(case: Case, data: ImageData, teacher: nn.Module, card: ModelCard) -> nn.Module:
    """Return the network that all methods start from, with a BatchNorm wherever the dense network had one.

    It is the pruned network, unchanged or with its norms' statistics measured again, whichever has the smaller loss.
    """
    seen = data.subset(_MEASURED, case.how.seed)
    starts = [private(case.pruned.small).float()]
    try:
        reset = replace(case.pruned, small=private(case.pruned.small))
        reset_norms(reset.fit(seen))
        starts.append(reset.small.float())
    except IntrafusionError:  # no norms, or norms that cannot be measured
        pass
    start = min(starts, key=lambda network: _number(judged(network, seen, card.mean, card.std)[0]))
    normed, batches = copy.deepcopy(start), [images for images, _ in normalised(teacher, seen)]
    insert_norms(normed, [name for name, layer in teacher.named_modules() if norm_of(layer) is not None], batches)
    _check(_answers(normed, batches[0][:2]), _answers(start, batches[0][:2]))
    return normed


def _answers(network: nn.Module, images: Tensor) -> Tensor | None:
    """Return the logits (B, classes); None if the network fails."""
    with torch.inference_mode():
        try:
            return network.eval()(images)
        except Exception:  # a user's forward can fail in any way
            return None


def _check(logits: Tensor | None, expected: Tensor | None) -> None:
    """Raise IntrafusionError if the logits differ from the expected ones, provided that these are finite."""
    if expected is None or not expected.isfinite().all():
        return
    if logits is None or not (logits - expected).abs().max() <= _SAME * expected.abs().max():
        raise IntrafusionError("the layers of this network cannot be replaced for training; choose recovery repair")


def _number(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
