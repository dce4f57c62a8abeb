"""Load test with a class of visitors: browser sessions that walk all pages and move controls on one server.

python tests/benchmarks/bench_load.py [--visitors 20] [--seconds 300] [--think 13] [--beside 3] [--switches 200] [--no-memory]

Each visitor has its own model, group and sparsity, and after every move the page must show them. Values of another visitor
are counted as mixed. A move is timed from the key press to the page's last line. Visitors arrive within a fifth of the time.
When all have arrived, each walks for the whole time and pauses for `think` seconds on average before it opens the next page
or moves a slider; two of them run studies. Memory is the server's resident set: before, when a few first visitors have warmed
its caches, and after, when all have left and their sessions are forgotten. Then a few visitors come while a long study
computes, for half the time and with a quarter of the pauses. Finally one session switches pages.
Exits with 1 if a page showed an error or another visitor's values, or did not answer.
"""

import argparse
import asyncio
import os
import random
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from dashboard import CHROMIUM, FLAGS, serving

from intrafusion import registry

GROUPS = {
    "digits-resnet": ("conv1", "layer1.0.conv1", "layer2.0.conv1", "layer3.1.conv1"),
    "digits-vgg": ("features.0", "features.3", "features.7", "features.10"),
    "digits-mlp": ("1", "3"),
}
PATIENCE = 90  # seconds after which a page or a move counts as failed
FORGOTTEN = 130  # seconds after which Streamlit forgets a closed session, with a margin
_ALERTS = '[data-testid="stException"], [data-testid="stAlertContentError"]'
_IDLE = '[data-testid="stApp"][data-test-script-state="notRunning"]'
_LOOK = f"""() => {{
    const wrong = document.querySelector('{_ALERTS}');
    const link = [...document.querySelectorAll('[data-testid="stMain"] code')].find(e => e.textContent.startsWith('http'));
    return [wrong ? wrong.innerText : '', link ? link.textContent : ''] }}"""  # the error text, and the page's permalink


@dataclass
class Tally:
    """Measurements of all visitors.

    opens, switches: seconds. moves: seconds by page. cores: CPU cores used, by kind of process.
    """

    opens: list[float] = field(default_factory=list)
    switches: list[float] = field(default_factory=list)
    moves: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    wrong: Counter[str] = field(default_factory=Counter)
    cores: dict[str, float] = field(default_factory=dict)

    def told(self) -> str:
        moves = [move for page in self.moves.values() for move in page]
        timed = (("slider moves", moves), *((f"    {page}", self.moves[page]) for page in sorted(self.moves)))
        timed = (*timed, ("page switches", self.switches), ("first pages", self.opens))
        said = [f"{what}: {spread(seconds)}" for what, seconds in timed if seconds]
        said.append(f"exceptions, mixed values, time-outs: {dict(self.wrong) or 'none'}")
        if self.cores:
            said.append(f"cores taken: {', '.join(f'{kind} {cores:.2f}' for kind, cores in self.cores.items())}")
        return "\n".join(said)


def spread(seconds: list[float]) -> str:
    if len(seconds) < 2:
        return f"{len(seconds)}"
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return f"{len(seconds):,}, median {cuts[9]:.2f} s, 95 % within {cuts[18]:.2f} s, longest {max(seconds):.2f} s"


