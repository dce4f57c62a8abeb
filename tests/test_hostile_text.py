"""Any JSON, any TOML: a spec that is whole, or one line that says what is wrong."""

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import intrafusion as itf
from intrafusion import PruneSpec
from intrafusion.data.image_folder import list_images
from intrafusion.errors import shown
from intrafusion.models.card import ModelCard, read_card
from intrafusion.models.serialization import saved_card
from intrafusion.spec import KINDS
from intrafusion.studies.study_file import Study, parse
from intrafusion.training.methods.spec import TrainSpec

FORM = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
texts = st.text(st.characters(), max_size=20) | st.sampled_from(
    ["all", "each", "l1", "a\nb", "\ud800", "x" * 5000, "1:9", "\x00"]
)
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 10**19, 2**63, -0.0, 1e308, 5e-324, True])
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
DEEP = "[" * 100_000


def objects(names: list[str]) -> st.SearchStrategy[Any]:
    """Mostly objects with some of these fields."""
    return anything | st.dictionaries(st.sampled_from(names) | texts, anything, max_size=4)


def said(error: pytest.ExceptionInfo[itf.IntrafusionError] | itf.IntrafusionError) -> str:
    text = str(error)
    assert text.isprintable()
    assert 0 < len(text) < 500
    return text


def whole_or_one_line(make: Any, raw: Any) -> Any:
    try:
        return make(raw)
    except itf.IntrafusionError as error:
        said(error)
        return None


@FORM
@given(objects([*KINDS]))
def test_any_json_is_a_spec_or_one_line(raw):
    spec = whole_or_one_line(PruneSpec.from_dict, raw)
    if spec is not None:
        again = PruneSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert again == spec
        assert (hash(again), again.key()) == (hash(spec), spec.key())


@FORM
@given(st.sampled_from([*KINDS]), anything)
def test_any_value_of_a_field_is_taken_or_refused(field, value):
    test_any_json_is_a_spec_or_one_line.hypothesis.inner_test({field: value})


@FORM
@given(objects([*TrainSpec.__dataclass_fields__]))
def test_any_json_is_a_run_of_the_lab_or_one_line(raw):
    spec = whole_or_one_line(TrainSpec.from_dict, raw)
    if spec is not None:
        again = TrainSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert again == spec
        assert (hash(again), again.key()) == (hash(spec), spec.key())


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return repr(value)
    return '"all"' if value is None else json.dumps(value)


tables = st.dictionaries(st.sampled_from([*KINDS]), anything, max_size=3)


@FORM
@given(st.text() | st.builds(
    lambda name, base, axes: f"name = {toml(name)}\nbase = {toml(base)}\naxes = {toml(axes)}\n", anything, tables, tables
))  # fmt: skip
def test_any_text_is_a_study_or_one_line(text):
    study = whole_or_one_line(Study.from_toml, text)
    if study is not None:
        assert Study.from_toml(study.to_toml()) == study


@FORM
@given(st.sampled_from([*KINDS]), anything)
def test_any_axis_has_values_or_one_line(field, value):
    whole_or_one_line(lambda given: parse(field, given), value)


CARD = ModelCard("mine", (0.5,), (0.5,), (1, 8, 8), 10, "digits")


