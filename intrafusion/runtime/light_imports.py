"""Import a library without others that it would import, but that nothing here makes it use."""

import importlib
import sys
import threading
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any


def import_without(library: str, *unused: str) -> ModuleType:
    """Import a library that treats others as optional, as if those were not installed; they remain importable elsewhere.

    Torch-Pruning imports timm to count operations, POT imports scikit-learn and networkx to cluster: seconds in each process.
    """
    if library in sys.modules:
        return importlib.import_module(library)
    finder = _Hiding(unused)
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(library)
    finally:
        sys.meta_path.remove(finder)


class _Hiding(MetaPathFinder):
    """Lets the thread that makes it find none of these libraries, while other threads import what they like."""

    def __init__(self, names: tuple[str, ...]):
        self.names, self.thread = names, threading.get_ident()

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] in self.names and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"{name} is not needed here", name=name)
