"""Fixtures for the browser tests: one dashboard, one Chromium and one tab for all. Without a Chromium the tests are skipped."""

from pathlib import Path

import pytest
from dashboard import CHROMIUM, chromium, new_page, opened, serving


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if CHROMIUM is None:
                reason = "no Chromium on this machine: install Debian's package chromium-headless-shell"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with chromium() as started:
        yield started


@pytest.fixture(scope="session")
def tab(browser):
    """A tab that tests use one after the other: it has read and compiled the dashboard's scripts, which takes seconds."""
    made = new_page(browser)
    yield made
    made.close()


@pytest.fixture(scope="session")
def first_visit(tab):
    """The address of a new dashboard, and the texts of its navigation and of its sidebar as its first visitor sees them."""
    with serving() as url:
        opened(tab, f"{url}/importance")
        links = tab.get_by_test_id("stSidebarNavLink").all_inner_texts()
        yield url, links, tab.get_by_test_id("stSidebar").inner_text()


@pytest.fixture(scope="session")
def address(first_visit):
    return first_visit[0]


@pytest.fixture
def page(tab):
    """The tab, in the light theme."""
    tab.set_viewport_size({"width": 1400, "height": 1600})
    tab.emulate_media(color_scheme="light")
    yield tab
    tab.goto("about:blank")  # ends the session, so that its page computes nothing more


@pytest.fixture
def dark(page):
    """The tab, narrow and in the dark theme."""
    page.set_viewport_size({"width": 900, "height": 1000})
    page.emulate_media(color_scheme="dark")
    return page
