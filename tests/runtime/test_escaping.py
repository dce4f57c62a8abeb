"""Text that a stranger may have written is shown as the text it is: in Markdown, in pictures, in tables."""

import argparse
import csv as read
import io
import re

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from intrafusion.cli.studies import _export
from intrafusion.reporting.figures._rows import name_rows
from intrafusion.reporting.figures.output_distance import class_bars
from intrafusion.reporting.figures.theme import LIGHT, figure
from intrafusion.reporting.report import _table
from intrafusion.runtime.escaping import block, cell, code, csv, hover, markdown, sentence
from intrafusion.studies.output_distance import Outputs

HOSTILE = [
    "![b](http://127.0.0.1:9/b.png)", "[log in](http://evil.example/)", "<img src=x onerror=alert(1)>", "<a href='//x'>y</a>",
    "$x$", "`x`", "**b** _i_ ~~s~~", "# head", "> quote", "| a | b |", ":material/home:", ":red[x]", ":smile:",
    "a@evil.example", "__init__", "a__b__c_", "http://evil.example/x", "www.evil.example", "a\nb\n\n# c", "x\u202ey",
    "&lt;b&gt;", "[x]: http://evil.example", "%{customdata}", "``` x", "\\*x\\*", "`` [a](b) `", "=cmd|' /C calc'!A0",
]  # fmt: skip
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def parts(text: str) -> set[str]:
    """The kinds of Markdown in a text, but for plain text itself."""
    found = {inner.type for token in PARSER.parse(text) for inner in token.children or ()}
    return found | {token.type for token in PARSER.parse(text)} - {"paragraph_open", "paragraph_close", "inline"}


def is_plain(text: str) -> bool:
    return parts(text) <= {"text", "inline", "paragraph_open", "paragraph_close"}


def extended(text: str) -> list[str]:
    """What Streamlit makes of text without any markup: icons, emoji, addresses."""
    return re.findall(r":[\w+/-]+:|:\w+\[|https?://|\bwww\.|\w@\w", text, re.IGNORECASE)


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_makes_nothing_of_it(text):
    for shown in (markdown(text), f"Highest for {markdown(text)} (0.5)"):
        assert is_plain(shown), PARSER.render(shown)
        assert not extended(shown)
        assert "\u202e" not in shown
        assert "\n" not in shown


@given(st.text(alphabet="a *_`[]()<>!#$~|\\:/@&;1.\n-+={}", max_size=30))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_sentence_makes_code_alone(text):
    assert parts(f"x {sentence(text)} y") <= {"text", "code_inline", "inline", "paragraph_open", "paragraph_close"}
    assert is_plain(f"x {markdown(text)} y")


def test_a_sentence_keeps_its_commands():
    assert sentence("no [x]: run `own data x_y [z]`") == "no \\[x\\]: run `own data x_y [z]`"


@pytest.mark.parametrize("text", ["a\n```\n![x](y)", "````", ""])
def test_no_line_ends_a_block_of_code(text):
    assert [token.type for token in PARSER.parse(block(text))] == ["fence"]


def test_code_is_short():
    assert code("x" * 99) == f"` {'x' * 39}… `"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_table_of_a_report_has_it_in_one_cell(text):
    tokens = PARSER.parse(_table([("group", "before"), (text, "1")]))
    cells = [token for place, token in enumerate(tokens) if tokens[place - 1].type in ("th_open", "td_open")]
    assert len(cells) == 4
    assert {inner.type for token in cells for inner in token.children or ()} == {"text"}


@pytest.mark.parametrize("text", HOSTILE)
def test_pictures_make_nothing_of_it(text):
    assert not re.search(r"[<>$\n\u202e]|%\{", hover(text))


@pytest.mark.parametrize("value", ["=1+1", "+1", "-x", "@x", "\tx", "\rx", "\x00=x", "\n=x"])
def test_a_formula_is_text_in_a_table(value):
    assert str(cell(value)).startswith("'")
    table = pd.DataFrame({value: [value], "n": [-1.5], "of": ["plain"]})
    head, row = [*read.reader(io.StringIO(csv(table)))]
    assert head[0][0] == row[0][0] == "'"
    assert (head[1:], row[1:]) == (["n", "of"], ["-1.5", "plain"])


def test_texts_in_parquet_are_as_they_are(tmp_path):
    file = tmp_path / "t.parquet"
    _export([{"model": text, "groups": [text, "=1+1"]} for text in HOSTILE], "", argparse.Namespace(out=file))
    table = pd.read_parquet(file)
    assert [*table["model"]] == HOSTILE
    assert [*table["groups"]] == [f"{text}+=1+1" for text in HOSTILE]


def test_names_in_pictures_are_text():
    names = tuple(f"<b>{number}</b>" for number in range(3))
    logits = {name: torch.rand(6, 3) for name in ("dense", "dropped", "fused")}
    drawn = class_bars(Outputs(logits, torch.tensor([0, 1, 2] * 2), names))
    assert list(drawn.data[0].x) == [hover(name) for name in names]
    rows = figure("x", 100, LIGHT)
    name_rows(rows, names)
    assert "<b>" not in rows.to_json()
