"""What tests of pages share."""

from collections.abc import Iterator

import pytest

from intrafusion.jobs import Jobs
from pages.common import shell


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """The server's jobs, none at first."""
    made = Jobs()
    monkeypatch.setattr(shell, "jobs", lambda: made)
    yield made
    made.stop(10)
