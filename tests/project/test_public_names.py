"""What each package offers: names that exist, that no module has, and that the library itself does not lean on."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import intrafusion as itf

PACKAGE = Path(itf.__file__).parent
FOLDERS = sorted(file.parent.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("__init__.py"))
NAMES = [".".join(folder.parts) for folder in FOLDERS]
SURFACES = [name for name in NAMES if name.count(".") == 1]
PROMISED = """evaluate find_groups fold load_data load_model plan prune registry score open_session sweep Store recover expand
contract similarity_loss SDprun mask finalise fuse_models"""


@pytest.mark.parametrize("name", NAMES)
def test_a_package_says_what_it_offers(name):
    package = importlib.import_module(name)
    assert all(hasattr(package, offered) for offered in package.__all__)
    modules = {
        file.stem for file in Path(package.__file__).parent.iterdir() if file.suffix == ".py" or (file / "__init__.py").exists()
    }
    assert not modules & {*package.__all__}  # else the one hides the other


def test_what_is_promised_is_offered():
    assert {*PROMISED.split()} <= {*itf.__all__}


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_the_library_imports_from_where_a_name_is_defined(folder):
    """So that the version of a result's code holds what it depends on, and no more."""
    for file in (PACKAGE.parent / folder).glob("*.py"):
        if folder.parts[1:2] == ("cli",) or (file.stem == "__init__" and len(folder.parts) < 3):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in SURFACES:
                found = PACKAGE.parent.joinpath(*node.module.split("."))
                assert all((found / f"{name.name}.py").exists() or (found / name.name).is_dir() for name in node.names), file


def test_importing_the_library_brings_nothing_that_only_pages_and_single_methods_need():
    heavy = ("plotly", "captum", "ray", "streamlit", "torchvision", "timm", "ot", "sklearn", "scipy.stats")
    code = f"import sys, intrafusion; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
