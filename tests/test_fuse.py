"""OT fusion of networks: aligned ones compute the same, and a network shuffled is found again."""

import copy

import pytest
import torch

import intrafusion as itf
from intrafusion.train import fuse_models
from intrafusion.train.fuse import align, permute

G = torch.Generator().manual_seed(0)


def shuffled(network):
    """The network with every group's channels in another order."""
    model = copy.deepcopy(network.model)
    for group in network.prunable:
        order = torch.arange(group.size)
        for block in group.block.unique():
            rows = (group.block == block).nonzero()[:, 0]
            order[rows] = rows[torch.randperm(len(rows), generator=G)]
        permute(model, group, order)
    return model


def test_another_order_computes_the_same(network):
    torch.testing.assert_close(shuffled(network)(network.images), network.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_a_shuffled_network_is_found_again(network, by):
    data = network.data if by == "activations" else None
    again = align(shuffled(network), network.model, network.prunable, data)
    torch.testing.assert_close(again(network.images), network.logits, rtol=1e-4, atol=1e-4)
    if by == "weights":
        for name, value in network.model.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value, msg=name)


def test_fusing_a_network_with_its_shuffle_is_the_network(network):
    fused = fuse_models([network.model, shuffled(network)], network.example)
    torch.testing.assert_close(fused(network.images), network.logits, rtol=1e-4, atol=1e-4)


def test_three_networks_are_averaged(networks):
    network = networks("mlp")
    models = [network.model, shuffled(network), shuffled(network)]
    torch.testing.assert_close(
        fuse_models(models, network.example)(network.images), network.logits, rtol=1e-4, atol=1e-4
    )


def test_alignment_helps_networks_trained_apart():
    """Two networks that learned from halves of the data: the aligned average beats the plain one."""
    from intrafusion.train.augment import wobble
    from intrafusion.train.loop import Recipe, train

    data, test, models = itf.load_data("digits", "train"), itf.load_data("digits"), []
    for seed, rows in enumerate((slice(0, 600), slice(600, 1200))):
        torch.manual_seed(seed)
        model = itf.load_model("digits-mlp", weights="random")
        half = itf.ImageData("digits", "train", data.images[rows], data.labels[rows], data.classes)
        list(train(model, half, Recipe(epochs=15, augment=wobble, lr=0.1, batch=64), model.card.mean, model.card.std))
        models.append(model)
    plain = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    plain.load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    found = {
        "plain": plain,
        "weights": fuse_models(models, models[0].card.example()),
        "activations": fuse_models(models, models[0].card.example(), data),
    }
    accuracy = {name: itf.evaluate(model, test).accuracy for name, model in found.items()}
    assert accuracy["weights"] > accuracy["plain"] + 0.02
    assert accuracy["activations"] > accuracy["plain"] + 0.02


@pytest.mark.parametrize(
    ("names", "words"), [(["digits-mlp"], "at least two networks"), (["digits-mlp", "digits-vgg"], "one architecture")]
)
def test_what_cannot_be_fused_is_one_line(names, words):
    models = [itf.load_model(name) for name in names]
    with pytest.raises(itf.IntrafusionError, match=words):
        fuse_models(models, models[0].card.example())
