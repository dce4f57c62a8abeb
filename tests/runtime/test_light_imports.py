import json
import subprocess
import sys
import types

import pytest

from intrafusion.runtime.light_imports import without

STUDY = """
import json, sys
import intrafusion as itf
from intrafusion.evaluation.accuracy import size

model, data = itf.load_model("digits-mlp"), itf.load_data("digits")
small = itf.prune(model, model.card.example(), 0.5, merge="fusion")
itf.evaluate(small, data)
size(small, model.card.example())
slow = ("timm", "torchvision", "torch._dynamo", "sklearn", "networkx", "pandas")
print(json.dumps([name for name in slow if name in sys.modules]))
"""


def test_pruning_the_digits_networks_imports_no_library_that_it_does_not_use():
    """Each of them would take every process a second or more."""
    told = subprocess.run([sys.executable, "-c", STUDY], check=True, capture_output=True, text=True)
    assert json.loads(told.stdout) == []


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """A library that imports an optional one."""
    (tmp_path / "made_library.py").write_text("try:\n    import made_option\nexcept ImportError:\n    made_option = None\n")
    (tmp_path / "made_option.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("made_library", "made_option"):
        sys.modules.pop(name, None)


def test_an_optional_library_is_left_out_and_can_be_imported_afterwards(libraries):
    finders = list(sys.meta_path)
    with without("made_option"):
        import made_library
    assert made_library.made_option is None
    assert sys.meta_path == finders
    import made_option

    assert isinstance(made_option, types.ModuleType)


def test_other_threads_find_it_meanwhile(libraries, tmp_path):
    (tmp_path / "made_library.py").write_text(
        "import threading\nfound = []\n"
        "def look():\n    import made_option\n    found.append(made_option)\n"
        "thread = threading.Thread(target=look); thread.start(); thread.join()\n"
    )
    with without("made_option"):
        import made_library
    assert len(made_library.found) == 1
