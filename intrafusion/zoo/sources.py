"""Where models come from, by what their names begin with."""

from types import ModuleType

from intrafusion.errors import IntrafusionError


def of(name: str) -> ModuleType:
    """The source that a name belongs to: a module with names, dataset, blank, open_model, is_local and describe."""
    from intrafusion.zoo import imagenet, kept, ours, timm

    return next((source for source in (kept, imagenet, timm) if name.startswith(source.PREFIX)), ours)


def is_safe(architecture: str) -> bool:
    """Whether a file may ask for this architecture: one that is known by its name alone."""
    from intrafusion.zoo import kept

    if architecture.startswith(kept.PREFIX):
        return False
    try:
        of(architecture).dataset(architecture)
    except IntrafusionError:
        return False
    return True
