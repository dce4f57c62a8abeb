from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import intrafusion as itf
from intrafusion import IntrafusionError, PruneSpec
from intrafusion.studies.study_file import FIXED, Study, parse

BASE = PruneSpec(model="digits-mlp", limit=20)
NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12).filter(str.strip)
FLOATS = st.floats(0, 0.999)
AXES = st.fixed_dictionaries(
    {},
    optional={
        "sparsity": st.lists(FLOATS, min_size=1, max_size=3).map(tuple),
        "groups": st.lists(st.sampled_from(["each", "all", "1", "1+3"]), min_size=1, max_size=3).map(tuple),
        "merge": st.lists(NAMES, min_size=1, max_size=2).map(tuple),
        "p": st.tuples(st.floats(1, 1e300)),
        "reg": st.tuples(st.floats(1e-300, 1e300)),
        "bias": st.sampled_from([(True,), (False, True)]),
        "limit": st.lists(st.one_of(st.none(), st.integers(1, 10**9)), min_size=1, max_size=2).map(tuple),
        "seed": st.tuples(st.integers(0, 2**63 - 1)),
    },
)
BASES = st.builds(
    PruneSpec, weights=st.none() | NAMES, data_path=st.none() | st.just('a "b"\\c\x7f\n'),
    groups=st.sampled_from(["all", ("1", "3")]),
    criterion=NAMES, sparsity=FLOATS, calibration=st.none() | st.integers(1, 99), bias=st.booleans(),
)  # fmt: skip


@pytest.fixture(scope="module")
def groups() -> list[itf.Group]:
    model = itf.load_model("digits-resnet")
    return itf.find_groups(model, model.card.example())


def text(axes: str = "", base: str = 'model = "digits-mlp"', top: str = "") -> str:
    return f"{top}\n[base]\n{base}\n[axes]\n{axes}\n"


class TestToml:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(NAMES, BASES, AXES, st.booleans())
    @example("two lines of 😀 and a \\", BASE.but(groups=("1",), sparsities=(0.25,)), {}, True)
    def test_comes_back(self, name, base, axes, decide):
        study = Study(name, base, axes, decide)
        again = Study.from_toml(study.to_toml())
        assert again.specs([]) == study.specs([])
        assert (again.name, again.decide, dict(again.axes)) == (name, decide, axes)
        assert again.base == base.but(**{k: getattr(again.base, k) for k in axes})

    def test_is_read_from_a_file(self, tmp_path):
        (tmp_path / "é.toml").write_text(text("sparsity = [0.1]", top='name = "é"'), encoding="utf-8")
        study = Study.read(str(tmp_path / "é.toml"))
        assert study == Study("é", PruneSpec(model="digits-mlp"), {"sparsity": (0.1,)})

    def test_what_is_left_out_has_its_default(self):
        assert Study.from_toml("") == Study("study", PruneSpec(), {})
        assert Study.from_toml("").specs([]) == [PruneSpec()]

    def test_all_images_are_all(self):
        study = Study.from_toml(text('limit = [50, "all"]', 'calibration = "all"'))
        assert study.base.calibration is None
        assert study.axes["limit"] == (50, None)
        assert [spec.limit for spec in study.specs([])] == [50, None]

    def test_home_is_the_persons(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "s.toml").write_text(text(top='name = "mine"'))
        assert Study.read("~/s.toml").name == "mine"


