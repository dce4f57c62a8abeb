"""The documents of assets/docs: what they say of methods, options, bounds and paths is what is here, and their code runs."""

import importlib.util
import json
import re
import shlex
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from documents import anchors, broken, prose, snippets, table
from places import ROOT

import intrafusion as itf
from intrafusion.cli import docs
from intrafusion.cli.main import main
from intrafusion.options import CHOICES
from intrafusion.spec import PLAN_FIELDS, RECOVERY_FIELDS

FILES = {name: docs.DOCS / f"{name}.md" for name in docs.NAMES}
KINDS = ("criterion", "merge", "recovery", "trainer")


def test_every_file_is_listed():
    assert {file.stem for file in docs.DOCS.glob("*.md")} == set(docs.NAMES)


@pytest.mark.parametrize("name", FILES)
class TestEveryDocument:
    def test_has_one_title_and_headings_that_differ(self, name):
        found = docs.headings(name)
        assert [one.level for one in found].count(1) == 1
        assert found[0].level == 1
        assert [one.anchor for one in found] == anchors(FILES[name])
        assert len({one.anchor for one in found}) == len(found)

    def test_has_no_broken_link(self, name):
        assert broken(FILES[name]) == []

    def test_has_no_sign_that_a_page_takes_for_more_than_text(self, name):
        assert re.findall(r"\$|<(?!!--)|:[a-z_]+:|(?<= )-{1,2}>(?= )", prose(FILES[name])) == []

    def test_is_the_sum_of_its_sections(self, name):
        parts = [docs.section(name, one.title) for one in docs.headings(name) if one.level == 2]
        text = docs.document(name)
        assert text.endswith("\n".join(parts) + "\n")
        assert docs.section(name, docs.headings(name)[0].title) == text.removesuffix("\n")

    def test_is_installed(self, name):
        patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
        assert any(fnmatch(f"docs/{name}.md", pattern) for pattern in patterns["intrafusion.assets"])


@pytest.mark.parametrize("name", ["getting-started", "studies", "export-and-speed"])
def test_snippets_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTRAFUSION_STORE", str(tmp_path / "studies.sqlite"))
    found = snippets(FILES[name], "python")
    assert found
    for snippet in found:
        exec(snippet, {})


class TestMethods:
    PATH = FILES["methods"]

    def test_tables_are_those_of_the_registries(self):
        text = self.PATH.read_text()
        assert docs.with_tables(text) == text, "run: python -m intrafusion methods --markdown"

    @pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in (*KINDS, "solver") for name in itf.registry(kind)])
    def test_every_method_has_its_row(self, kind, name):
        entry = itf.registry(kind)[name]
        cells = {"criterion": [entry.needs, entry.paper], "merge": [entry.needs, entry.paper]}
        cells["recovery"] = cells["merge"]
        rest = cells.get(kind, [entry.paper, ", ".join(f"`{knob}`" for knob in entry.knobs)])
        line = " | ".join([f"| `{name}`", entry.told.replace("|", "\\|"), *rest]) + " |"
        assert line in self.PATH.read_text().splitlines()

    @pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in itf.registry(kind)])
    def test_every_difference_from_a_source_is_listed(self, kind, name):
        rows = {method: row[1] for row in table(self.PATH, "method") for method in re.findall(r"`([^`]+)`", row[0])}
        assert rows.get(name, "") == itf.registry(kind)[name].differs

    @pytest.mark.parametrize("name", PLAN_FIELDS)
    def test_every_transport_option_and_choice_is_listed(self, name):
        told = docs.section("methods", "Transport options")
        assert [one for one in (name, *CHOICES.get(name, ())) if f"`{one}`" not in told] == []

    def test_options_of_recoveries_are_listed(self):
        told = docs.section("methods", "Recovery")
        assert [name for name in RECOVERY_FIELDS if f"| `{name}` |" not in told] == []

    def test_the_results_have_a_row_for_every_criterion(self):
        path = FILES["results"]
        assert [row[0].strip("`") for row in table(path, "name")] == list(itf.registry("criterion"))


