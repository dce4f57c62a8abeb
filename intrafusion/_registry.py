"""Registries of methods: each criterion, merge, solver, recovery and trainer is one function, registered under its name.

The pages, the command line and the parametrised tests read these tables, so adding a method only takes adding a function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from intrafusion.errors import unknown


@dataclass(frozen=True)
class Entry:
    """A registered function and what a user needs to know before choosing it."""

    name: str
    function: Callable[..., Any]
    summary: str
    paper: str
    needs: str  # "nothing", "images" or "labels"
    fit: Callable[..., None] | None = None  # merges only: applied to the network after it is cut
    transports: bool = True  # merges only: needs the transport plan, not just the kept channels
    knobs: tuple[str, ...] = ()  # spec fields that only some methods of this kind read
    reconstructed: str = ""  # what was reconstructed, or from what: "from the abstract"
    differs: str = ""  # how it differs from its source, as text

    @property
    def told(self) -> str:
        """The summary, with a note on what was reconstructed."""
        return f"{self.summary} (reconstructed {self.reconstructed})" if self.reconstructed else self.summary

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Registry(dict[str, Entry]):
    """Mapping from name to Entry. Looking up an unknown name raises IntrafusionError, which lists the known names."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(
        self,
        name: str,
        summary: str,
        paper: str = "",
        needs: str = "nothing",
        fit: Callable[..., None] | None = None,
        transports: bool = True,
        knobs: tuple[str, ...] = (),
        reconstructed: str = "",
        differs: str = "",
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that registers a function under `name`."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self[name] = Entry(name, function, summary, paper, needs, fit, transports, knobs, reconstructed, differs)
            return function

        return add

    def listed(self) -> str:
        """Return the names on one line, marking those that are reconstructed."""
        return ", ".join(f"{name} (reconstructed)" if entry.reconstructed else name for name, entry in self.items())

    def __missing__(self, name: str) -> Entry:
        raise unknown(self.kind, name, self)


CRITERIA = Registry("criterion")
MERGES = Registry("merge")
SOLVERS = Registry("solver")
RECOVERIES = Registry("recovery")
TRAINERS = Registry("trainer")
_ALL = {registry.kind: registry for registry in (CRITERIA, MERGES, SOLVERS, RECOVERIES, TRAINERS)}


def registry(kind: str) -> Registry:
    """Return the registry of one kind: "criterion", "merge", "solver", "recovery" or "trainer".

    Raises IntrafusionError for any other kind.
    """
    if kind not in _ALL:
        raise unknown("registry", kind, _ALL)
    return _ALL[kind]
