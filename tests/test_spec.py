import inspect
import json
import re
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import intrafusion as itf
from intrafusion import PruneSpec
from intrafusion.options import RecoveryOptions, TransportKeywords, TransportOptions, options_of
from intrafusion.spec import MERGE_FIELDS, PLAN_FIELDS

NAMES = (
    "model", "dataset", "criterion", "merge", "cost", "distance", "source", "target", "anchors", "solver", "normalise",
    "recovery", "precision", "budget", "fold_norms",
)  # fmt: skip
specs = st.builds(
    PruneSpec,
    **{
        name: st.sampled_from(one.choices) if one.choices else st.text(min_size=1, max_size=8)
        for name, one in options_of(PruneSpec).items()
        if name in NAMES
    },
    weights=st.none() | st.text(max_size=8),
    data_path=st.none() | st.text(max_size=8),
    groups=st.just("all") | st.lists(st.text(max_size=6), min_size=1, max_size=3) | st.tuples(st.text(max_size=6)),
    sparsity=st.floats(0, 1, exclude_max=True) | st.just(0),
    p=st.floats(1, 1e6) | st.integers(1, 9),
    reg=st.floats(1e-6, 1e6) | st.integers(1, 9),
    reg_m=st.floats(1e-6, 1e6),
    mass=st.floats(0, 1, exclude_min=True) | st.just(1),
    round_to=st.integers(1, 64),
    bias=st.booleans(),
    calibration=st.none() | st.integers(1, 10**9),
    seed=st.integers(0, 2**63 - 1),
    training=st.none() | st.integers(1, 10**9),
    epochs=st.floats(1e-3, 1e3) | st.integers(1, 9),
    rate=st.none() | st.floats(1e-6, 1),
    patience=st.none() | st.integers(0, 9),
    ratio=st.floats(1, 9) | st.integers(1, 9),
    gamma=st.floats(0, 100) | st.integers(1, 9),
    rank=st.integers(1, 99),
    limit=st.none() | st.integers(1, 10**9),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(specs)
def test_a_spec_survives_its_dictionary_and_json(spec):
    raw = spec.to_dict()
    again = PruneSpec.from_dict(json.loads(json.dumps(raw)))
    assert again == PruneSpec.from_dict(raw) == spec
    assert hash(again) == hash(spec)
    assert again.key() == spec.key()
    assert {spec: 1}[again] == 1
    assert raw.keys() == {field.name for field in fields(PruneSpec)}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(specs, specs)
def test_keys_are_equal_exactly_for_equal_specs(first, second):
    assert (first == second) == (first.key() == second.key())


EQUAL = {
    "defaults": ({}, {}),
    "a list of groups": ({"groups": ["a", "b"]}, {"groups": ("a", "b")}),
    "p as a float": ({"p": 1}, {"p": 1.0}),
    "a rate as a float": ({"rate": 1}, {"rate": 1.0}),
    "sparsity as a float": ({"sparsity": 0}, {"sparsity": 0.0}),
    "negative zero": ({"sparsity": 0.0}, {"sparsity": -0.0}),
    "a sum of floats": ({"sparsity": 0.3}, {"sparsity": 0.1 + 0.2}),
    "a sum of many floats": ({"sparsity": 0.8}, {"sparsity": sum([0.1] * 8)}),
    "sums for each group": (
        {"groups": ["a", "b"], "sparsities": [0.3, 0.7]},
        {"groups": ["a", "b"], "sparsities": [0.1 + 0.2, 1 - 0.3]},
    ),
    "a rate that was computed": ({"rate": 0.3}, {"rate": 0.1 * 3}),
}


@pytest.mark.parametrize("case", EQUAL)
def test_equal_specs_have_one_hash_and_one_key(case):
    first, second = (PruneSpec(**options) for options in EQUAL[case])
    assert first == second
    assert hash(first) == hash(second)
    assert first.key() == second.key()


@pytest.mark.parametrize("value", [0.3, 1 / 3, 1e-9, 0.123456789012, 1 - 1e-12, 1 - 2**-53, 5e-324])
def test_floats_are_kept_to_14_digits_and_below_one(value):
    spec = PruneSpec(sparsity=value)
    assert spec.sparsity == pytest.approx(value, rel=1e-14, abs=0)
    assert spec.sparsity < 1
    assert PruneSpec(sparsity=spec.sparsity).sparsity == spec.sparsity


CHANGES = {
    **{name: (options_of(PruneSpec)[name].choices or ("other",))[-1] for name in NAMES},
    "weights": "w.pt",
    "data_path": "d.npz",
    "groups": ("conv1",),
    "sparsity": 0.5,
    "p": 2,
    "reg": 0.5,
    "reg_m": 0.5,
    "mass": 0.5,
    "calibration": 100,
    "bias": True,
    "round_to": 8,
    "seed": 1,
    "limit": None,
    "training": None,
    "epochs": 1.5,
    "rate": 0.1,
    "patience": 3,
    "ratio": 4.0,
    "gamma": 1.0,
    "rank": 2,
}


def test_the_table_of_changes_names_every_field():
    assert CHANGES.keys() | {"sparsities"} == {field.name for field in fields(PruneSpec)}  # which needs named groups


def test_sparsities_are_one_a_named_group():
    spec = PruneSpec(groups=["conv1", "layer2.0.conv1"], sparsities=[0, 0.5])
    assert (spec.sparsities, spec.sparsity) == ((0.0, 0.5), 0.0)
    assert [spec.sparsity_of(name) for name in ("conv1", "layer2.0.conv1", "other")] == [0.0, 0.5, 0.0]
    assert spec == spec.but(sparsity=0.7)  # which nobody looks at
    assert spec != spec.but(sparsities=(0.5, 0.0))
    assert PruneSpec.from_dict(spec.to_dict()) == spec
    assert PruneSpec(sparsity=0.4).sparsity_of("any") == 0.4


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_tells_specs_apart(name):
    spec = PruneSpec()
    other = spec.but(**{name: CHANGES[name]})
    assert getattr(other, name) == CHANGES[name] != getattr(spec, name)
    assert other != spec
    assert other.key() != spec.key()
    assert other.but(**{name: getattr(spec, name)}) == spec


BAD = {
    **{f"{name} is a number": {name: 3} for name in NAMES},
    **{f"{name} is null": {name: None} for name in NAMES},
    "weights is a number": {"weights": 3},
    "data_path is a list": {"data_path": ["x"]},
    "groups is a bare name": {"groups": "conv1"},
    "groups is empty": {"groups": []},
    "groups holds a number": {"groups": ["conv1", 2]},
    "groups is null": {"groups": None},
    "sparsity is one": {"sparsity": 1},
    "sparsity is above one": {"sparsity": 1.3},
    "sparsity is negative": {"sparsity": -0.1},
    "sparsity is not a number": {"sparsity": float("nan")},
    "sparsity is text": {"sparsity": "0.5"},
    "sparsity is true": {"sparsity": True},
    "sparsity is null": {"sparsity": None},
    "sparsities without names": {"sparsities": (0.5,)},
    "sparsities of another number": {"sparsities": (0.5, 0.2), "groups": ("conv1",)},
    "sparsities hold one": {"sparsities": (1.0,), "groups": ("conv1",)},
    "sparsities hold text": {"sparsities": ("0.5",), "groups": ("conv1",)},
    "sparsities is a number": {"sparsities": 0.5, "groups": ("conv1",)},
    "epochs is text": {"epochs": "5"},
    "rate is negative": {"rate": -0.1},
    "gamma is no number": {"gamma": float("nan")},
    "rank is null": {"rank": None},
    "training is zero": {"training": 0},
    "p is below one": {"p": 0.5},
    "p is infinite": {"p": float("inf")},
    "p is not a number": {"p": float("nan")},
    "p is text": {"p": "1"},
    "bias is a number": {"bias": 1},
    "bias is text": {"bias": "false"},
    "seed is negative": {"seed": -1},
    "seed is a fraction": {"seed": 0.5},
    "seed is huge": {"seed": 2**63},
    "seed is true": {"seed": True},
    **{
        f"{name} is {what}": {name: value}
        for name in ("limit", "calibration")
        for what, value in {"zero": 0, "negative": -5, "a fraction": 10.5, "true": True}.items()
    },
    **{
        f"{name} is {what}": {name: value}
        for name in ("reg", "reg_m", "mass")
        for what, value in {"zero": 0, "negative": -1, "no number": float("nan"), "infinite": float("inf")}.items()
    },
    "mass is above one": {"mass": 1.1},
    "mass is text": {"mass": "all"},
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("make", [lambda raw: PruneSpec(**raw), PruneSpec.from_dict, lambda raw: PruneSpec().but(**raw)])
def test_every_bad_field_is_one_line_that_names_it(case, make):
    with pytest.raises(itf.IntrafusionError) as caught:
        make(BAD[case])
    assert next(iter(BAD[case])) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [{"sparsty": 0.5}, {"model": "digits-mlp", "": 1}, {3: 4}])
def test_an_unknown_field_lists_the_known_ones(raw):
    with pytest.raises(itf.IntrafusionError) as caught:
        PruneSpec.from_dict(raw)
    assert repr(str(list(raw)[-1])) in str(caught.value)
    assert "sparsity" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [None, [], "model", 3])
