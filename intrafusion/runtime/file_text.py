"""Checks of text from files, such as class names and fields of cards: bounded length, and encodable Unicode."""

from collections.abc import Iterable, Iterator
from typing import Any

from intrafusion.errors import IntrafusionError

NAME, FIELD = 200, 5_000  # most characters of a class name, and of any text on a card
CLASSES = 100_000


def check_text(text: str, where: object, what: str, most: int = NAME) -> None:
    """Raise IntrafusionError for text that is too long or contains a lone surrogate. where, what: for the message."""
    if len(text) > most:
        raise IntrafusionError(
            f"{where} has {what} of {len(text):,} characters ({text[:20]!r}…); the limit is {most:,}; shorten it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise IntrafusionError(f"{where} has {what} that is not valid Unicode, {text[:80]!r}; write it in UTF-8") from error


def check_classes(names: Iterable[str], where: object) -> tuple[str, ...]:
    """Return class names unchanged. Raises IntrafusionError for too many names, or one that `check_text` rejects."""
    names = tuple(names)
    if len(names) > CLASSES:
        raise IntrafusionError(f"{where} has {len(names):,} class names; the limit is {CLASSES:,}")
    for name in names:
        check_text(name, where, "a class name")
    return names


def texts_in(content: Any) -> Iterator[str]:
    """Yield all strings in JSON-like content, including field names. Raises RecursionError if it is nested too deeply."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for name, value in content.items():
            yield from texts_in(name)
            yield from texts_in(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from texts_in(value)
