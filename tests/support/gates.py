"""Work that waits until a test lets it go on."""

import time
from collections.abc import Callable, Iterator
from threading import Event, Semaphore

from intrafusion.runtime.cancellation import checkpoint

PATIENCE = 10  # seconds that no test waits for, unless it fails


class Gate:
    """Work whose results come when the test lets them, and that can be stopped at any time."""

    def __init__(self) -> None:
        self.results = Semaphore(0)

    def __call__(self) -> Iterator[int]:
        for number in range(100):
            while not self.results.acquire(timeout=0.002):
                checkpoint()
            yield number


def until(condition: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + PATIENCE, Event()
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        pause.wait(0.005)
