"""Structured pruning by Optimal Transport: see it, question it, use it.

import intrafusion as itf
model = itf.load_model("digits-resnet")
small = itf.prune(model, model.card.example(), sparsity=0.3, merge="fusion")
itf.evaluate(small, itf.load_data("digits")).accuracy
"""

import intrafusion.runtime.shutdown as _ending  # noqa: F401  (signals are heeded before torch is imported)
from intrafusion import _torch_compat as _compat  # noqa: F401  (before anything imports torchvision)
from intrafusion._registry import registry
from intrafusion.data.datasets import ImageData, load_calibration, load_data
from intrafusion.errors import IntrafusionError
from intrafusion.evaluation.accuracy import Evaluation, evaluate
from intrafusion.models.card import ModelCard
from intrafusion.models.hub import load_model
from intrafusion.pruning.groups.bn_folding import fold
from intrafusion.pruning.groups.find import find_groups
from intrafusion.pruning.groups.group import Group
from intrafusion.pruning.importance import score
from intrafusion.pruning.pruner import prune
from intrafusion.pruning.transport.planning import TransportPlan, plan
from intrafusion.spec import PruneSpec
from intrafusion.training import recovery  # noqa: F401  (its methods register)
from intrafusion.training.methods import split_data as _trainers  # noqa: F401  (they register)

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
