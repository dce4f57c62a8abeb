"""Measuring networks: accuracy, size, latency, attributions, and the loss around them."""

from intrafusion.evaluation.accuracy import Evaluation, Size, evaluate, size, wilson

__all__ = ["Evaluation", "Size", "evaluate", "size", "wilson"]
