"""Page addresses: the permalink, which spells out every setting, and a notice about parts of a link that were not understood.

Streamlit reads from a link what a widget can hold and silently ignores the rest. An ignored parameter is detected once its
widget is drawn: the widget's value, spelled as in a permalink, differs from the link. So widgets need no extra declaration;
a page only lists its settings once, for its permalink.
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

BIND = "query-params"  # for widgets whose value is part of the link
SIDEBAR = ("model", "imagenet", "data", "weights", "data_path", "device", "group")
_NAMED = 3  # most parameters that a notice names


@dataclass
class _Link:
    """The link that opened a page. asked: parameters no widget has taken yet. refused: parameters that were not understood."""

    page: str
    asked: dict[str, list[str]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    keys: tuple[str, ...] = ()  # keys of the page's settings, set when the page builds its permalink
    settings: dict[str, list[str]] = field(default_factory=dict)


def permalink(page: str, keys: tuple[str, ...]) -> str:
    """Return the page's address with every setting spelled out, defaults included, so that later defaults do not change it."""
    keys = (*SIDEBAR, *keys)
    if "link" in st.session_state:
        st.session_state.link.keys = keys
    url = (st.context.url or "http://localhost:8501/").split("?")[0]
    base = url if page == "" or url.rstrip("/").endswith(f"/{page}") else url.rstrip("/") + f"/{page}"
    query = [(key, word) for key in keys for word in _spelled(st.session_state.get(key))]
    return f"{base}?{urlencode(query)}"


@contextmanager
def noticed(page: str, place: DeltaGenerator) -> Iterator[None]:
    """Run a page in this context, end it at Enough, and list in `place` the link parameters that were not understood.

    The notice stays until the reader changes a setting or leaves the page.
    """
    link = st.session_state.get("link")
    if link is None:
        link = st.session_state.link = _Link(page, {name: st.query_params.get_all(name) for name in st.query_params})
        _refuse_infinities(link)
    elif link.page != page:  # after navigation the app itself has set the address
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
    """Refuse infinite values: Streamlit 1.67 fails if a link gives one to an integer widget. No setting is infinite."""
    for name, words in list(link.asked.items()):
        if any(math.isinf(_number(word)) for word in words):
            _refuse(link, name, [])
            del st.query_params[name]
    if link.refused:
        st.rerun()  # widgets are filled from the address at the start of a run


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
    """Return a setting's values as spelled in an address, without its name. Return an empty list for an empty setting."""
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
    """Parse a number. Return NaN, which equals nothing, if the word is not a number."""
    try:
        return float(word)
    except ValueError:
        return math.nan


def _sentence(refused: Sequence[str]) -> str:
    named, more = ", ".join(map(escaping.code, refused[:_NAMED])), len(refused) - _NAMED
    return f"Invalid settings in this link were ignored: {named}" + (f" and {more:,} more." if more > 0 else ".")
