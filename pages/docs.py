"""The Docs page: one of the project's documents, whole or a single section, with search by heading."""

import pandas as pd
import streamlit as st

from intrafusion.cli import docs
from pages.panels import documents
from pages.shared import parts
from pages.shared.navigation import enter_app

enter_app()
left, middle, right = st.columns(3)
with left:
    name = documents.document_control()
with middle:
    title = documents.section_control(name)
with right:
    words = documents.search_control()
if words:
    documents.found(words)

documents.show_document(name, docs.section(name, title) if title else docs.document(name))
known = docs.headings(name)
parts.take_away(
    "docs",
    pd.DataFrame({"level": [one.level for one in known], "heading": [one.title for one in known]}),
    f"python -m intrafusion docs {name}",
    f'from intrafusion.cli.main import main\n\nmain(["docs", "{name}"])',
    documents.KEYS,
)
