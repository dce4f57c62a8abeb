"""Training: one loop for everything that learns, and pruning while a network learns."""

from intrafusion.train.directional import SDprun, channels_of, without_zeroed
from intrafusion.train.fuse import fuse_models
from intrafusion.train.subnetwork import finalise, mask

__all__ = ["SDprun", "channels_of", "finalise", "fuse_models", "mask", "without_zeroed"]
