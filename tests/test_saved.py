"""Networks of any widths in files: what is written opens again, and a card that makes no sense is one line."""

import json

import pytest
import torch

import intrafusion as itf
from intrafusion.saved import layers_of, set_layers
from intrafusion.train.smooth import truncate
from intrafusion.zoo import architecture_of, dataset_of, describe, keep, kept_names, model_names
from intrafusion.zoo.architectures import ARCHITECTURES


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
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), network.state_dict().values(), strict=True)
    )
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
    assert sum(p.numel() for p in itf.load_model("kept/quarter").parameters()) == sum(
        p.numel() for p in quarter.parameters()
    )


def test_bad_names_and_missing_networks_are_one_line():
    model = itf.load_model("digits-mlp")
    for name in ("", "../up", "a b", "x" * 65, ".hidden"):
        with pytest.raises(itf.IntrafusionError, match="is no name for a network"):
            keep(model, name)
    for name in ("kept/nothing", "kept/../up"):
        with pytest.raises(itf.IntrafusionError, match=r"kept|no name"):
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
    ],
)  # fmt: skip
def test_a_card_that_makes_no_sense_is_one_line(layers):
    with pytest.raises(itf.IntrafusionError, match="card"):
        set_layers(ARCHITECTURES["digits-resnet"].make({}), layers, {})


def test_a_damaged_card_of_a_kept_network_is_one_line(tmp_path, monkeypatch):
    keep(pruned("digits-mlp"), "mine")
    from intrafusion.places import home

    card = home() / "models" / "mine.json"
    raw = json.loads(card.read_text())
    for broken in ("no json", json.dumps([]), json.dumps(raw | {"details": {"architecture": "nope"}})):
        card.write_text(broken)
        with pytest.raises(itf.IntrafusionError) as caught:
            itf.load_model("kept/mine")
        assert "\n" not in str(caught.value)