def test_what_is_no_mapping_is_no_spec(raw):
    with pytest.raises(itf.IntrafusionError, match="mapping"):
        PruneSpec.from_dict(raw)


def test_missing_fields_take_their_defaults():
    assert PruneSpec.from_dict({}) == PruneSpec()
    assert PruneSpec.from_dict({"sparsity": 0.5}) == PruneSpec(sparsity=0.5)


def test_a_spec_is_frozen():
    with pytest.raises(FrozenInstanceError):
        PruneSpec().sparsity = 0.5


def test_its_knobs_are_the_keywords_of_plan_and_prune(networks):
    network = networks("mlp")
    knobs = PruneSpec(p=2, bias=True, source="importance", target="importance", seed=3).only(PLAN_FIELDS)
    assert (knobs["p"], knobs["bias"], knobs["source"], knobs["seed"]) == (2, True, "importance", 3)
    group = network.prunable[0]
    itf.plan(network.model, group, itf.score(network.model, group), **knobs)
    itf.prune(network.model, network.example, **knobs)
    for function, names in ((itf.plan, PLAN_FIELDS), (itf.prune, (*PLAN_FIELDS, *MERGE_FIELDS))):
        parameters = inspect.signature(function).parameters.values()
        keywords = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY and one.name != "data"}
        options = {name: getattr(TransportOptions(), name) for name in TransportKeywords.__annotations__}
        assert keywords | options == PruneSpec().only(names)


