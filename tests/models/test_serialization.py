"""Networks of any widths in files: what is written opens again, and a card that makes no sense is one line."""

import copy
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from damage import CARDS, DAMAGES, card_in, made_older, set_card
from safetensors import SafetensorError

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.models.hub import architecture_of, dataset_of, describe, keep, kept_names, model_names
from intrafusion.models.serialization import layers_of, set_layers
from intrafusion.models.sources.builtin import ARCHITECTURES
from intrafusion.pruning.groups.norms import fold_groups
from intrafusion.pruning.groups.surgery import shrink
from intrafusion.pruning.transport.planning import group_counts
from intrafusion.runtime.paths import home
from intrafusion.studies.uploads import remove, take_weights
from intrafusion.training.methods.smooth import truncate


def pruned(name: str, **knobs) -> torch.nn.Module:
    model = itf.load_model(name)
    small = itf.prune(model, model.card.example(), sparsity=0.5, **knobs)
    small.card = model.card
    return small


@pytest.fixture(params=["digits-mlp", "digits-vgg", "digits-resnet", "cifar10-resnet20", "truncated", "as it was"])
def network(request) -> torch.nn.Module:
    if request.param == "truncated":
        model = itf.load_model("digits-vgg")
        small = truncate(model, share=0.5)
        small.card = model.card
        return small
    return itf.load_model("digits-resnet") if request.param == "as it was" else pruned(request.param)


def test_a_kept_network_opens_by_its_name_and_computes_the_same(network):
    name = keep(network, "mine")
    assert name == "kept/mine"
    assert kept_names() == [name] == model_names(imagenet=False)[:1]
    again = itf.load_model(name)
    images = torch.randn(5, *network.card.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(images), network(images), rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), network.state_dict().values(), strict=True))
    assert again.card.name == name
    assert (architecture_of(name), dataset_of(name)) == (network.card.name, network.card.dataset)
    assert describe(name)["weights"] == "kept"
    assert (again.card.mean, again.card.accuracy) == (network.card.mean, network.card.accuracy)


def test_a_kept_network_can_be_pruned_and_kept_again():
    keep(pruned("digits-resnet"), "half")
    half = itf.load_model("kept/half")
    quarter = itf.prune(half, half.card.example(), sparsity=0.5)
    quarter.card = half.card
    keep(quarter, "quarter")
    assert sum(p.numel() for p in itf.load_model("kept/quarter").parameters()) == sum(p.numel() for p in quarter.parameters())


def narrowed(model: torch.nn.Module, share: float = 0.3) -> torch.nn.Module:
    """A copy without the last channels of each group: which ones go does not matter for files."""
    small, kept = copy.deepcopy(model), {}
    groups = itf.find_groups(model, model.card.example())
    fold_groups(small, groups)
    for group in groups:
        if group.reason is None:
            blocks = enumerate(group_counts(group, share))
            kept[group] = torch.cat([(group.block == b).nonzero()[:k, 0] for b, k in blocks]).sort().values
    assert kept
    shrink(small, kept)
    return small


