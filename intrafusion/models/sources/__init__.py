"""Model sources: one module per source, each with names, dataset, blank, open_model, is_local and describe."""

__all__: list[str] = []