class TestYourNetwork:
    PATH = FILES["your-network"]

    def test_every_command_and_snippet_in_order(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        ran = 0
        for language, text in re.findall(r"```(\w+)\n(.*?)```", self.PATH.read_text(), re.DOTALL):
            if text.startswith("# my_net.py"):
                (tmp_path / "my_net.py").write_text(text)
            elif language == "python":
                exec(text, {})
            else:
                for line in text.splitlines():
                    words = shlex.split(line, comments=True)
                    assert words[:3] == ["python", "-m", "intrafusion"]
                    assert main(words[3:]) == 0, capsys.readouterr().err
                    ran += 1
        sys.modules.pop("my_net", None)
        assert ran == 6
        assert "kept/my-net on 1,797 kept/my-images images" in capsys.readouterr().out

    def test_bounds_are_those_of_the_code(self):
        from intrafusion.data import upload
        from intrafusion.runtime import safe_zip

        bounds = (
            f"{safe_zip.FILE // safe_zip.MIB} MiB",
            f"{upload.PICTURES:,} pictures",
            f"{safe_zip.UNPACKED >> 30} GiB",
            f"{upload.SIDE:,} pixels",
        )
        assert [one for one in bounds if one not in self.PATH.read_text()] == []


class TestDevelopment:
    PATH = FILES["development"]

    def test_the_files_that_it_names_exist(self):
        text = self.PATH.read_text().partition("## Old module names")[0]
        named = set(re.findall(r"`((?:intrafusion|pages|tests|assets|\.ci)/[^`*]*)`", text))
        assert len(named) > 20
        assert [name for name in sorted(named) if not (ROOT / name).exists()] == []

    def test_every_package_has_its_row(self):
        packages = {f"`intrafusion/{file.parent.name}/`" for file in (ROOT / "intrafusion").glob("*/__init__.py")}
        assert packages <= {row[0] for row in table(self.PATH, "package")}

    def test_the_examples_are_the_code(self):
        code = "".join(file.read_text() for file in (ROOT / "intrafusion" / "pruning").rglob("*.py"))
        for snippet in snippets(self.PATH, "python"):
            name = re.search(r"def (\w+)\(", snippet)[1]
            for line in snippet.splitlines():
                if "REGISTER" not in line.upper() and '"drop", ' not in line:
                    assert line.strip().partition("  #")[0] in code, name

    @pytest.mark.parametrize("module", [row[1].strip("`") for row in table(PATH, "old module")])
    def test_the_modules_of_today_exist(self, module):
        assert importlib.util.find_spec(module) is not None


class TestCommand:
    def test_lists_all(self, capsys):
        assert main(["docs", "--json"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["name"] for row in rows] == list(docs.NAMES)
        assert all(row["title"] and row["about"].endswith(".") and "`" not in row["about"] for row in rows)

    def test_prints_one(self, capsys):
        assert main(["docs", "limits"]) == 0
        assert capsys.readouterr().out == FILES["limits"].read_text()
        assert main(["docs", "methods"]) == 0
        assert "<!--" not in capsys.readouterr().out
        assert main(["docs", "methods", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["title"] == "Methods"

    @pytest.mark.parametrize("name", ["nothing", "../../README", "METHODS", ""])
    def test_a_wrong_name_is_one_line(self, name, capsys):
        assert main(["docs", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: unknown document {name!r}; choose one of getting-started, methods")

    def test_tables_are_written_anew(self, tmp_path, capsys):
        path = tmp_path / "methods.md"
        path.write_text("# x\n\n<!-- table: solver -->\nold\n<!-- end -->\n\nbelow\n")
        assert main(["methods", "--markdown", str(path)]) == 0
        assert path.read_text().startswith("# x\n\n<!-- table: solver -->\n| name | what it does |")
        assert "old" not in path.read_text()
        assert path.read_text().endswith("|\n<!-- end -->\n\nbelow\n")
        assert main(["methods", "--markdown", str(tmp_path / "nowhere.md")]) == 2
        assert "cannot update" in capsys.readouterr().err


def test_an_unknown_heading_is_one_line():
    with pytest.raises(itf.IntrafusionError, match="document limits has no heading 'x'"):
        docs.section("limits", "x")


def test_pictures_of_the_project_are_pictures():
    for file in (ROOT / "assets").glob("*.png"):
        assert Path(file).stat().st_size > 10_000