@pytest.mark.parametrize("name", [
    "imagenet/mobilenet_v2", "imagenet/convnext_tiny", "cifar10-vgg11_bn", "timm/mobilenetv3_small_050",
])  # fmt: skip
def test_networks_of_other_libraries_are_kept_at_any_widths(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    model = itf.load_model(name, weights="random")
    small = narrowed(model)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    again = itf.load_model(keep(small, "mine"))
    assert again.state_dict().keys() == small.state_dict().keys()
    images = torch.randn(1, *model.card.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(images), small(images), rtol=0, atol=0)


class Scaled(torch.nn.Module):
    """A layer of a kind that files do not know, with a bare parameter and a number of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.scale, self.norm = width, torch.nn.Parameter(torch.ones(width, 1)), torch.nn.LayerNorm(width)
        self.register_parameter("shift", None)


def test_layers_of_unknown_kinds_are_resized_in_place():
    base, small = torch.nn.Sequential(Scaled(8)), torch.nn.Sequential(Scaled(5))
    small[0].shift = torch.nn.Parameter(torch.zeros(5))
    layers = json.loads(json.dumps(layers_of(small, base)))
    assert layers["0"] == {
        "kind": "Resized", "numbers": {"width": 5}, "shapes": {"scale": [5, 1], "shift": [5]}
    }  # fmt: skip
    assert layers["0.norm"]["numbers"] == {"normalized_shape": [5]}
    set_layers(base, layers, small.state_dict())
    base.load_state_dict(small.state_dict())
    assert (base[0].width, base[0].norm.normalized_shape) == (5, (5,))
    assert base[0].norm(torch.ones(2, 5)).shape == (2, 5)


def resized(**changes) -> dict:
    return {"0": {"kind": "Resized", "numbers": {}, "shapes": {}} | changes}


@pytest.mark.parametrize(
    "layers",
    [
        resized(numbers={"__class__": 1}), resized(numbers={"_parameters": 1}), resized(numbers={"training": 1}),
        resized(numbers={"forward": 1}), resized(numbers={"width": "8"}), resized(numbers={"width": True}),
        resized(numbers={"width": -1}), resized(numbers={"width": 1 << 40}), resized(numbers={"width": [8]}),
        resized(numbers=[]), resized(shapes={"scale": [1 << 20, 1 << 20]}), resized(shapes={"scale": "8"}),
        resized(shapes={"scale": [5.0, 1]}),
        resized(shapes={"forward": [1]}), resized(shapes=[]), resized(more=1), {"": {"kind": "Identity"}},
        {"0": {"kind": "Linear", "in_features": 65536, "out_features": 65536}},
    ],
)  # fmt: skip
def test_a_hostile_card_sets_nothing_and_takes_no_memory(layers):
    network = torch.nn.Sequential(Scaled(8))
    with pytest.raises(itf.IntrafusionError, match="card") as caught:
        set_layers(network, layers, network.state_dict())
    assert "\n" not in str(caught.value)
    assert (network[0].width, tuple(network[0].scale.shape)) == (8, (8, 1))


def test_bad_names_and_missing_networks_are_one_line():
    model = itf.load_model("digits-mlp")
    for name in ("", "../up", "a b", "x" * 65, ".hidden"):
        with pytest.raises(itf.IntrafusionError, match="invalid name"):
            keep(model, name)
    for name in ("kept/nothing", "kept/../up"):
        with pytest.raises(itf.IntrafusionError, match=r"kept|invalid name"):
            itf.load_model(name)


def test_only_what_differs_is_described():
    base = ARCHITECTURES["digits-resnet"].make({})
    assert layers_of(itf.load_model("digits-resnet"), base) == {}
    small = pruned("digits-resnet", groups=["layer1.0.conv1"])
    assert {"layer1.0.conv1", "layer1.0.conv2", "layer1.0.bn1"} <= layers_of(small, base).keys()


@pytest.mark.parametrize(
    "layers",
    [
        [], {"nowhere": {"kind": "Identity"}}, {"conv1": {"kind": "eval"}}, {"conv1": 3}, {"conv1": {}},
        {"conv1": {"kind": "Conv2d", "in_channels": 1}},
        {"conv1": {"kind": "Linear", "in_features": 1 << 40, "out_features": 2}},
        {"conv1": {"kind": "Linear", "in_features": -1, "out_features": 2}}, {"conv1": [[[[{"kind": "Identity"}]]]]},
        {"conv1": {"kind": "Identity", "__class__": 1}}, {"conv1": {"kind": ["Identity"]}},
        {"conv1": {"kind": "PadShortcut", "channels": 1, "before": 0, "after": 0, "stride": 0}},
    ],
)  # fmt: skip
def test_a_card_that_makes_no_sense_is_one_line(layers):
    with pytest.raises(itf.IntrafusionError, match="card"):
        set_layers(ARCHITECTURES["digits-resnet"].make({}), layers, {})


def kept_file(name: str) -> Path:
    return home() / "models" / f"{name}.safetensors"


def check_listed_as_damaged(name: str, capsys) -> None:
    """A damaged network says so in every list, hinders no other one, opens with one line, and can be removed."""
    assert kept_names() == [name, "kept/whole"]
    assert kept_names(damaged=False) == ["kept/whole"]
    about = describe(name)
    assert (about["name"], about["weights"]) == (name, "damaged")
    assert about["summary"].startswith("damaged: ")
    assert describe("kept/whole")["weights"] == "kept"
    for call in (itf.load_model, dataset_of):
        with pytest.raises(itf.IntrafusionError) as caught:
            call(name)
        assert "\n" not in str(caught.value)
    for words in (["models"], ["own", "list"]):
        assert main([*words, "--json"]) == 0
        told = capsys.readouterr().out.splitlines()
        assert any(name in line and "damaged: " in line for line in told)
        assert any("kept/whole" in line and "damaged" not in line for line in told)
    itf.load_model("kept/whole")
    remove("models", name)
    assert kept_names() == ["kept/whole"]


@pytest.fixture
def two() -> Path:
    """Two kept networks; the file of the one that is to be damaged."""
    model = itf.load_model("digits-mlp")
    keep(model, "whole")
    keep(model, "mine")
    return kept_file("mine")


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_network_is_listed_as_such_and_hinders_no_other(two, damage, capsys):
    damage(two)
    check_listed_as_damaged("kept/mine", capsys)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_so_is_one_with_a_card_that_makes_no_sense(two, card, capsys):
    set_card(two, card)
    check_listed_as_damaged("kept/mine", capsys)


def test_so_is_one_without_any_card(two, capsys):
    set_card(two, None)
    check_listed_as_damaged("kept/mine", capsys)


def test_so_is_one_with_a_damaged_card_of_an_older_version(two, capsys):
    made_older(two)
    two.with_suffix(".json").write_text('{"mean": [')
    check_listed_as_damaged("kept/mine", capsys)


def test_so_is_a_program_that_is_no_archive(two, capsys):
    two.unlink()
    two.with_suffix(".pt2").write_bytes(b"no archive")
    check_listed_as_damaged("kept/mine", capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_so_is_one_that_may_not_be_read(two, capsys):
    two.chmod(0)
    check_listed_as_damaged("kept/mine", capsys)


def test_what_is_no_name_of_a_network_is_not_listed():
    keep(itf.load_model("digits-mlp"), "mine")
    for stray in (".hidden.safetensors", "two words.safetensors", "x.safetensors.part", "notes.txt"):
        (home() / "models" / stray).write_text("x")
    assert kept_names() == ["kept/mine"]


class TestCardsOfOlderVersions:
    """Weights with the card in a JSON file beside them."""

    def test_they_open(self):
        network = pruned("digits-resnet")
        name = keep(network, "mine")
        new = itf.load_model(name).card
        made_older(kept_file("mine"))
        again = itf.load_model(name)
        assert again.card == new
        assert torch.equal(again(again.card.example()), network(again.card.example()))
        assert describe(name)["accuracy"] == new.accuracy

    def test_a_new_network_takes_the_place_of_both_files(self):
        keep(pruned("digits-resnet"), "mine")
        made_older(kept_file("mine"))
        network = pruned("digits-mlp")
        keep(network, "mine")
        assert [path.name for path in kept_file("mine").parent.iterdir()] == ["mine.safetensors"]
        assert architecture_of("kept/mine") == "digits-mlp"

    def test_a_stale_one_does_not_win(self):
        keep(pruned("digits-resnet"), "mine")
        made_older(kept_file("mine"))
        stale = kept_file("mine").with_suffix(".json").read_text()
        keep(pruned("digits-mlp"), "mine")
        kept_file("mine").with_suffix(".json").write_text(stale)  # as a process leaves it that is killed before it removes it
        assert architecture_of("kept/mine") == "digits-mlp"
        itf.load_model("kept/mine")


def test_the_card_in_a_strangers_file_is_not_believed(two, tmp_path):
    card = card_in(two) | {
        "dataset": "theirs",
        "accuracy": 1.0,
        "details": {"layers": {"nowhere": {"kind": "Identity"}}},
    }
    theirs = tmp_path / "w.safetensors"
    theirs.write_bytes(two.read_bytes())
    set_card(theirs, json.dumps(card))
    for model in (itf.load_model("digits-mlp", theirs), itf.load_model(take_weights(theirs, "digits-mlp", "theirs"))):
        assert (model.card.dataset, model.card.accuracy) == ("digits", itf.load_model("digits-mlp", two).card.accuracy)
        assert "nowhere" not in str(model.card.details)


class TestAFullDisk:
    @pytest.fixture(params=["full", "full in its own words", "no room for such a file"])
    def full(self, request, monkeypatch):
        errors = {
            "full": OSError(errno.ENOSPC, "No space left on device"),
            "full in its own words": SafetensorError("I/O error: No space left on device (os error 28)"),
            "no room for such a file": OSError(errno.EFBIG, "File too large"),
        }

        def fail(tensors, path, metadata):
            Path(path).write_bytes(b"half")
            raise errors[request.param]

        monkeypatch.setattr("safetensors.torch.save_file", fail)

    def test_it_leaves_the_old_network_and_nothing_else(self, two, full):
        before = two.read_bytes()
        with pytest.raises(itf.IntrafusionError, match=r"is full; free some space|cannot write .*: .*too large") as caught:
            keep(pruned("digits-mlp"), "mine")
        assert "\n" not in str(caught.value)
        assert two.read_bytes() == before
        assert sorted(path.name for path in two.parent.iterdir()) == ["mine.safetensors", "whole.safetensors"]
