"""One dashboard and one Chromium for all browser tests; without a Chromium they skip."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
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
    """A page in the dark theme, as wide as the parameter says."""
    opened = new_page(browser, color_scheme="dark", viewport={"width": request.param, "height": 1000})
    yield opened
    opened.close()
