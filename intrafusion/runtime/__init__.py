"""What the rest runs on, and knows no networks: paths, jobs, cancellation, caches, logging, sandboxes, safe files."""

from intrafusion.runtime.cancellation import Cancelled, checkpoint

__all__ = ["Cancelled", "checkpoint"]
