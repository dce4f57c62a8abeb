"""Pretrained classifiers: sources, model cards, weights files and computation graphs."""

from intrafusion.models.card import ModelCard
from intrafusion.models.hub import describe, load_model, model_names

__all__ = ["ModelCard", "describe", "load_model", "model_names"]
