"""The README is short, its commands and its snippet run, and its figures and lists are those of the project."""

import re
import shlex
import subprocess

import pytest
from documents import anchors, broken, snippets, table
from places import ROOT

import intrafusion as itf
from intrafusion.cli.main import main
from pages.shared.navigation import _PAGES

FILE = ROOT / "README.md"
README = FILE.read_text()
SET_UP = "python3 -m venv .venv && . .venv/bin/activate && pip install -q -r requirements.txt"


def test_it_is_short():
    assert len(README.splitlines()) <= 200


def test_the_two_set_up_commands_are_each_one_line():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert commands == [f"{SET_UP} && streamlit run app.py", f"{SET_UP} -e '.[test]' && python -m pytest -n 3"]


def test_ci_finds_the_test_command():
    script = re.search(r"^command=\$\((sed .*) README\.md\)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)[1]
    found = subprocess.run([*shlex.split(script), str(FILE)], capture_output=True, text=True, check=True).stdout
    assert found == f"{SET_UP} -e '.[test]' && python -m pytest -n 3\n"


def test_links_and_pictures_lead_somewhere():
    assert broken(FILE) == []
    assert {name for name in anchors(FILE) if name} >= {"install", "quickstart", "limits", "citation"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_snippet_runs(device, capsys):
    (snippet,) = snippets(FILE, "python")
    exec(snippet.replace('load_model("digits-vgg")', f'load_model("digits-vgg", device="{device}")'), {})
    dropped, fused = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines())
    assert fused > dropped + 0.2


def test_the_three_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = [text for text in snippets(FILE, "bash") if "intrafusion groups --model digits" in text]
    lines = block.splitlines()
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "intrafusion"]
        assert main(words[3:]) == 0, capsys.readouterr().err
    assert (tmp_path / "small" / "model.onnx").exists()


@pytest.mark.parametrize("kind", ["criterion", "merge", "recovery", "trainer", "solver"])
def test_the_numbers_of_methods_are_those_of_the_registries(kind):
    label = {"criterion": "criteria", "recovery": "recoveries", "trainer": "training methods"}.get(kind, f"{kind}s")
    row = next(row for row in table(FILE, "kind") if label in row[0])
    assert int(row[1]) == len(itf.registry(kind))
    assert set(re.findall(r"`([^`]+)`", row[2])) <= set(itf.registry(kind))


def test_every_page_has_its_row_of_at_most_twelve_words():
    rows = table(FILE, "page")
    assert [row[0] for row in rows] == [name.replace("_", " ").capitalize() for name, _, _ in _PAGES]
    assert all(len(row[1].split()) <= 12 for row in rows)


def test_the_headline_figures_are_those_of_the_results():
    results = (ROOT / "assets" / "docs" / "results.md").read_text().splitlines()
    rows = [line for line in README.splitlines() if line.startswith("| `") and line.count("|") == 8]
    assert len(rows) == 5
    assert set(rows) <= set(results)