@FORM
@given(objects([*ModelCard.__dataclass_fields__]))
def test_any_json_beside_weights_is_a_card_or_one_line(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("cards", numbered=True) / "w.json"
    try:
        path.write_text(json.dumps(raw))
    except ValueError:  # no JSON has a number of more than 4,300 digits
        return
    card = whole_or_one_line(lambda given: read_card(given, CARD), path)
    if card is not None:
        assert card.example().numel() > 0
        assert isinstance(json.dumps(card.to_dict()), str)
        assert len(card.mean) == len(card.std) == card.example().shape[1]
        hash(card)


@pytest.mark.parametrize(("field", "value"), [
    ("sparsity", 10**400), ("p", 10**400), ("p", True), ("reg", 10**400), ("epochs", "1"), ("epochs", 10**400),
    ("seed", 10**5000), ("limit", 10**5000), ("rank", 1.5), ("patience", 0.5), ("groups", ["a\nb", 3]),
    ("model", ["x" * 10**6]), ("merge", {"a": []}), ("bias", 10**5000), ("sparsities", [10**5000]),
], ids=lambda value: shown(value)[:20])  # fmt: skip
def test_a_field_that_cannot_be_is_named_in_one_line(field, value):
    with pytest.raises(itf.IntrafusionError) as caught:
        PruneSpec.from_dict({field: value})
    assert field in said(caught.value)


def test_a_group_named_twice_counts_once_and_has_one_sparsity():
    assert PruneSpec(groups=("a", "b", "a")).key() == PruneSpec(groups=("a", "b")).key()
    with pytest.raises(itf.IntrafusionError, match="name each group once"):
        PruneSpec(groups=("a", "a"), sparsities=(0.1, 0.2))


@pytest.mark.parametrize("field", ["model", "method", "criterion", "merge", "data_path", "part", "penalty"])
@pytest.mark.parametrize("value", [3, [[]], {"a": 1}, True, 10**5000], ids=lambda value: shown(value)[:20])
def test_a_bad_field_of_a_run_is_named(field, value):
    with pytest.raises(itf.IntrafusionError) as caught:
        TrainSpec.from_dict({field: value})
    assert field in said(caught.value)


@pytest.mark.parametrize("text", [
    "name = 1", "name = ''", f"x = {DEEP}", "seed = " + "9" * 5000,
    "[base]\nmodel = 'a\\u0000'\nsparsity = nan", "[axes]\ngroups = [1]",
    "[axes]\nsparsity = ['0:1:1e-9']", "[axes]\np = ['1:2:0']", "[axes]\np = ['nan:nan:nan']", "[axes]\nmodel = ['a']",
    "[axes]\nmerge = []",
    "[base]\n\"a\\nb\" = 1", "base = 3", "decide = 1", "\x00", "[axes]\nseed = ['0:99999']\nlimit = ['1:99999']",
    "[base]\np = 1979-05-27",
])  # fmt: skip
def test_a_study_that_cannot_be_is_one_line(text):
    with pytest.raises(itf.IntrafusionError) as caught:
        Study.from_toml(text)
    said(caught.value)


@pytest.mark.parametrize("card", [
    {"mean": [float("nan")]}, {"std": [float("nan")]}, {"std": [0]}, {"std": [float("inf")]}, {"mean": [10**400]},
    {"mean": ["0.5"]},
    {"input_size": [1, 10**6, 10**6]}, {"input_size": [1, 8.5, 8]}, {"input_size": 8},
    {"input_size": []}, {"classes": True}, {"classes": 0},
    {"classes": 10**12}, {"accuracy": "high"}, {"accuracy": 2}, {"dataset": {}}, {"licence": []}, {"details": []},
    {"source": None}, {"source": "\ud800"}, {"licence": "x" * 5001}, {"details": {"\ud800": 1}},
    {"details": {"a": [{"b": "x" * 5001}]}}, {"details": {"a": "x" * 2_000_000}},
])  # fmt: skip
def test_a_card_that_cannot_be_is_one_line(tmp_path, card):
    (tmp_path / "w.json").write_text(json.dumps(card))
    with pytest.raises(itf.IntrafusionError, match="is not a model card") as caught:
        read_card(tmp_path / "w.json", CARD)
    said(caught.value)


@pytest.mark.parametrize("card", [{"source": "\ud800"}, {"dataset": "x" * 5001}, {"details": {"told": ["\udfff"]}}])
def test_a_card_in_the_metadata_of_weights_is_looked_at_as_well(tmp_path, card):
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", {"intrafusion.card": json.dumps(card)})
    with pytest.raises(itf.IntrafusionError, match="is not a model card") as caught:
        saved_card(tmp_path / "w.safetensors", CARD)
    said(caught.value)


LABELS: dict[str, Any] = {
    "no JSON": "{", "deep JSON": DEEP, "a list": "[]", "a label too high": '{"cat": 1000}', "a label below": '{"cat": -2}',
    "a label of text": '{"cat": "1"}', "true for a label": '{"cat": true}', "a vast label": '{"cat": ' + "9" * 5000 + "}",
    "no text": b"\xff\xfe\x00", "a folder": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("file", ["labels.json", "val.txt"])
def test_a_list_of_labels_that_cannot_be_is_one_line(tmp_path, kind, file):
    content = LABELS[kind]
    if file == "labels.json":
        (tmp_path / "cat").mkdir()
    (tmp_path / "cat.png").write_bytes(b"")
    if content is None:
        (tmp_path / file).mkdir()
    else:
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(itf.IntrafusionError) as caught:
        list_images("imagenet", tmp_path)
    said(caught.value)


def test_messages_keep_their_beginning_and_end():
    text = str(itf.IntrafusionError(f"no file at {'x' * 9000}: check the path"))
    assert text.startswith("no file at xxx")
    assert text.endswith("xxx: check the path")
    assert "…" in text
    assert str(itf.IntrafusionError("a\nb\ud800")) == "a\\nb\\ud800"
