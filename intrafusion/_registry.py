"""Registries: a criterion, merge, solver, recovery or trainer is one function, registered under its name.

The pages, the command line and the parametrised tests read these tables, so adding a method is adding one function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from intrafusion.errors import IntrafusionError


@dataclass(frozen=True)
class Entry:
    """One registered function and what a person needs to know before choosing it."""

    name: str
    function: Callable[..., Any]
    summary: str
    paper: str
    needs: str  # "nothing", "images" or "labels"
    fit: Callable[..., None] | None = None  # of a merge: what it does to the network once it is cut down
    transports: bool = True  # of a merge: whether it asks where channels move, not only which stay
    knobs: tuple[str, ...] = ()  # the fields of a spec that this one reads, and others of its kind do not
    reconstructed: str = ""  # from what, or in what, where its source does not say: "from the abstract"
    differs: str = ""  # where it is not as in its source, in words

    @property
    def told(self) -> str:
        """The summary, with what of it is reconstructed."""
        return f"{self.summary} (reconstructed {self.reconstructed})" if self.reconstructed else self.summary

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Registry(dict[str, Entry]):
    """Name -> Entry. Asking for a name that is not there lists the names that are."""

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
        """Decorator that files a function under `name`."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self[name] = Entry(name, function, summary, paper, needs, fit, transports, knobs, reconstructed, differs)
            return function

        return add

    def listed(self) -> str:
        """The names, in one line, and which of them are reconstructed."""
        return ", ".join(f"{name} (reconstructed)" if entry.reconstructed else name for name, entry in self.items())

    def __missing__(self, name: str) -> Entry:
        raise IntrafusionError(f"unknown {self.kind} {name!r}: choose one of {', '.join(self) or '(none yet)'}")


CRITERIA = Registry("criterion")
MERGES = Registry("merge")
SOLVERS = Registry("solver")
RECOVERIES = Registry("recovery")
TRAINERS = Registry("trainer")
_ALL = {registry.kind: registry for registry in (CRITERIA, MERGES, SOLVERS, RECOVERIES, TRAINERS)}


def registry(kind: str) -> Registry:
    """The registry of one kind: "criterion", "merge", "solver", "recovery" or "trainer".

    Raises IntrafusionError for any other kind.
    """
    if kind not in _ALL:
        raise IntrafusionError(f"unknown registry {kind!r}: choose one of {', '.join(_ALL)}")
    return _ALL[kind]
