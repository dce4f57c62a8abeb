"""Pretrained classifiers: where they come from, their cards, weights and files, and their graphs."""
