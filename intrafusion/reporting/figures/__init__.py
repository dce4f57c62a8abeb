"""Pictures: pure functions, data in, plotly Figure out."""

__all__: list[str] = []
