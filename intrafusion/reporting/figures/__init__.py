"""Pictures: pure functions, data in, plotly Figure out."""
