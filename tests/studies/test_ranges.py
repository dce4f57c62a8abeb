import json

import pytest

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.studies.ranges import expand_range


@pytest.mark.parametrize(
    ("text", "kind", "numbers"),
    [("0.3", float, [0.3]), ("0.1:0.7:0.2", float, [0.1, 0.3, 0.5, 0.7]), ("1:3", int, [1, 2, 3]), ("8:2:-3", int, [8, 5, 2]),
     ("0:0.95:0.1", float, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])],
)  # fmt: skip
def test_a_range_holds_its_end(text, kind, numbers):
    found = expand_range(text, kind, "sparsity")
    assert found == numbers
    assert {type(number) for number in found} == {kind}


@pytest.mark.parametrize(
    "text", ["", "a", "0.1:", "0.1:0.5:0", "0.5:0.1:0.1", "1:2:3:4", "0:inf:1", "nan", "0:1:1e-9", "0:1:nan", "1e999:1:1"]
)
def test_what_is_no_range_is_one_line(text):
    if text == "nan":  # a number, which the field itself refuses
        with pytest.raises(itf.IntrafusionError):
            itf.PruneSpec(sparsity=expand_range(text, float, "sparsity")[0])
        return
    with pytest.raises(itf.IntrafusionError, match=r"sparsity") as said:
        expand_range(text, float, "sparsity")
    assert "\n" not in str(said.value)


def test_the_commands_take_ranges_wherever_they_take_several_numbers(capsys):
    words = "curve --model digits-mlp --merge drop --limit 50 --sparsity 0.1:0.5:0.2 0.6 --json"
    assert main(words.split()) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["sparsity"] for row in rows] == [0.1, 0.3, 0.5, 0.6]
    words = "scores --model digits-mlp --sparsity 0.1:x"
    assert main(words.split()) == 2
    assert "--sparsity must be numbers or a range start:stop:step, not '0.1:x'" in capsys.readouterr().err
