"""Groups of coupled channels: how to find them, and their weights, norms and feature maps."""

__all__: list[str] = []
