"""Training: one loop for everything that learns, and pruning during training."""

from intrafusion.training.methods.masks import finalise, mask
from intrafusion.training.methods.runs import open_run, run_training
from intrafusion.training.methods.sdprun import SDprun, channels_of, without_zeroed
from intrafusion.training.methods.spec import TrainSpec
from intrafusion.training.model_fusion import fuse_models
from intrafusion.training.recovery import contract, expand, recover, similarity_loss

__all__ = [
    "SDprun",
    "TrainSpec",
    "channels_of",
    "contract",
    "expand",
    "finalise",
    "fuse_models",
    "mask",
    "open_run",
    "recover",
    "run_training",
    "similarity_loss",
    "without_zeroed",
]
