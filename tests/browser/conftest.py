"""One dashboard and one Chromium for all browser tests; without a Chromium they skip."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from dashboard import CHROMIUM, chromium, serving


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
    opened = browser.new_page(viewport={"width": 1400, "height": 1600})
    opened.set_default_timeout(60_000)
    yield opened
    opened.close()


@pytest.fixture(params=[900])
def dark(browser, request):
    """A page in the dark theme, as wide as the parameter says."""
    context = browser.new_context(color_scheme="dark", viewport={"width": request.param, "height": 1000})
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    yield opened
    context.close()
