"""The Docs page: documents and their sections, pictures, links that stay in the window, and search by heading."""

import re
from html import unescape
from urllib.parse import parse_qs, parse_qsl, urlsplit

import pytest
from opening import APP, open_page, press, text
from streamlit.testing.v1 import AppTest

from intrafusion.cli import docs
from intrafusion.runtime.paths import ASSETS


def open_docs(**query: str) -> AppTest:
    app = open_page("docs", **query)
    assert not app.exception
    assert not app.error
    return app


def shown(app: AppTest) -> str:
    """The document on the page."""
    return "\n".join(one.value for one in app.main.markdown if one.value.lstrip().startswith("#") or len(one.value) > 200)


def pictures(app: AppTest) -> int:
    return len(app.get("image"))


@pytest.mark.parametrize("name", docs.NAMES)
def test_a_document_is_shown_whole(name):
    app = open_docs(document=name)
    assert [f"{'#' * one.level} {one.title}" in shown(app) for one in docs.headings(name)].count(False) == 0
    assert pictures(app) == docs.document(name).count("](../")
    assert "](../" not in shown(app)
    assert not re.search(r"\]\([\w-]*\.md|\]\(#", shown(app))
    assert f"python -m intrafusion docs {name}" in [code.value for code in app.code]


def test_every_link_opens_a_section_that_exists():
    for name in docs.NAMES:
        text_shown = shown(open_docs(document=name, model="digits-mlp"))
        for address in re.findall(r'<a href="docs\?([^"]*)" target="_self">', text_shown):
            query = dict(parse_qsl(unescape(address)))
            assert query["model"] == "digits-mlp"
            assert docs.section(query["document"], query["section"]) if "section" in query else docs.document(query["document"])


def test_code_holds_no_links():
    app = open_docs(document="development")
    assert "a link to another document has the form `results.md#recovery`" in shown(app).replace("\n", " ")


def test_a_section_alone():
    app = open_docs(document="results", section="Speed of studies")
    assert "the loop" in shown(app)
    assert "## Landscape" not in shown(app)
    app.selectbox(key="document").set_value("limits").run()
    assert app.selectbox(key="section").value is None
    assert shown(app).startswith("# Limits")


def test_a_link_to_a_section_of_another_document_is_left_aside():
    app = AppTest.from_file(APP, default_timeout=240)
    app.query_params.update({"document": "limits", "section": "Speed of studies"})
    app.switch_page("pages/docs.py").run()
    assert shown(app).startswith("# Limits")
    assert "section=Speed of studies" in app.warning[0].value


class TestSearch:
    def test_finds_headings_of_all_documents_and_opens_one(self):
        app = open_docs()
        app.text_input(key="docs_search").set_value("RECOVERY of").run()
        labels = [button.label for button in app.main.button if ":" in button.label]
        assert labels == ["Results: Recovery of the other digits networks", "Results: Recovery of a CIFAR-10 network"]
        press(app, labels[1])
        assert shown(app).startswith("### Recovery of a CIFAR-10 network")
        assert parse_qs(urlsplit(next(code.value for code in app.code if code.value.startswith("http"))).query)["section"] == [
            "Recovery of a CIFAR-10 network"
        ]

    def test_a_title_opens_the_whole_document(self):
        app = open_docs(document="results", section="Recovery")
        app.text_input(key="docs_search").set_value("limits").run()
        press(app, "Limits")
        assert shown(app).startswith("# Limits")
        assert app.selectbox(key="section").value is None

    def test_many_are_counted(self):
        app = open_docs()
        app.text_input(key="docs_search").set_value("a").run()
        assert "more headings match" in text(app)

    def test_none_is_said_as_text(self):
        app = open_docs()
        app.text_input(key="docs_search").set_value("<b>*x*").run()
        assert "No heading contains ` <b>*x* `." in text(app)


def test_pictures_are_files_of_the_project():
    for name in docs.NAMES:
        for file in re.findall(r"^!\[[^\]]*\]\(\.\./([^)]+)\)$", docs.document(name), re.MULTILINE):
            assert (ASSETS / file).is_file()


@pytest.mark.usefixtures("jobs")
def test_a_public_server_shows_them(monkeypatch):
    monkeypatch.setenv("INTRAFUSION_PUBLIC", "1")
    assert "# Serving the dashboard" in shown(open_docs(document="serving"))
