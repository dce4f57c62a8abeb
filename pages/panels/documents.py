"""Parts of the Docs page: the controls, the headings found by a search, and a document with links and pictures."""

import html
import re
from urllib.parse import urlencode

import streamlit as st

from intrafusion.cli import docs
from intrafusion.runtime import escaping
from intrafusion.runtime.paths import ASSETS
from pages.shared import links
from pages.shared.links import BIND

KEYS = ("document", "section")
_FOUND = 12  # most headings that a search lists
_WIDTH = 720  # width of a picture in pixels
_PICTURE = re.compile(r"^!\[([^\]]*)\]\((?:\.\./)*([\w.-]+)\)$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([\w-]+\.md)?(?:#([\w-]+))?\)")
_CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def document_control() -> str:
    """Draw the choice of a document and return its name."""
    return st.selectbox("Document", docs.NAMES, key="document", bind=BIND, on_change=_whole)


def section_control(name: str) -> str | None:
    """Draw the choice of a section and return its heading, or None for the whole document."""
    titles = [one.title for one in docs.headings(name)[1:]]
    if st.session_state.get("section") not in titles:
        st.session_state.pop("section", None)
    return st.selectbox("Section", titles, None, key="section", bind=BIND, placeholder="Whole document")


def search_control() -> str:
    """Draw the search field and return the words that a heading must contain."""
    return st.text_input("Search headings", key="docs_search", placeholder="recovery").strip()


def found(words: str) -> None:
    """Draw a button for each heading that contains all the words. The button opens the section."""
    wanted = words.lower().split()
    known = [one for name in docs.NAMES for one in docs.headings(name) if all(word in one.title.lower() for word in wanted)]
    if not known:
        st.caption(f"No heading contains {escaping.code(words)}.")
    with st.container(horizontal=True):
        for one in known[:_FOUND]:
            label = f"{docs.headings(one.document)[0].title}: {one.title}" if one.level > 1 else one.title
            st.button(label, key=f"{one.document}#{one.anchor}", on_click=_open, args=(one,), type="tertiary")
    if len(known) > _FOUND:
        st.caption(f"{len(known) - _FOUND} more headings match. Add a word to narrow the search.")


def _whole() -> None:
    st.session_state.section = None


def _open(heading: docs.Heading) -> None:
    st.session_state.document = heading.document
    st.session_state.section = heading.title if heading.level > 1 else None


def show_document(name: str, text: str) -> None:
    """Draw the Markdown of a document or a section, with its pictures. Links to documents open on this page."""
    rest = text
    while match := _PICTURE.search(rest):
        _prose(name, rest[: match.start()])
        st.image(ASSETS / match[2], caption=match[1], width=_WIDTH)
        rest = rest[match.end() :]
    _prose(name, rest)


def _prose(name: str, text: str) -> None:
    if text.strip():
        pieces = _CODE.split(text)  # code is at the odd indices; it contains no links
        pieces[::2] = [_LINK.sub(lambda match: _link(name, *match.groups()), piece) for piece in pieces[::2]]
        st.markdown(
            "".join(pieces), unsafe_allow_html=True
        )  # the documents are ours; links in Markdown would open a new window


def _link(name: str, label: str, file: str | None, anchor: str | None) -> str:
    """Return HTML for a link to a heading of a document. It opens in the same window and keeps the sidebar's settings."""
    name = file.removesuffix(".md") if file else name
    title = next((one.title for one in docs.headings(name)[1:] if one.anchor == anchor), None)
    query = {key: value for key in links.SIDEBAR if (value := st.session_state.get(key))}
    address = urlencode({**query, "document": name, **({"section": title} if title else {})})
    return f'<a href="docs?{html.escape(address)}" target="_self">{label}</a>'
