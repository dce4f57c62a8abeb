"""Measurement of networks: accuracy, size, latency, attributions, and the loss landscape."""

from intrafusion.evaluation.accuracy import Evaluation, Size, evaluate, size, wilson

__all__ = ["Evaluation", "Size", "evaluate", "size", "wilson"]
