"""Where models come from: one module a source, each with names, dataset, blank, open_model, is_local and describe."""

__all__: list[str] = []
