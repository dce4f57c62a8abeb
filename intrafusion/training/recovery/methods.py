"""The recoveries: one function each, which changes a pruned network in place and may yield its cost and progress."""

from collections.abc import Callable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from intrafusion._registry import RECOVERIES
from intrafusion.errors import IntrafusionError
from intrafusion.models.card import card_of
from intrafusion.pruning.merge import repair, reset_norms
from intrafusion.pruning.merge.matrix_product import inputs_of
from intrafusion.training.loop import TrainingProgress
from intrafusion.training.recovery.finetune import TrainedRecovery, retrain
from intrafusion.training.recovery.lora import add_low_rank, merge_low_rank
from intrafusion.training.recovery.overparam import contract, expand
from intrafusion.training.recovery.settings import Case, TrainingCost

Telling = Iterator[TrainingCost | TrainingProgress]
Choose = Callable[[nn.Module], list[nn.Parameter]]  # returns the parameters to train
_PERP = "Zimmer et al., arXiv 2312.15230"
_OVER = "Qian et al., arXiv 2204.11444"
COSTLIER = ("distill", "similarity", "overparam", "overparam-sp")  # than plain fine-tuning, per step on one image
_TRAINING = ("training", "epochs", "budget", "rate", "patience")  # knobs of all methods that train
_SGD = "with SGD, at a rate found by a test (authors' public code, for language models: AdamW)"
_RANKS = "with rank 8 and no scaling (authors' code: rank 16, scaled by 2)"
_WIDE = "every layer is widened, including the first and the last, with weight decay on each factor and no norm between them"
_DISTIL = 0.5  # weight of the teacher's outputs in the loss


@RECOVERIES.register("none", "no recovery: the merged network unchanged")
def none(case: Case) -> None:
    pass


@RECOVERIES.register(
    "bn-reset",
    "recomputes the statistics of every BatchNorm on unlabelled images",
    "Jordan et al., ICLR 2023",
    "images",
)
def bn_reset(case: Case) -> None:
    if case.pruned.merged:
        reset_norms(case.pruned.fit(case.images()))


@RECOVERIES.register(
    "repair",
    "restores the mean and deviation of every layer's outputs in the dense network",
    "Jordan et al., ICLR 2023",
    "images",
)
def repaired(case: Case) -> None:
    if case.pruned.merged:
        repair(case.pruned.fit(case.images()))


@RECOVERIES.register(
    "perp-bias",
    "trains only the biases, including BatchNorm's shifts",
    _PERP,
    "labels",
    knobs=_TRAINING,
    differs=_SGD,
)
def perp_bias(case: Case) -> Telling:
    return retrain(case, TrainedRecovery(choose=_biases))


@RECOVERIES.register("perp-norm", "trains only BatchNorm's scales and shifts", _PERP, "labels", knobs=_TRAINING, differs=_SGD)
def perp_norm(case: Case) -> Telling:
    return retrain(case, TrainedRecovery(choose=_norms))


@RECOVERIES.register("perp-head", "trains only the last layer", _PERP, "labels", knobs=_TRAINING, differs=_SGD)
def perp_head(case: Case) -> Telling:
    return retrain(case, TrainedRecovery(choose=_head(case)))


@RECOVERIES.register(
    "perp",
    "trains biases, BatchNorm and the last layer; all other weights are frozen",
    _PERP,
    "labels",
    knobs=_TRAINING,
    differs=_SGD,
)
def perp(case: Case) -> Telling:
    return retrain(case, TrainedRecovery(choose=_few(case)))


@RECOVERIES.register(
    "perp-lora",
    "as perp, and trains low-rank updates of all other weights, merged into them at the end",
    _PERP,
    "labels",
    knobs=(*_TRAINING, "rank"),
    differs=f"{_RANKS}, {_SGD}",
)
def perp_lora(case: Case) -> Telling:
    return retrain(case, _low_rank(case, masked=False))


