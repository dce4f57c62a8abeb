"""Import a library without others that it would import, but that nothing here makes it use."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from typing import Any


@contextmanager
def without(*libraries: str) -> Iterator[None]:
    """Let this thread import, within the block, as if these libraries were not installed, unless they are imported already.

    Torch-Pruning imports timm to count operations, and POT imports scikit-learn and networkx to cluster, which takes each
    process seconds. Both treat them as optional.
    """
    finder = _Hiding(libraries)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Hiding(MetaPathFinder):
    """Lets the thread that makes it find none of these libraries, while other threads import what they like."""

    def __init__(self, names: tuple[str, ...]):
        self.names, self.thread = names, threading.get_ident()

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] in self.names and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"{name} is not needed here", name=name)
