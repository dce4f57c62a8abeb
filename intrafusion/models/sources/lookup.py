"""Lookup of the source of published and factory-made models from their names."""

from types import ModuleType

from intrafusion.models.sources import builtin, factory, timm, torchvision


def of(name: str) -> ModuleType:
    """Return the source of a name: a module with names, dataset, blank, open_model, is_local and describe."""
    if factory.MARK in name:
        return factory
    return next((source for source in (torchvision, timm) if name.startswith(source.PREFIX)), builtin)


def runs_code(name: str) -> bool:
    """Return whether opening this model runs the user's own code. Only Python and the command line may name such a model."""
    return factory.MARK in name