@RECOVERIES.register(
    "perp-masklora",
    "as perp-lora, but zero weights remain zero",
    _PERP,
    "labels",
    knobs=(*_TRAINING, "rank"),
    differs=f"{_RANKS}, {_SGD}; a network pruned by channels has no zero weights, so it equals perp-lora there",
)
def perp_masklora(case: Case) -> Telling:
    return retrain(case, _low_rank(case, masked=True))


@RECOVERIES.register("finetune", "trains all weights: the baseline of all methods here", "", "labels", knobs=_TRAINING)
def finetune(case: Case) -> Telling:
    return retrain(case)


@RECOVERIES.register(
    "distill",
    "fine-tuning on the labels and on the dense network's outputs in equal parts",
    "Hinton et al., 2015",
    "labels",
    knobs=_TRAINING,
)
def distill(case: Case) -> Telling:
    return retrain(case, TrainedRecovery(distil=_DISTIL))


@RECOVERIES.register(
    "similarity",
    "fine-tuning with a loss that preserves the dense network's similarities between images",
    "Tung & Mori, ICCV 2019",
    "labels",
    knobs=(*_TRAINING, "gamma"),
)
def similarity(case: Case) -> Telling:
    return retrain(case, TrainedRecovery(similar=case.how.gamma))


@RECOVERIES.register(
    "overparam",
    "fine-tuning with each layer as a product of three, contracted to one at the end",
    _OVER,
    "labels",
    reconstructed="in ratio, start and schedule",
    knobs=(*_TRAINING, "ratio"),
    differs=_WIDE,
)
def overparam(case: Case) -> Telling:
    return retrain(case, _wide(case))


@RECOVERIES.register(
    "overparam-sp",
    "as overparam, with a loss that preserves the dense network's similarities between images",
    _OVER,
    "labels",
    reconstructed="in ratio, start and schedule",
    knobs=(*_TRAINING, "ratio", "gamma"),
    differs=f"{_WIDE}; similarities are compared at the last layer of each image size (paper: in every block)",
)
def overparam_sp(case: Case) -> Telling:
    return retrain(case, _wide(case, case.how.gamma))


def _wide(case: Case, similar: float = 0.0) -> TrainedRecovery:
    return TrainedRecovery(lambda network: expand(network, case.how.ratio, case.how.seed), contract, similar=similar)


def _low_rank(case: Case, masked: bool) -> TrainedRecovery:
    few = _few(case)

    def choose(network: nn.Module) -> list[nn.Parameter]:
        chosen = few(network)
        low = add_low_rank(network, case.how.rank, case.how.seed, masked)
        return [*{id(p): p for p in (*chosen, *low)}.values()]

    return TrainedRecovery(choose=choose, narrow=merge_low_rank)


def _biases(network: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in network.named_parameters() if name.rpartition(".")[2] == "bias"]


def _norms(network: nn.Module) -> list[nn.Parameter]:
    found = [p for layer in network.modules() if isinstance(layer, _BatchNorm) for p in layer.parameters()]
    if not found:
        raise IntrafusionError("this network has no BatchNorm to train; choose recovery perp-bias")
    return found


def _head(case: Case) -> Choose:
    """Return a function that chooses the parameters of the layer that runs last, wherever it is in the network."""
    small = case.pruned.small
    first = next(small.parameters())
    example = card_of(case.pruned.original).example().to(first.device, first.dtype)
    *_, last = inputs_of(small, (_ConvNd, nn.Linear), example)
    return lambda network: list(network.get_submodule(last).parameters())


def _few(case: Case) -> Choose:
    head = _head(case)

    def choose(network: nn.Module) -> list[nn.Parameter]:
        norms = [p for layer in network.modules() if isinstance(layer, _BatchNorm) for p in layer.parameters()]
        return list({id(p): p for p in (*_biases(network), *norms, *head(network))}.values())

    return choose
