"""What tests of pages share."""

import logging
from collections.abc import Callable, Iterator

import pytest

from intrafusion.runtime.jobs import Jobs
from pages.shared import background_jobs


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The server's jobs, none at first."""
    made = Jobs()
    monkeypatch.setattr(background_jobs, "jobs", lambda: made)
    yield made
    made.stop(10)


Unexpected = Callable[[], list[logging.LogRecord]]


@pytest.fixture
def unexpected(caplog: pytest.LogCaptureFixture) -> Unexpected:
    """What went wrong on a page as nobody expected, so far; a test that asks for this may cause it."""
    return lambda: [r for r in caplog.records if getattr(r, "fields", {}).get("where") == "page"]


@pytest.fixture(autouse=True)
def _nothing_unexpected(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails a test on whose pages something went wrong: readers see one line of it, and Streamlit no exception."""
    yield
    if "unexpected" not in request.fixturenames:
        found = [record for record in caplog.get_records("call") if getattr(record, "fields", {}).get("where") == "page"]
        assert not found, [str(record.exc_info[1]) for record in found]