class Visitor:
    """One browser session with its own settings."""

    def __init__(self, number: int, page: Any, address: str, think: float, tally: Tally):
        self.page, self.address, self.think, self.tally = page, address, think, tally
        self.random = random.Random(number)
        self.model = list(GROUPS)[number % len(GROUPS)]
        self.group = self.random.choice(GROUPS[self.model])
        self.studies = number < 2
        page.set_default_timeout(PATIENCE * 1000)

    async def open(self) -> None:
        sparsity = self.random.randrange(20, 60)
        await self.page.goto(f"{self.address}/transport?model={self.model}&group={self.group}&sparsity={sparsity}")
        await self._link_where(lambda link: self._is_mine(link))

    async def come(self, within: float) -> None:
        await asyncio.sleep(self.random.uniform(0, within))
        began = time.monotonic()
        await self.open()
        self.tally.opens.append(time.monotonic() - began)

    async def walk(self, seconds: float) -> None:
        """Visit the pages in random order, and move a control on each, for this many seconds."""
        until = time.monotonic() + seconds
        await self.pause()
        names = await self.page.locator('[data-testid="stSidebarNavLink"]').count()
        while time.monotonic() < until:
            for place in self.random.sample(range(names), names):
                await self.turn_to(place)
                await self.pause()
                if time.monotonic() < until:
                    await self.move()
                    await self.pause()
                if time.monotonic() >= until:
                    return

    async def turn_to(self, place: int) -> None:
        link = self.page.locator('[data-testid="stSidebarNavLink"]').nth(place)
        name = urlsplit(await link.get_attribute("href") or "").path.strip("/")
        began = time.monotonic()
        await link.click()
        if await self._link_where(lambda link: urlsplit(link).path.strip("/") == name and self._is_mine(link), name):
            self.tally.switches.append(time.monotonic() - began)
        if self.studies and name == "sensitivity":
            button = self.page.get_by_role("button", name="Run study")
            if await button.count() and await button.is_enabled():
                await button.click()

    async def pause(self) -> None:
        """Pause, then wait until the page is idle: a key press while a slider is replaced would be lost."""
        await asyncio.sleep(self.random.uniform(0.5, 1.5) * self.think)
        await self.page.locator(_IDLE).wait_for()

    async def move(self) -> None:
        sliders = self.page.get_by_test_id("stMain").get_by_role("slider")
        if not await sliders.count():
            return
        name = urlsplit(self.page.url).path.strip("/")
        slider = sliders.nth(1 if name == "learn" else 0)
        before = settings((await self.page.evaluate(_LOOK))[1])
        value, most = (int(float(number)) for number in await slider.evaluate("e => [e.value, e.max]"))
        key = "ArrowLeft" if value >= most or (self.random.random() < 0.5 and value > most / 3) else "ArrowRight"
        await slider.focus()
        began = time.monotonic()
        await slider.press(key)

        def is_moved(link: str) -> bool:
            after = settings(link)
            return after != before and self._is_mine(link)

        if not await self._link_where(is_moved, name):
            return
        self.tally.moves[name].append(time.monotonic() - began)
        after = settings((await self.page.evaluate(_LOOK))[1])
        changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        if name != "learn" and len(changed - {"channel"}) != 1:  # the default channel follows the sparsity
            self.tally.wrong[f"mixed settings on {name}: {sorted(changed)}"] += 1
        if name == "importance":
            await self._check_title(int(after["sparsity"][0]))

    async def _check_title(self, percent: int) -> None:
        """Check that the picture also shows this visitor's sparsity, and count it as mixed if not."""
        title = await self.page.locator(".js-plotly-plot .gtitle").first.text_content() or ""
        found = re.match(r"(\d+) of (\d+) channels are kept", title)
        if not found or abs(int(found[1]) - int(found[2]) * (100 - percent) / 100) > 1:
            self.tally.wrong[f"mixed picture: {title!r} at {percent} %"] += 1

    def _is_mine(self, link: str) -> bool:
        found = settings(link)
        return found.get("model") == [self.model] and found.get("group") == [self.group]

    async def _link_where(self, holds: Any, doing: str = "opening") -> bool:
        """Wait until the page's permalink satisfies `holds`. On an error or a time-out, count it and return False."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            wrong, link = await self.page.evaluate(_LOOK)
            if wrong:
                self.tally.wrong[f"error on {doing}: {wrong[:200]}"] += 1
                await self.page.reload()
                return False
            if holds(link):
                return True
            await asyncio.sleep(0.1)
        self.tally.wrong[f"time-out of {PATIENCE} s: {doing} of {self.model}, {self.group}"] += 1
        await self.page.reload()
        return False


def settings(link: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in parse_qsl(urlsplit(link).query):
        found.setdefault(key, []).append(value)
    return found


async def visit(browser: Any, address: str, numbers: range, seconds: float, think: float) -> Tally:
    """Run these visitors concurrently: they arrive, each walks for `seconds`, and they leave."""
    tally = Tally()
    looks: dict[str, Any] = {"viewport": {"width": 1200, "height": 800}, "reduced_motion": "reduce"}
    contexts = [await browser.new_context(**looks) for _ in numbers]
    visitors = [
        Visitor(number, await context.new_page(), address, think, tally)
        for number, context in zip(numbers, contexts, strict=True)
    ]
    await asyncio.gather(*(visitor.come(seconds / 5) for visitor in visitors))
    began, before = time.monotonic(), computed()
    await asyncio.gather(*(visitor.walk(seconds) for visitor in visitors))
    spent, seconds_gone = computed(), time.monotonic() - began
    tally.cores = {kind: (spent[kind] - before[kind]) / seconds_gone for kind in sorted(spent)}
    for context in contexts:
        await context.close()
    return tally


async def visit_beside_study(browser: Any, address: str, numbers: range, seconds: float, think: float) -> Tally:
    """Run these visitors concurrently while a study of thousands of points, started by none of them, computes."""
    page = await browser.new_page()
    many = [("study_merges", merge) for merge in registry("merge")] + [("study_sparsities", n) for n in range(5, 100, 5)]
    await page.goto(f"{address}/sensitivity?{urlencode(many)}")
    await page.get_by_role("button", name=re.compile("Run study|Continue")).click()
    stop = page.get_by_role("button", name="Cancel").first
    await stop.wait_for()
    tally = await visit(browser, address, numbers, seconds, think)
    if not await stop.count():
        tally.wrong["the study ended before the visitors left"] += 1
    await stop.click()
    await page.get_by_text("cancelled;").wait_for()
    await page.close()
    return tally


async def switch(browser: Any, address: str, times: int) -> tuple[Tally, float, float]:
    """Switch pages in one session. Return the tally, and the server's memory in MB after the first round and at the end."""
    tally, page = Tally(), await browser.new_page(viewport={"width": 1400, "height": 1000})
    visitor = Visitor(0, page, address, 0.0, tally)
    visitor.studies = False
    await visitor.open()
    count = await page.locator('[data-testid="stSidebarNavLink"]').count()
    before = 0.0
    for turn in range(times + count):
        if turn == count:
            before = resident()
        await visitor.turn_to(turn % count)
    after = resident()
    await page.close()
    return tally, before, after


