"""Networks as torch.fx graphs, used to run parts of them only once."""

__all__: list[str] = []