def test_the_options_stand_once():
    assert [*TransportKeywords.__annotations__] == [*options_of(TransportOptions)]
    found = options_of(PruneSpec)
    for cls in (TransportOptions, RecoveryOptions):
        assert {name: found[name] for name in options_of(cls)} == options_of(cls)
        assert all(getattr(PruneSpec(), name) == getattr(cls(), name) for name in options_of(cls))
        assert cls.of(PruneSpec(p=2, epochs=3)) == (cls(p=2) if cls is TransportOptions else cls(epochs=3))
    assert all(one.help for one in found.values())


@pytest.mark.parametrize(
    ("values", "words"),
    [({"p": 0.5}, "p must be a number of at least 1, not 0.5"),
     ({"mass": 1.5}, "mass must be a number above 0 and at most 1, not 1.5"),
     ({"reg": 0}, "reg must be a number above 0, not 0"), ({"reg": float("nan")}, "reg must be a number above 0, not nan"),
     ({"bias": 1}, "bias must be true or false, not 1"), ({"source": 3}, "source must be a name, not 3"),
     ({"source": "far"}, "unknown source 'far'"), ({"p": True}, "p must be a number of at least 1, not True"),
     ({"reg_m": float("inf")}, "reg_m must be a number above 0, not inf")],
)  # fmt: skip
@pytest.mark.parametrize("cls", [TransportOptions, PruneSpec])
def test_an_option_out_of_its_range_is_one_line(cls, values, words):
    with pytest.raises(itf.IntrafusionError, match=re.escape(words)):
        cls(**values)