class TestParse:
    @pytest.mark.parametrize(
        ("field", "given", "values"),
        [
            ("sparsity", "0.1:0.7:0.1", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
            ("sparsity", "0:0.9:0.3", (0.0, 0.3, 0.6, 0.9)),
            ("sparsity", "0.1:0.45:0.1", (0.1, 0.2, 0.3, 0.4)),
            ("sparsity", "0.5:0.1:-0.2", (0.5, 0.3, 0.1)),
            ("sparsity", "0.3:0.3:0.1", (0.3,)),
            ("sparsity", "0:0.999:0.001", tuple(i / 1000 for i in range(1000))),
            ("sparsity", ["0.05", "0.1:0.3:0.1", 0.5], (0.05, 0.1, 0.2, 0.3, 0.5)),
            ("sparsity", 0.5, (0.5,)),
            ("p", "1:3", (1.0, 2.0, 3.0)),
            ("seed", "0:4", (0, 1, 2, 3, 4)),
            ("seed", "0:10:5", (0, 5, 10)),
            ("seed", [1, "2:3"], (1, 2, 3)),
            ("limit", ["100:300:100", "all"], (100, 200, 300, None)),
            ("calibration", "all", (None,)),
            ("bias", ["false", True], (False, True)),
            ("merge", ["drop", "0:3"], ("drop", "0:3")),
        ],
        ids=str,
    )
    def test_lists_and_ranges(self, field, given, values):
        found = parse(field, given)
        assert found == values
        assert [type(value) for value in found] == [type(value) for value in values]

    @given(st.integers(-5, 20), st.integers(1, 60), st.sampled_from([0.001, 0.01, 0.1, 0.05, 0.025, 1 / 64]))
    def test_ranges_hold_both_ends_however_floats_round(self, start, steps, step):
        ends = round(start * step, 10), round((start + steps) * step, 10)
        found = parse("sparsity", f"{ends[0]}:{ends[1]}:{step}")
        assert len(found) == steps + 1
        assert (found[0], found[-1]) == ends

    @pytest.mark.parametrize(
        ("field", "given"),
        [
            ("sparsity", "a"), ("sparsity", "0.1:b:0.1"), ("sparsity", "0.1:0.5:0"), ("sparsity", "0.5:0.1:0.1"),
            ("sparsity", "0:0.9:1e-9"), ("sparsity", "0:inf:1"), ("sparsity", "nan:1:1"), ("sparsity", "0:1:1:1"),
            ("sparsity", ""), ("sparsity", ":"), ("seed", "1.5"), ("seed", "0:1:0.5"), ("seed", "0:9999999999"),
            ("limit", "1:all"),
        ],
    )  # fmt: skip
    def test_no_range_is_one_line(self, field, given):
        assert field in complaint(lambda: parse(field, given))


class TestSpecs:
    def test_last_axis_varies_fastest_and_each_point_comes_once(self):
        study = Study("s", BASE, {"sparsity": (0.5, 0.1, 0.5), "merge": ("drop", "fusion")})
        assert study.specs([]) == [BASE.but(sparsity=s, merge=m) for s in (0.5, 0.1) for m in ("drop", "fusion")]

    def test_each_is_every_prunable_group_for_itself(self, groups):
        specs = Study("s", BASE, {"groups": ("each",)}).specs(groups)
        assert [spec.groups for spec in specs] == [(g.name,) for g in groups if g.reason is None]
        assert len(specs) == len(groups) - 1 > 3  # but the output

    def test_groups_are_all_together_by_name_and_joined(self, groups):
        names = ("all", "layer1.0.conv1", "layer1.0.conv1+conv1", "each", "all")
        specs = Study("s", BASE, {"groups": names}).specs(groups)
        assert [spec.groups for spec in specs[:4]] == [
            "all",
            ("layer1.0.conv1",),
            ("layer1.0.conv1", "conv1"),
            ("conv1",),
        ]
        assert len(specs) == 2 + len(Study("s", BASE, {"groups": ("each",)}).specs(groups))

    def test_groups_cross_the_other_axes(self, groups):
        specs = Study("s", BASE, {"groups": ("conv1", "all"), "seed": (0, 1)}).specs(groups)
        assert [(spec.groups, spec.seed) for spec in specs] == [
            (("conv1",), 0),
            (("conv1",), 1),
            ("all", 0),
            ("all", 1),
        ]


def complaint(act) -> str:
    """The one line that `act` ends in."""
    with pytest.raises(IntrafusionError) as caught:
        act()
    line = str(caught.value)
    assert line
    assert "\n" not in line
    return line


BAD = {
    "no TOML": ("[base", "TOML"),
    "an unknown table": ("[bases]\n", "bases"),
    "an unknown field of the base": (text(base="colour = 1"), "colour"),
    "a bad value in the base": (text(base="sparsity = 2"), "2"),
    "a base that is none": ("base = 3", "base"),
    "axes that are none": ('axes = "merge"', "axes"),
    "a decision that is none": ('decide = "maybe"', "decide"),
    "a name that is none": ("name = 3", "name"),
    "an empty name": ('name = " "', "name"),
    "a name of two lines": ('name = "a\\nb"', "name"),
    "an unknown axis": (text("colour = [1]"), "colour"),
    **{f"{field} as an axis": (text(f'{field} = ["a", "b"]'), field) for field in FIXED},
    "an axis without values": (text("sparsity = []"), "sparsity"),
    "an axis that is a table": (text("sparsity = {a = 1}"), "sparsity"),
    "a value out of range": (text("sparsity = [0.1, 1.0]"), "1.0"),
    "a range that leaves what is allowed": (text('sparsity = "0.5:1:0.1"'), "1.0"),
    "an endless range": (text('sparsity = "0:inf:1"'), "inf"),
    "a value of another kind": (text('bias = ["perhaps"]'), "perhaps"),
    "a list of lists": (text('groups = [["1", "3"]]'), "groups"),
    "a group that is a number": (text("groups = [1]"), "groups"),
    "too many points": (text('seed = "1:1000"\np = "1:101"'), "100,000"),
}


@pytest.mark.parametrize(("given", "match"), BAD.values(), ids=BAD)
def test_no_study_is_one_line(given, match):
    assert match in complaint(lambda: Study.from_toml(given))


def test_a_name_that_cannot_be_stored_is_refused():
    assert "name" in complaint(lambda: Study("a\udcff", BASE, {}))


@pytest.mark.parametrize("path", ["nowhere.toml", ".", "~nobody-of-this-name/s.toml", "latin.toml"])
def test_no_file_is_one_line(path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    assert path in complaint(lambda: Study.read(path))


def test_a_hundred_thousand_points_are_not_too_many():
    axes = {"seed": parse("seed", "1:1000"), "p": parse("p", "1:100")}
    assert len(Study("s", BASE, axes).axes["seed"]) == 1000
