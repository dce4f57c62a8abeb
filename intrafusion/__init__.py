"""Structured pruning by Optimal Transport: see it, question it, use it.

import intrafusion as itf
model = itf.load_model("digits-resnet")
small = itf.prune(model, model.card.example(), sparsity=0.3, merge="fusion")
itf.evaluate(small, itf.load_data("digits")).accuracy
"""

import intrafusion.ending as _ending  # noqa: F401  (signals are heeded before torch is imported)
from intrafusion import compat as _compat  # noqa: F401  (before anything imports torchvision)
from intrafusion import recover  # noqa: F401  (its methods register)
from intrafusion.cards import ModelCard
from intrafusion.channels import Group
from intrafusion.data import ImageData, load_calibration, load_data
from intrafusion.errors import IntrafusionError
from intrafusion.evaluate import Evaluation, evaluate
from intrafusion.fold import fold
from intrafusion.groups import find_groups
from intrafusion.importance import score
from intrafusion.prune import prune
from intrafusion.registry import registry
from intrafusion.spec import PruneSpec
from intrafusion.train import split_data as _trainers  # noqa: F401  (they register)
from intrafusion.transport import TransportPlan, plan
from intrafusion.zoo import load_model

__version__ = "0.1.0"
__all__ = [
    "Evaluation",
    "Group",
    "ImageData",
    "IntrafusionError",
    "ModelCard",
    "PruneSpec",
    "TransportPlan",
    "evaluate",
    "find_groups",
    "fold",
    "load_calibration",
    "load_data",
    "load_model",
    "plan",
    "prune",
    "registry",
    "score",
]
