"""Groups of coupled channels: which there are, and their weights, norms and feature maps."""

__all__: list[str] = []
