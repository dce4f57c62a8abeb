"""Fixtures for the browser tests: one dashboard and one Chromium for all. Without a Chromium the tests are skipped."""

from pathlib import Path

import pytest
from dashboard import CHROMIUM, chromium, new_page, serving


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if CHROMIUM is None:
                reason = "no Chromium on this machine: install Debian's package chromium"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def address():
    with serving() as url:
        yield url


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser):
    opened = new_page(browser, viewport={"width": 1400, "height": 1600})
    yield opened
    opened.close()


@pytest.fixture(params=[900])
def dark(browser, request):
    """Open a page in the dark theme, with the parameter as its width."""
    opened = new_page(browser, color_scheme="dark", viewport={"width": request.param, "height": 1000})
    yield opened
    opened.close()
