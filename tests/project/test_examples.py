"""The examples of docstrings print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest
from places import ROOT

import intrafusion as itf

WITH_EXAMPLES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in sorted(Path(itf.__file__).parent.rglob("*.py"))
    if ">>> " in file.read_text()
]
MAIN = """load_model load_data find_groups fold score plan prune evaluate open_session grid sweep expand mask similarity_loss"""


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_print_what_they_say(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", MAIN.split())
def test_the_main_functions_have_one(name):
    assert ">>> " in getattr(itf, name).__doc__
