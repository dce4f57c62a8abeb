"""Run the dashboard on a free port and a Chromium to test it; also makes the screenshots of the documents.

python tests/support/dashboard.py assets
"""

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from places import ROOT

TRACEBACK = "Traceback (most recent call last):\n"
_BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")  # the lightest first
CHROMIUM = next(filter(None, map(shutil.which, _BROWSERS)), None)
PATIENCE = 240  # time-out in seconds, only reached if something is wrong
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def serving() -> Iterator[str]:
    """Run the dashboard and yield its address. Raise AssertionError at the end if its log contains an error of our code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={port}"]
    with tempfile.TemporaryFile("w+") as log:  # an unread pipe would fill up
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1)
                    break
                except OSError:
                    time.sleep(0.25)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)
        log.seek(0)
        if wrong := [line for line in log.read().splitlines() if is_error(line)]:
            raise AssertionError("\n".join(wrong))


def is_error(line: str) -> bool:
    """Return whether a log line reports an error of ours: one that our code logs, or one whose traceback passes through it.

    Streamlit's server logs its own errors when a tab closes at the wrong moment. Their tracebacks pass through our code only
    where it wraps the server, in a file common/serving.py, which is therefore not counted.
    """
    try:
        said = json.loads(line)
    except ValueError:  # the log was not JSON yet, so a traceback is not from a page
        return TRACEBACK.strip() in line
    files = re.findall(r'^  File "(.*?)"', f"{said.get('message', '')}\n{said.get('traceback', '')}", re.MULTILINE)
    ours = [re.match(rf"{re.escape(str(ROOT))}/(?!\.venv/)", file) for file in files]
    server = ("shared/server.py", "shared/request_guard.py")
    through = [match for match, file in zip(ours, files, strict=True) if not file.endswith(server)]
    return said.get("event") == "error" or any(through) or bool(ours and ours[-1])


@contextmanager
def chromium() -> Iterator:
    """Run a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def new_page(browser: Any, **options: Any) -> Any:
    """Open a page in a new session, with time-outs long enough for a busy machine, and without animations, which cost most."""
    page = browser.new_page(reduced_motion="reduce", **options)
    page.set_default_timeout(PATIENCE * 1000)
    return page


def until(page: Any, holds: str, arg: Any = None) -> None:
    """Wait until a JavaScript function returns true. It is called five times a second, not at each frame."""
    page.wait_for_function(holds, arg=arg, polling=200)


_AT_REST = """() => {
    const app = document.querySelector('[data-testid="stApp"]');
    const charts = [...document.querySelectorAll('[data-testid="stPlotlyChart"]')];
    const listens = chart => chart.querySelector('.js-plotly-plot')?._ev?._events?.plotly_selected;
    return app?.dataset.testScriptState === 'notRunning' && charts.every(listens) }"""


def at_rest(page: Any) -> None:
    """Wait until the page's script has ended and each figure on it listens to clicks, which it does once it is drawn."""
    until(page, _AT_REST)


def opened(page: Any, address: str) -> None:
    """Open a page by its address and wait until it is complete and at rest."""
    page.goto(address)
    shows(page, "Share and reproduce")
    at_rest(page)


def shows(page: Any, text: str) -> None:
    """Wait until the page shows this text."""
    page.get_by_text(text).first.wait_for()


def no_exception(page: Any) -> None:
    """Assert that the page shows neither an exception nor an alert box."""
    assert page.locator('[data-testid="stException"]').count() == 0
    alerts = page.locator('[data-testid="stAlert"]').all_inner_texts()
    assert not alerts, alerts


def fits(page: Any) -> None:
    """Assert that nothing is wider than the page."""
    main = "document.querySelector('[data-testid=stMain]')"
    assert page.evaluate(f"{main}.scrollWidth - {main}.clientWidth") <= 1


def is_dark(page: Any) -> None:
    """Assert that the ground is dark and that figures use light text."""
    ground = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", ground)[:3])) < 150
    ink = page.evaluate("getComputedStyle(document.querySelector('.js-plotly-plot .gtitle')).fill")
    assert sum(map(int, re.findall(r"\d+", ink)[:3])) > 600


_MATCHES = "([selector, pattern]) => [...document.querySelectorAll(selector)].some(e => RegExp(pattern).test(e.textContent))"


def wait_for(page: Any, selector: str, pattern: str) -> None:
    """Wait until some element's text matches a JavaScript pattern."""
    until(page, _MATCHES, [selector, pattern])


def still_box(spot: Any) -> dict[str, float]:
    """Scroll an element to the middle of the screen, wait until it no longer moves, and return its box."""
    spot.evaluate("e => e.scrollIntoView({block: 'center'})")
    before, deadline = None, time.monotonic() + PATIENCE
    while not (box := spot.bounding_box()) or box != before:
        assert time.monotonic() < deadline, f"{spot} still moves: {before} -> {box}"
        before = box
        spot.page.wait_for_timeout(200)
    return box


def click_mark(page: Any, spot: Any) -> None:
    """Click the middle of one mark of a figure, once the figure is at rest."""
    spot.wait_for(state="attached")
    at_rest(page)
    box = still_box(spot)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def click_until(page: Any, click: Callable[[], None], selector: str, pattern: str) -> None:
    """Click a figure that is redrawn now and then until some element's text matches a JavaScript pattern.

    Plotly reports no click on a mark that is drawn anew between the move of the mouse and its press.
    """
    from playwright.sync_api import TimeoutError as Late

    for last in range(PATIENCE // 20, -1, -1):
        click()
        try:
            page.wait_for_function(_MATCHES, arg=[selector, pattern], polling=200, timeout=20_000)
            return
        except Late:
            if not last:
                raise


def chart_mark(page: Any, chart: int, mark: str = ".scatterlayer .point", which: int = 0) -> Any:
    """Return one mark of the page's n-th plotly chart."""
    return page.locator(".js-plotly-plot").nth(chart).locator(mark).nth(which)


_PICTURES = {  # file -> address, text that shows when the page is ready, height
    "curves": ("curves", "18 of 18 points on 597 images: done", 1080),
    "learn": ("learn", "Share and reproduce", 1400),
    "importance": ("importance", "Share and reproduce", 1400),
    "transport": ("transport?arrange=target", "Share and reproduce", 1400),
    "recovery": ("recovery?recovery_merge=drop", "points on 597 images: done", 1500),
    "sensitivity": ("sensitivity?group=layer2.0.conv2&cell=50", ", measured", 1400),
    "training_lab": ("training_lab?model=digits-vgg&method=sdprun&lab_reach=1.7", "trained in", 1500),
    "landscape": ("landscape", "All computed", 1400),
    "export": ("export", "All computed", 1400),
}
_ASKED = {
    "recovery": "Recover",
    "landscape": "Compute all",
    "export": "Prune network",
    "training_lab": "Train",
}  # button to press on pages that compute nothing by themselves

_THEN = {"export": "Compute remaining"}  # button to press after the first result


def main(folder: str, *only: str) -> None:
    with serving() as address, chromium() as browser:
        for name in only or _PICTURES:
            path, ready, height = _PICTURES[name]
            page = new_page(browser, viewport={"width": 1400, "height": height})
            page.goto(f"{address}/{path}")
            if name in _ASKED:
                page.get_by_test_id("stButton").get_by_role("button", name=_ASKED[name]).click()
            if name in _THEN:
                page.get_by_role("button", name=_THEN[name]).click()
            page.get_by_text(ready).first.wait_for()
            page.wait_for_timeout(3000)
            page.screenshot(path=Path(folder) / f"{name}.png")
            page.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
