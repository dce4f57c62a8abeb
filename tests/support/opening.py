"""Opens a page of the dashboard without a browser, presses its buttons, and reads its words."""

import functools
import time
from pathlib import Path
from typing import Any

from places import ROOT
from streamlit.components.v2 import manifest_scanner
from streamlit.testing.v1 import AppTest

from intrafusion.runtime.jobs import Jobs

PATIENCE = 240  # seconds, on a busy machine
APP = str(ROOT / "app.py")

# each AppTest starts a runtime, which reads the metadata of all installed packages: once per process is enough
manifest_scanner.scan_component_manifests = functools.cache(manifest_scanner.scan_component_manifests)


def open_page(page: str, **query: str) -> AppTest:
    app = AppTest.from_file(APP, default_timeout=240)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    if page != "overview":
        app.switch_page(f"pages/{page}.py").run()
    return app


def press(app: AppTest, label: str) -> AppTest:
    next(button for button in app.main.button if button.label == label).click().run()
    assert not app.exception
    return app


def finished(app: AppTest, jobs: Jobs) -> AppTest:
    """The page once all jobs have ended."""
    deadline = time.monotonic() + PATIENCE
    while jobs.queue():
        assert time.monotonic() < deadline, [job.title for job in jobs.queue()]
        time.sleep(0.2)
    app.run()
    assert not app.exception
    return app


def upload(app: AppTest, what: str, *paths: Path) -> AppTest:
    """Give files to an uploader, press its button, and wait for the check."""
    app = given(app, what, *paths).button(key=f"own_{what}_take").click().run(timeout=120)
    assert not app.exception
    from pages.shared import background_jobs

    return finished(app, background_jobs.jobs())


def given(app: AppTest, what: str, *paths: Path) -> AppTest:
    contents = [(path.name, path.read_bytes(), "application/octet-stream") for path in paths]
    uploader(app, what).set_value(contents if what == "images" else contents[0]).run()
    assert not app.exception
    return app


def uploader(app: AppTest, what: str) -> Any:
    return next(one for one in app.file_uploader if one.key.startswith(f"own_{what} "))


def text(app: AppTest) -> str:
    kinds = (app.markdown, app.caption, app.title, app.subheader, app.error, app.warning, app.info, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind)
