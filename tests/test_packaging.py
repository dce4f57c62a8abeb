"""What `pip install .` puts on a machine: every folder of the library, and the embedded models."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_of_the_library_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "intrafusion").rglob("__init__.py")}
    assert {*listed} == folders | {"intrafusion.assets"}
