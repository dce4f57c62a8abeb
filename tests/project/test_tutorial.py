"""The tutorial notebook runs from its first cell to its last, in one namespace."""

import json

import pytest
from places import ROOT

FILE = ROOT / "assets" / "docs" / "tutorial.ipynb"
NOTEBOOK = json.loads(FILE.read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the cells leave behind."""
    left: dict = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("notebook"))
        for number, source in enumerate(CODE):
            exec(compile(source, f"cell {number}", "exec"), left)
    return left


def test_it_is_a_small_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], len(NOTEBOOK["cells"])) == (4, 12)
    assert not any(cell.get("outputs") for cell in NOTEBOOK["cells"])
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == 12
    assert FILE.stat().st_size < 20_000


def test_fusion_keeps_more_than_dropping_and_the_file_is_the_network(names):
    accuracy = {(spec.merge, spec.sparsity): value for spec, value in names["accuracy"].items()}
    assert len(accuracy) == 8
    assert accuracy["fusion", 0.3] > accuracy["drop", 0.3] + 0.2
    evaluate, images = names["itf"].evaluate, names["images"]
    assert evaluate(names["again"], images, limit=None).accuracy == pytest.approx(accuracy["fusion", 0.3], abs=0.002)
    assert names["after"].params < 0.6 * names["before"].params


def test_pictures_are_of_what_was_computed(names):
    plan = names["plan"]
    assert names["transport_map"].data[0].z.shape == (len(plan.kept), names["group"].size)
    assert [len(line.y) for line in names["curves"].data] == [4, 4]
    assert len(names["bars"].data[0].y) == names["group"].size
