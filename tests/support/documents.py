"""Reads Markdown as tests need it: headings, links, code blocks, tables."""

import re
from pathlib import Path

from places import ROOT

_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def snippets(path: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return [text for _, of, text in _BLOCK.findall(path.read_text()) if of == language]


def prose(path: Path) -> str:
    """The text without its code blocks and code spans."""
    return re.sub(r"`[^`\n]+`", "", _BLOCK.sub("", path.read_text()))


def anchors(path: Path) -> list[str]:
    """What a link may name behind #, as GitHub makes it of the headings."""
    titles = re.findall(r"^#+ (.+)$", _BLOCK.sub("", path.read_text()), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def links(path: Path) -> list[str]:
    """The targets of links and pictures, those of other sites apart."""
    return [target for target in _LINK.findall(_BLOCK.sub("", path.read_text())) if "://" not in target]


def broken(path: Path) -> list[str]:
    """The links that lead to no file of the project, or to no heading of one."""
    wrong = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        known = file.is_relative_to(ROOT) and file.is_file()
        if not known or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


def table(path: Path, first: str) -> list[list[str]]:
    """The cells of the table whose first column has this name, a list for each row."""
    lines = path.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows
