"""Pretrained classifiers: where they come from, their cards, weights and files, and their graphs."""

from intrafusion.models.card import ModelCard
from intrafusion.models.hub import describe, load_model, model_names

__all__ = ["ModelCard", "describe", "load_model", "model_names"]
