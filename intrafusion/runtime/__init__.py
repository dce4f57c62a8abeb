"""Infrastructure that is independent of networks: paths, jobs, cancellation, caches, logging, sandboxes, safe file writing."""

from intrafusion.runtime.cancellation import Cancelled, checkpoint

__all__ = ["Cancelled", "checkpoint"]
