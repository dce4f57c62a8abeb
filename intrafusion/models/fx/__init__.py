"""Networks as torch.fx graphs, to run parts of them once."""

__all__: list[str] = []
