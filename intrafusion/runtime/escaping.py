"""Text that a stranger may have written, as class names, names of groups and studies, or a card: shown as the text it is.

One function for each language that would take it for more: Markdown as Streamlit reads it, Plotly's few HTML tags, and the
cells of spreadsheets.
"""

import html
import re
from typing import TYPE_CHECKING

from intrafusion.errors import printable

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 40
_MARKUP = re.compile(r"([\\`*\[\]<>$~#|!&{}]|(?<![^\W_])_|_(?![^\W_]))")  # _ within a word is none
_JOINS = re.compile(r"(:(?=[\w/+-])|@(?=\w)|\bwww(?=\.))", re.IGNORECASE)  # of icons, links and addresses
_CODE = re.compile(r"((?<!`)`[^`]+`(?!`))")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def markdown(text: str) -> str:
    """Text within Markdown, labels and help among it, that makes no markup, link, picture, icon or formula there.

    What would become an icon or a link without any markup gets a word joiner (U+2060), which nobody sees.
    """
    return _JOINS.sub("\\1\u2060", _MARKUP.sub(r"\\\1", printable(text)))


def sentence(text: str) -> str:
    """A message as Markdown: what stands in backquotes, as commands do, is code, and the rest the text it is."""
    parts = _CODE.split(printable(text))
    return "".join(part if place % 2 else markdown(part) for place, part in enumerate(parts))


def code(text: str) -> str:
    """As code, which nothing in Markdown interprets; shortened."""
    text = printable(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}"


def block(text: str) -> str:
    """Lines of code as a block of Markdown, which no line of theirs ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def hover(text: str) -> str:
    """Text for Plotly's titles, labels and hovers, which take tags, formulas and %{templates}."""
    return html.escape(printable(text), quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def cell(value: object) -> object:
    """A value for a spreadsheet: text that would be a formula there gets a quote before it, as OWASP says; numbers stay."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if value.startswith(_FORMULA) or text[:1] != value[:1] else text


def csv(table: "pd.DataFrame") -> str:
    """A table as CSV whose texts and heads are no formulas."""
    return table.rename(columns=cell).map(cell).to_csv(index=False)
