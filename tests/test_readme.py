"""What the README says of methods, knobs and pictures is what is here."""

import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.options import CHOICES
from intrafusion.spec import PLAN_FIELDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", itf.registry("criterion"))
def test_every_criterion_has_its_row(name):
    entry = itf.registry("criterion")[name]
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    cells = [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
    assert cells[:4] == [f"`{name}`", entry.told, entry.needs, entry.paper]
    assert len(cells) == 6


@pytest.mark.parametrize("name", itf.registry("merge"))
def test_every_merge_has_its_row(name):
    entry = itf.registry("merge")[name]
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [f"`{name}`", entry.told, entry.needs, entry.paper]


@pytest.mark.parametrize("name", itf.registry("recovery"))
def test_every_recovery_has_its_row(name):
    entry = itf.registry("recovery")[name]
    assert f"| `{name}` | {entry.told} | {entry.needs} | {entry.paper} |" in README


@pytest.mark.parametrize("name", itf.registry("trainer"))
def test_every_trainer_has_its_row(name):
    entry = itf.registry("trainer")[name]
    knobs = ", ".join(f"`{knob}`" for knob in entry.knobs)
    assert f"| `{name}` | {entry.told} | {entry.paper} | {knobs} |" in README


KINDS = ("criterion", "merge", "recovery", "trainer")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in itf.registry(kind)])
def test_where_a_method_differs_from_its_source_is_told(kind, name):
    differs = itf.registry(kind)[name].differs
    rows = README.partition("### Where methods differ")[2].partition("\n## ")[0].splitlines()
    found = [row.split(" | ")[1].removesuffix(" |") for row in rows if f"`{name}`" in row.split(" | ")[0]]
    assert found == ([differs] if differs else [])


@pytest.mark.parametrize(
    "name",
    [
        *itf.registry("solver"),
        *CHOICES["anchors"],
        *CHOICES["cost"],
        *CHOICES["distance"],
        *CHOICES["source"],
        *CHOICES["normalise"],
        *PLAN_FIELDS,
    ],
)
def test_every_transport_choice_is_told(name):
    told = README.partition("## Criteria")[2].partition("## Models")[0]
    assert f"`{name}`" in told or name == "seed"


def test_knobs_are_fields():
    assert set(PLAN_FIELDS) <= {field.name for field in fields(itf.PruneSpec)}


@pytest.mark.parametrize("picture", re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README))
def test_every_picture_is_there(picture):
    assert (ROOT / picture).stat().st_size > 10_000


def test_your_own_network_in_five_minutes(tmp_path, monkeypatch, capsys):
    """Every command and snippet of the section, in order."""
    section = README.partition("## Your own network in five minutes")[2].partition("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    ran = 0
    for language, text in re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL):
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


def test_the_bounds_are_those_of_the_code():
    from intrafusion.data import upload
    from intrafusion.runtime import safe_zip

    section = README.partition("## Your own network in five minutes")[2].partition("\n## ")[0]
    told = (
        f"{safe_zip.FILE // safe_zip.MIB} MiB",
        f"{upload.PICTURES:,} pictures",
        f"{safe_zip.UNPACKED >> 30} GiB",
        f"{upload.SIDE:,} pixels",
    )
    assert [one for one in told if one not in section] == []
