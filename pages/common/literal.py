"""Text that a stranger may have written, shown in Markdown as the text it is."""

import re

_SHOWN = 40


def code(text: str) -> str:
    """As code, which nothing in Markdown interprets; shortened, and what does not print as its number."""
    text = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    text = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}"


def sentence(text: str) -> str:
    """A message, whose values make no picture, link, formula or markup."""
    return re.sub(r"([\\*\[<$])", r"\\\1", text)
