"""Helpers that replace the card of a kept file, or damage the file in typical ways."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def card_in(path: Path) -> dict:
    """Return the card in a file's metadata."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["intrafusion.card"])


def set_card(path: Path, text: str | None) -> None:
    """Replace a file's card by another text, or remove it if the text is None."""
    save_file(load_file(path), path, None if text is None else {"intrafusion.card": text})


def made_older(path: Path) -> None:
    """Convert a file to an older version, whose card is in a separate file beside it."""
    path.with_suffix(".json").write_text(json.dumps(card_in(path)))
    set_card(path, None)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": _cut,
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "a folder": _folder,
}
CARDS = {
    "no JSON": "no json",
    "a list": "[]",
    "no numbers": '{"mean": "x"}',
    "nulls": '{"mean": null, "details": null}',
    "deep": "[" * 100_000,
    "no architecture": "{}",
    "another architecture": '{"details": {"architecture": "nope"}}',
    "a number for an architecture": '{"details": {"architecture": 3}}',
}