def server() -> int:
    """Return the process id of the dashboard, a child of this process."""
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"streamlit" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    raise SystemExit("no dashboard runs")


def resident() -> float:
    """Return the server's resident set in MB."""
    pages = int(Path(f"/proc/{server()}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def computed() -> Counter[str]:
    """Return the CPU seconds used by each kind of process: server, tabs, rest of Chromium, and this driver."""
    spent: Counter[str] = Counter()
    for process in descendants(os.getpid()):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:  # the process has just ended
            continue
        if b"streamlit" in command:
            kind = "server"
        elif b"--type=renderer" in command:
            kind = "tabs"
        else:
            kind = "browser" if b"chromium" in command else "driver"
        spent[kind] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


def descendants(process: int) -> list[int]:
    """Return the id of this process and the ids of all its descendants."""
    found = [process]
    for tasks in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [one for child in tasks.read_text().split() for one in descendants(int(child))]
        except OSError:
            continue
    return found


async def settled(browser: Any, address: str) -> float:
    """Return the server's memory in MB once closed sessions are forgotten. A new visitor triggers their removal."""
    await asyncio.sleep(FORGOTTEN)
    await visit(browser, address, range(1), 1, 0.1)
    await asyncio.sleep(5)
    return resident()


async def main(visitors: int, seconds: float, think: float, beside: int, switches: int, memory: bool) -> int:
    from playwright.async_api import async_playwright

    with serving() as address:
        async with async_playwright() as play:
            browser = await play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            met = []
            if visitors:
                met.append(await together(browser, address, visitors, seconds, think, memory))
            if beside:
                met.append(await visit_beside_study(browser, address, range(2, 2 + beside), seconds / 2, think / 4))
                print(f"{beside} visitors beside a study\n{met[-1].told()}", flush=True)
            if switches:
                tally, before, after = await switch(browser, address, switches)
                print(f"{switches} page switches in one session\n{tally.told()}")
                print(f"server: {before:,.0f} MB before, {after:,.0f} MB after ({after / before - 1:+.1%})")
                met.append(tally)
            await browser.close()
    return int(any(tally.wrong for tally in met))


async def together(browser: Any, address: str, visitors: int, seconds: float, think: float, memory: bool) -> Tally:
    """Warm the server with a few visitors, then run all concurrently. Print their measurements and the server's memory."""
    before = after = 0.0
    if memory:
        await visit(browser, address, range(2 * len(GROUPS)), min(60.0, seconds), think / 3)
        before = await settled(browser, address)
    tally = await visit(browser, address, range(visitors), seconds, think)
    peak = resident()
    print(f"{visitors} visitors, {seconds:.0f} s, thinking {think} s\n{tally.told()}", flush=True)
    if memory:
        after = await settled(browser, address)
        print(f"server: {before:,.0f} MB before, {peak:,.0f} with them, {after:,.0f} MB after ({after / before - 1:+.1%})")
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("visitors", 20), ("seconds", 300.0), ("think", 13.0), ("beside", 3), ("switches", 200)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    given = vars(parser.parse_args())
    with TemporaryDirectory() as folder:  # keep the user's own files and store untouched
        os.environ |= {"INTRAFUSION_HOME": folder, "INTRAFUSION_STORE": f"{folder}/studies.sqlite"}
        sys.exit(asyncio.run(main(**given)))
