import pytest

import intrafusion as itf
from intrafusion._registry import Entry, Registry

KINDS = ("criterion", "merge", "solver", "recovery", "trainer")
ENTRIES = [(kind, name) for kind in KINDS for name in itf.registry(kind)]


@pytest.mark.parametrize(
    ("kind", "names"),
    [("criterion", {"random", "l1", "l2", "bn_scale"}), ("merge", {"drop", "fusion"}), ("solver", {"exact"})],
)
def test_the_registries_hold_what_they_should(kind, names):
    assert names <= itf.registry(kind).keys()


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_entry_tells_a_person_what_it_is(kind, name):
    entry = itf.registry(kind)[name]
    assert entry.name == name
    assert callable(entry.function)
    assert entry.needs in ("nothing", "images", "labels")
    assert 10 < len(entry.summary) < 120
    assert entry.summary == entry.summary.strip()
    assert "\n" not in entry.summary


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_nothing_is_called_ours_and_every_difference_is_one_line(kind, name):
    entry = itf.registry(kind)[name]
    assert "ours" not in (entry.paper, entry.summary)
    assert "reconstructed" not in entry.summary  # which the field says
    assert "\n" not in entry.differs
    assert entry.differs == entry.differs.strip().rstrip(".")


RECONSTRUCTED = {
    "criterion": {"relative"},
    "merge": {"interpolation"},
    "recovery": {"overparam", "overparam-sp"},
    "trainer": {"sdprun", "smooth-svd", "smooth-interpolation"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_reconstructed_says_so_wherever_it_is_told(kind):
    table, expected = itf.registry(kind), RECONSTRUCTED.get(kind, set())
    assert {name for name, entry in table.items() if entry.reconstructed} == expected
    assert {name for name, entry in table.items() if "(reconstructed " in entry.told} == expected
    assert {part.split()[0] for part in table.listed().split(", ") if part.endswith(" (reconstructed)")} == expected
    assert [part.split()[0] for part in table.listed().split(", ")] == list(table)


AFTER = {
    ("merge", "calibrated"): "GRAIL",
    ("merge", "calibrated-fusion"): "GRAIL",
    ("merge", "refit"): "He et al.",
    ("merge", "refit-all-fusion"): "ThiNet",
    ("criterion", "greedy"): "Chee et al.",
}


@pytest.mark.parametrize(("kind", "name"), AFTER)
def test_what_comes_after_others_names_them_and_what_is_ours(kind, name):
    entry = itf.registry(kind)[name]
    assert entry.paper.startswith("after ")
    assert AFTER[kind, name] in entry.paper
    assert "ours: " in entry.differs


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_name_lists_the_known_ones(kind):
    table = itf.registry(kind)
    with pytest.raises(itf.IntrafusionError) as caught:
        table["no such thing"]
    message = str(caught.value)
    assert f"unknown {kind} 'no such thing'" in message
    assert all(name in message for name in table)
    assert "\n" not in message
    assert "no such thing" not in table


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(itf.IntrafusionError) as caught:
        itf.registry("criteria")
    assert "'criteria'" in str(caught.value)
    assert all(kind in str(caught.value) for kind in KINDS)


def test_registering_files_a_function_and_leaves_it_as_it_is():
    table = Registry("toy")

    @table.register("double", "twice its argument", paper="Euclid", needs="images")
    def double(x):
        return 2 * x

    assert double(4) == 8
    assert table["double"] == Entry("double", double, "twice its argument", "Euclid", "images")
    assert table["double"](5) == 10
    assert list(table) == ["double"]


def test_entries_cannot_be_changed():
    with pytest.raises(AttributeError):
        itf.registry("merge")["drop"].needs = "labels"
