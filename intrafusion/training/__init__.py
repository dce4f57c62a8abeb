"""Training: one loop for everything that learns, and pruning while a network learns."""

from intrafusion.training.methods.masks import finalise, mask
from intrafusion.training.methods.sdprun import SDprun, channels_of, without_zeroed
from intrafusion.training.model_fusion import fuse_models

__all__ = ["SDprun", "channels_of", "finalise", "fuse_models", "mask", "without_zeroed"]
