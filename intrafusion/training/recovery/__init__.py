"""Recovery: methods that improve a pruned network. One function each; some of them train."""

from intrafusion.options import RecoveryOptions
from intrafusion.training.recovery.cache import Kept, recover, recovering
from intrafusion.training.recovery.distillation import distillation_loss, image_similarity, similarity_loss
from intrafusion.training.recovery.methods import RECOVERIES
from intrafusion.training.recovery.overparam import Widened, contract, expand
from intrafusion.training.recovery.settings import Case, TrainingCost

__all__ = [
    "RECOVERIES",
    "Case",
    "Kept",
    "RecoveryOptions",
    "TrainingCost",
    "Widened",
    "contract",
    "distillation_loss",
    "expand",
    "image_similarity",
    "recover",
    "recovering",
    "similarity_loss",
]
