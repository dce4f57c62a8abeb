"""Recovery: what is done to a pruned network so that it does better. One function each; some of them train."""

from intrafusion.training.recovery.cache import Kept, recover, recovering
from intrafusion.training.recovery.distillation import distillation_loss, similarity, similarity_loss
from intrafusion.training.recovery.methods import RECOVERIES
from intrafusion.training.recovery.overparam import Widened, contract, expand
from intrafusion.training.recovery.settings import BUDGETS, Case, Facts, How

__all__ = [
    "BUDGETS",
    "RECOVERIES",
    "Case",
    "Facts",
    "How",
    "Kept",
    "Widened",
    "contract",
    "distillation_loss",
    "expand",
    "recover",
    "recovering",
    "similarity",
    "similarity_loss",
]
