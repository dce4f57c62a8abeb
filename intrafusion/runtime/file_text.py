"""Text that stands in a file, as names of classes and fields of cards: of bounded length, and Unicode that can be written."""

from collections.abc import Iterable, Iterator
from typing import Any

from intrafusion.errors import IntrafusionError

NAME, FIELD = 200, 5_000  # characters of a class name, and of any text on a card
CLASSES = 100_000


def check_text(text: str, where: object, what: str, most: int = NAME) -> None:
    """Raise IntrafusionError for a text that is too long, or holds half of a character. where, what: for the message."""
    if len(text) > most:
        raise IntrafusionError(
            f"{where} has {what} of {len(text):,} characters ({text[:20]!r}…), and at most {most:,} are taken: shorten it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise IntrafusionError(f"{where} has {what} that is no Unicode text, {text[:80]!r}: write it in UTF-8") from error


def check_classes(names: Iterable[str], where: object) -> tuple[str, ...]:
    """Names of classes as they are. Raises IntrafusionError for too many, and for one that `check_text` refuses."""
    names = tuple(names)
    if len(names) > CLASSES:
        raise IntrafusionError(f"{where} has {len(names):,} class names, and at most {CLASSES:,} are taken")
    for name in names:
        check_text(name, where, "a class name")
    return names


def texts_in(content: Any) -> Iterator[str]:
    """All texts in what JSON can say, the names of fields among them. Raises RecursionError for what is too deep."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for name, value in content.items():
            yield from texts_in(name)
            yield from texts_in(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from texts_in(value)
