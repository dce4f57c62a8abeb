"""Where models come from, by what their names begin with."""

from types import ModuleType

from intrafusion.errors import IntrafusionError


def of(name: str) -> ModuleType:
    """The source that a name belongs to: a module with names, dataset, blank, open_model, is_local and describe."""
    from intrafusion.zoo import factory, imagenet, kept, ours, timm

    if factory.MARK in name:
        return factory
    return next((source for source in (kept, imagenet, timm) if name.startswith(source.PREFIX)), ours)


def runs_code(name: str) -> bool:
    """Whether opening this model runs a person's own code: only Python and the command line may name such a one."""
    from intrafusion.zoo import factory

    return factory.MARK in name


def is_safe(architecture: str) -> bool:
    """Whether a file may ask for this architecture: one that is known by its name alone, or a program that is kept."""
    from intrafusion.zoo import kept

    if runs_code(architecture):
        return False
    try:
        if architecture.startswith(kept.PREFIX):
            return kept.is_program(architecture)
        of(architecture).dataset(architecture)
    except IntrafusionError:
        return False
    return True
