"""The committed table of classifiers: what it says of some of them is measured again."""

import csv

import pytest
from benchmarks.architectures import TABLE, row

ROWS = {found["name"]: found for found in csv.DictReader(TABLE.read_text().splitlines())}


@pytest.mark.parametrize("name", ["imagenet/squeezenet1_1", "timm/mobilenetv3_small_050"])
def test_a_row_is_measured_again(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    assert {key: str(value) for key, value in row(name).items()} == ROWS[name]


@pytest.mark.parametrize("name", ROWS)
def test_what_cannot_be_pruned_says_why(name):
    found = ROWS[name]
    assert found["why not"] or found["prunable"] == str(int(found["groups"]) - 1)  # the classifier's outputs


@pytest.mark.parametrize("name", [name for name, found in ROWS.items() if found["prunable"] not in ("", "0")])
def test_what_can_be_pruned_runs_dropped_and_fused(name):
    assert (ROWS[name]["drop"], ROWS[name]["fusion"]) == ("yes", "yes")
