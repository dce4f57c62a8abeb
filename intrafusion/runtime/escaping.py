"""Escaping of untrusted text (names of classes, groups and studies, or a card), so that it is shown literally.

There is one function for each language that would interpret it: Markdown as Streamlit reads it, Plotly's few HTML tags, and
spreadsheet cells.
"""

import html
import re
from typing import TYPE_CHECKING

from intrafusion.errors import printable

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 40
_MARKUP = re.compile(r"([\\`*\[\]<>$~#|!&{}]|(?<![^\W_])_|_(?![^\W_]))")  # _ within a word is no markup
_JOINS = re.compile(r"(:(?=[\w/+-])|@(?=\w)|\bwww(?=\.))", re.IGNORECASE)  # in icons, links and addresses
_CODE = re.compile(r"((?<!`)`[^`]+`(?!`))")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def markdown(text: str) -> str:
    """Return text escaped for Markdown, labels and help: it makes no markup, link, picture, icon or formula there.

    Text that would become an icon or a link without any markup gets an invisible word joiner (U+2060).
    """
    return _JOINS.sub("\\1\u2060", _MARKUP.sub(r"\\\1", printable(text)))


def sentence(text: str) -> str:
    """Return a message as Markdown: text in backquotes, such as commands, becomes code; the rest is shown literally."""
    parts = _CODE.split(printable(text))
    return "".join(part if place % 2 else markdown(part) for place, part in enumerate(parts))


def code(text: str) -> str:
    """Return text as inline code, which Markdown does not interpret; long text is shortened."""
    text = printable(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}"


def block(text: str) -> str:
    """Return lines of code as a Markdown block that none of the lines can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def hover(text: str) -> str:
    """Return text escaped for Plotly's titles, labels and hovers, which interpret tags, formulas and %{templates}."""
    return html.escape(printable(text), quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def cell(value: object) -> object:
    """Return a value for a spreadsheet; text that would be a formula gets a leading quote, as OWASP recommends.

    Numbers are returned unchanged.
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if value.startswith(_FORMULA) or text[:1] != value[:1] else text


def csv(table: "pd.DataFrame") -> str:
    """Return a table as CSV in which no text or header is a formula."""
    return table.rename(columns=cell).map(cell).to_csv(index=False)
