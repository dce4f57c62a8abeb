"""Training: one loop for everything that learns, and pruning while a network learns."""

from intrafusion.train.directional import SDprun, channels_of, without_zeroed
from intrafusion.train.subnetwork import finalise, mask

__all__ = ["SDprun", "channels_of", "finalise", "mask", "without_zeroed"]
