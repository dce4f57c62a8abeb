"""Figures: pure functions from data to Plotly figures."""

__all__: list[str] = []
