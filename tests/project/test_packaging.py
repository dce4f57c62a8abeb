"""What `pip install .` puts on a machine: every folder of the library, the embedded models, and pinned requirements."""

import ast
import re
import sys
import tomllib
from importlib import metadata

import pytest
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
REQUIRED = (ROOT / "requirements.txt").read_text().splitlines()


def test_every_package_of_the_library_is_installed():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "intrafusion").rglob("__init__.py")}
    assert {*listed} == folders | {"intrafusion.assets"}


@pytest.mark.parametrize("line", [*REQUIRED, *(line for extra in EXTRAS.values() for line in extra)])
def test_every_requirement_is_pinned(line):
    assert re.fullmatch(r"[A-Za-z0-9-]+==[0-9][0-9a-z.]*", line)


def test_what_is_imported_is_required():
    """Nothing that the code imports comes only because another package happens to bring it."""
    imported: set[str] = set()
    for file in [ROOT / "app.py", *(ROOT / "pages").rglob("*.py"), *(ROOT / "intrafusion").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add((node.module or "").partition(".")[0])
    others = imported - {*sys.stdlib_module_names, "intrafusion", "pages"}
    required = {line.partition("==")[0].lower() for line in (*REQUIRED, *EXTRAS["timm"], *EXTRAS["ray"], *EXTRAS["test"])}
    known = metadata.packages_distributions()
    missing = {name for name in others if not {one.lower() for one in known.get(name, [name])} & required}
    assert missing == set()
