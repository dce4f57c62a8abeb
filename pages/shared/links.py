"""A page's address: its permalink, which spells every setting out, and one line about a link that it does not understand.

Streamlit takes from a link what a widget can hold, and leaves the rest aside without a word. What it left aside shows once
the widget is drawn: its value, spelled as a permalink spells it, is not what the link says. So no widget declares anything
for this; a page names its settings once, for its permalink.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlencode

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from intrafusion.runtime import escaping
from pages.shared.navigation import Enough

SIDEBAR = ("model", "imagenet", "data", "weights", "data_path", "device", "group")
_NAMED = 3  # parameters that a notice names


@dataclass
class _Link:
    """How a session came to a page. asked: what no widget has answered yet. refused: what was not understood."""

    page: str
    asked: dict[str, list[str]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    keys: tuple[str, ...] = ()  # of the page's settings, once it has come so far as to name them
    settings: dict[str, list[str]] = field(default_factory=dict)


def permalink(page: str, keys: tuple[str, ...]) -> str:
    """The page's address with every setting spelled out, defaults too, so that it means the same next year."""
    keys = (*SIDEBAR, *keys)
    if "link" in st.session_state:
        st.session_state.link.keys = keys
    url = (st.context.url or "http://localhost:8501/").split("?")[0]
    base = url if page == "" or url.rstrip("/").endswith(f"/{page}") else url.rstrip("/") + f"/{page}"
    query = [(key, word) for key in keys for word in _spelled(st.session_state.get(key))]
    return f"{base}?{urlencode(query)}"


@contextmanager
def noticed(page: str, place: DeltaGenerator) -> Iterator[None]:
    """Draw a page within, up to where it has Enough; say in `place` what it did not understand of the link that opened the
    session.

    The line stays until the reader changes a setting or leaves the page.
    """
    link = st.session_state.get("link")
    if link is None:
        link = st.session_state.link = _Link(page, {name: st.query_params.get_all(name) for name in st.query_params})
        _refuse_infinities(link)
    elif link.page != page:  # between pages, the address is the app's own doing
        link = st.session_state.link = _Link(page)
    try:
        yield
    except Enough:
        pass
    finally:
        _judge(link)
        if link.refused:
            place.warning(_sentence(link.refused), icon=":material/link_off:")


def _refuse_infinities(link: _Link) -> None:
    """Streamlit 1.67 fails where a link gives infinity to a widget of whole numbers; no setting of a page is infinite."""
    for name, words in list(link.asked.items()):
        if any(math.isinf(_number(word)) for word in words):
            _refuse(link, name, [])
            del st.query_params[name]
    if link.refused:
        st.rerun()  # widgets are filled from the address that the run began with


def _judge(link: _Link) -> None:
    settings = {key: _spelled(st.session_state[key]) for key in link.keys if key in st.session_state}
    if any(link.settings.get(key, words) != words for key, words in settings.items()):
        link.refused.clear()
    link.settings |= settings
    for name in list(link.asked):
        is_drawn = name in st.session_state
        taken = _spelled(st.session_state[name]) if is_drawn else []
        if (is_drawn and not _same(link.asked[name], taken)) or (link.keys and name not in link.keys):
            _refuse(link, name, taken)
        elif is_drawn:
            del link.asked[name]


def _refuse(link: _Link, name: str, taken: Sequence[str]) -> None:
    words = link.asked.pop(name)
    link.refused.append(f"{name}={next((word for word in words if word not in taken), words[0])}")


def _spelled(value: object) -> list[str]:
    """A setting as it stands in an address, without the name; nothing for one that is empty."""
    if value is None or value == "":
        return []
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def _same(given: Sequence[str], taken: Sequence[str]) -> bool:
    given = [word for word in given if word]
    return len(given) == len(taken) and all(
        one == other or (other in ("true", "false") and one.lower() == other) or _number(one) == _number(other)
        for one, other in zip(given, taken, strict=True)
    )


def _number(word: str) -> float:
    """NaN, which equals nothing, for a word that is no number."""
    try:
        return float(word)
    except ValueError:
        return math.nan


def _sentence(refused: Sequence[str]) -> str:
    named, more = ", ".join(map(escaping.code, refused[:_NAMED])), len(refused) - _NAMED
    return f"Not understood in this link, and left aside: {named}" + (f" and {more:,} more." if more > 0 else ".")
