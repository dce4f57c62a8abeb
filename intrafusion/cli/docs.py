"""The command `docs`, which lists or prints the project's documents, and the documents' tables from the registries."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from intrafusion._registry import registry
from intrafusion.cli.options import HELP, add_command, show
from intrafusion.errors import IntrafusionError, unknown
from intrafusion.options import options_of
from intrafusion.runtime.paths import ASSETS
from intrafusion.spec import PLAN_FIELDS, RECOVERY_FIELDS, PruneSpec

DOCS = ASSETS / "docs"
NAMES = (
    "getting-started", "methods", "results", "studies", "your-network", "models-and-data", "export-and-speed", "serving",
    "limits", "development",
)  # fmt: skip
_HEADING = re.compile(r"^(#{1,6}) (.+)$")
_TABLE = re.compile(r"(?<=<!-- table: )(\w+) -->\n.*?(?=<!-- end -->)", re.DOTALL)
_COMMENT = re.compile(r"^<!--.*-->\n", re.MULTILINE)


@dataclass(frozen=True)
class Heading:
    """A heading of a document. level: 1 for the title. line: its index among the document's lines."""

    document: str
    level: int
    title: str
    line: int

    @property
    def anchor(self) -> str:
        """The part of a link after #, as on GitHub."""
        return re.sub(r"[^\w\- ]", "", self.title.lower()).replace(" ", "-")


@cache
def document(name: str) -> str:
    """Return the Markdown of a document. Raises IntrafusionError for an unknown name."""
    if name not in NAMES:
        raise unknown("document", name, NAMES)
    return _COMMENT.sub("", (DOCS / f"{name}.md").read_text(encoding="utf-8"))


@cache
def headings(name: str) -> tuple[Heading, ...]:
    """Return the headings of a document, in order. Raises IntrafusionError for an unknown name."""
    found, is_code = [], False
    for number, line in enumerate(document(name).splitlines()):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code and (match := _HEADING.match(line)):
            found.append(Heading(name, len(match[1]), match[2], number))
    return tuple(found)


def section(name: str, title: str) -> str:
    """Return the Markdown of one heading and the text below it, up to the next heading of its level or above.

    Raises IntrafusionError for an unknown document or heading.
    """
    known = headings(name)
    heading = next((one for one in known if one.title == title), None)
    if heading is None:
        raise IntrafusionError(f"document {name} has no heading {title!r}")
    end = next((one.line for one in known if one.line > heading.line and one.level <= heading.level), None)
    return "\n".join(document(name).splitlines()[heading.line : end])


def with_tables(text: str) -> str:
    """Return a document's Markdown with the tables of methods, each between two comments, regenerated from the registries."""
    return _TABLE.sub(lambda match: f"{match[1]} -->\n{_TABLES[match[1]]()}\n", text)


def update_tables(path: Path) -> None:
    """Regenerate the tables of methods in a document. Raises IntrafusionError if the file cannot be read or written."""
    try:
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    except UnicodeDecodeError as error:
        raise IntrafusionError(f"cannot update {path}: it is not a text file in UTF-8") from error
    except OSError as error:
        raise IntrafusionError(f"cannot update {path}: {error.strerror}") from error


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of the given cells."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def _methods(kind: str, what: str) -> str:
    rows = [(f"`{name}`", entry.told, entry.needs, entry.paper) for name, entry in registry(kind).items()]
    return _markdown(("name", what, "looks at", "source"), rows)


def _with_settings(kind: str) -> str:
    rows = [(f"`{name}`", e.told, e.paper, _names(e.knobs)) for name, e in registry(kind).items()]
    return _markdown(("name", "what it does", "source", "own settings"), rows)


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _options(names: Sequence[str]) -> str:
    """Return a table of these fields of `PruneSpec`, with the default, the allowed values and the meaning of each."""
    default = PruneSpec()
    rows = [(f"`{name}`", f"`{getattr(default, name)}`", _values(name), HELP[name]) for name in names]
    return _markdown(("option", "default", "values", "meaning"), rows)


def _values(name: str) -> str:
    """Return the choices of an option, or the range of its numbers, as text."""
    if name == "solver":
        return _names(tuple(registry("solver")))
    about = options_of(PruneSpec).get(name)
    if about is None:
        return "a number of images"
    if about.kind in (int, float):
        return about.range_in_words()
    return _names(about.choices or ("True", "False"))


def _differences() -> str:
    """Return a table of differences from the sources; methods of a kind with the same difference share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for kind in ("criterion", "merge", "recovery", "trainer"):
        for name, entry in registry(kind).items():
            if entry.differs:
                rows.setdefault((kind, entry.differs), []).append(name)
    return _markdown(("method", "difference"), [(_names(names), differs) for (_, differs), names in rows.items()])


_TABLES: dict[str, Callable[[], str]] = {
    "criterion": lambda: _methods("criterion", "score of a channel"),
    "merge": lambda: _methods("merge", "what it does"),
    "recovery": lambda: _methods("recovery", "what it does"),
    "trainer": lambda: _with_settings("trainer"),
    "solver": lambda: _with_settings("solver"),
    "transport": lambda: _options(PLAN_FIELDS),
    "recovering": lambda: _options(RECOVERY_FIELDS),
    "differs": _differences,
}


def add_docs(commands: Any) -> argparse.ArgumentParser:
    """Add the command to `commands`, and return its parser."""
    docs = add_command(commands, "docs", "List the documents, or print one", examples=["getting-started"])
    docs.add_argument("name", nargs="?", metavar="NAME", help=f"document to print: {', '.join(NAMES)}")
    docs.set_defaults(command=_docs)
    return docs


def _docs(args: argparse.Namespace) -> None:
    if args.name is None:
        rows = [{"name": name, "title": headings(name)[0].title, "about": _about(name)} for name in NAMES]
        show(rows, args.json, "Documents")
    elif args.json:
        text = document(args.name)
        print(json.dumps({"name": args.name, "title": headings(args.name)[0].title, "text": text}), flush=True)
    else:
        print(document(args.name), end="")


def _about(name: str) -> str:
    """Return the first sentence below a document's title, without markup."""
    paragraph = document(name).split("\n\n")[1].replace("\n", " ")
    return re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", paragraph.split(". ")[0].removesuffix(".")) + "."
