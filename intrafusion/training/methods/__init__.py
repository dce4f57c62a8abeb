"""Trainers of the training lab, and its runs."""

__all__: list[str] = []
