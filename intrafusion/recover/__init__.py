"""Recovery: what is done to a pruned network so that it does better. One function each; some of them train."""

from intrafusion.recover.case import BUDGETS, Case, Facts, How
from intrafusion.recover.kept import Kept, recover, recovering
from intrafusion.recover.methods import RECOVERIES
from intrafusion.recover.teach import distillation_loss, similarity, similarity_loss
from intrafusion.recover.widen import Widened, contract, expand

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
