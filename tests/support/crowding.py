"""A crowd of sessions on a public dashboard, and a newcomer whose wait for a first result is measured."""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

from visiting import PATIENCE, Server, visitor

CROWD, NEW = "digits-resnet", "digits-mlp"
ASKED = list(itertools.product(("l1", "l2", "random", "lamp", "fpgm"), ("L1", "L2", "cosine"), range(10, 50, 5)))


@contextlib.contextmanager
def crowd(server: Server, sessions: int, addresses: int, at_once: int) -> Iterator[None]:
    """Run short sessions from several addresses, `at_once` at a time. Each opens the curves, which starts a job, and leaves."""
    numbers, over = itertools.count(), threading.Event()

    def come() -> None:
        while not over.is_set() and (number := next(numbers)) < sessions:
            with contextlib.suppress(Exception), visitor(server, f"127.0.1.{number % addresses + 1}") as reader:
                criterion, distance, percent = ASKED[number % len(ASKED)]
                rest = "".join(f"&sparsities={percent + more}" for more in range(0, 50, 5))
                reader.open(f"model={CROWD}&criteria={criterion}&distance={distance}{rest}", page="curves")

    comers = [threading.Thread(target=come) for _ in range(at_once)]
    for comer in comers:
        comer.start()
    try:
        yield
    finally:
        over.set()
        for comer in comers:
            comer.join()


def newcomer(server: Server, percent: int) -> tuple[float, float]:
    """Return the seconds until a newcomer from another address has the page, and until its first point is measured."""
    before = len(_points(server))
    began = time.monotonic()
    with visitor(server, "127.0.2.1") as reader:
        reader.open(f"model={NEW}&sparsities={percent}", page="curves")
        page = time.monotonic() - began
        while len(_points(server)) == before:
            assert time.monotonic() < began + PATIENCE, reader.messages[-3:]
            time.sleep(0.05)
    return page, time.monotonic() - began


def _points(server: Server) -> list[dict]:
    return [one for one in server.events() if one["event"] == "point" and one["model"] == NEW]
