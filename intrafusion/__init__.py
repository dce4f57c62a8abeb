"""Structured pruning of neural networks by Optimal Transport.

import intrafusion as itf
model = itf.load_model("digits-resnet")
small = itf.prune(model, model.card.example(), sparsity=0.3, merge="fusion")
itf.evaluate(small, itf.load_data("digits")).accuracy
"""

# isort: off
import intrafusion.runtime.shutdown as _shutdown  # noqa: F401  (handle signals before torch is imported)
from intrafusion import _torch_compat as _compat  # noqa: F401  (before anything imports torchvision)

# isort: on
from intrafusion._registry import registry
from intrafusion.data import ImageData, load_calibration, load_data
from intrafusion.errors import IntrafusionError
from intrafusion.evaluation import Evaluation, evaluate, size
from intrafusion.models import ModelCard, load_model, model_names
from intrafusion.pruning import Group, TransportPlan, find_groups, fold, plan, prune, score
from intrafusion.reporting import export
from intrafusion.spec import PruneSpec
from intrafusion.studies import Session, Store, grid, open_session, sweep
from intrafusion.training import SDprun, contract, expand, finalise, fuse_models, mask, recover, similarity_loss
from intrafusion.training.methods import split_data as _trainers  # noqa: F401  (imported to register the trainers)

__version__ = "0.1.0"
__all__ = [
    "Evaluation", "Group", "ImageData", "IntrafusionError", "ModelCard", "PruneSpec", "SDprun", "Session", "Store",
    "TransportPlan", "contract", "evaluate", "expand", "export", "finalise", "find_groups", "fold", "fuse_models", "grid",
    "load_calibration", "load_data", "load_model", "mask", "model_names", "open_session", "plan", "prune", "recover",
    "registry", "score", "similarity_loss", "size", "sweep",
]  # fmt: skip
