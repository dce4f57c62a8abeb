"""Where models that are published or made by code come from, by what their names begin with."""

from types import ModuleType

from intrafusion.models.sources import builtin, factory, timm, torchvision


def of(name: str) -> ModuleType:
    """The source that a name belongs to: a module with names, dataset, blank, open_model, is_local and describe."""
    if factory.MARK in name:
        return factory
    return next((source for source in (torchvision, timm) if name.startswith(source.PREFIX)), builtin)


def runs_code(name: str) -> bool:
    """Whether opening this model runs a person's own code: only Python and the command line may name such a one."""
    return factory.MARK in name
