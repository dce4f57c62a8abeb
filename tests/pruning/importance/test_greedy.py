"""Greedy selection: what it picks is what explains most, one channel at a time."""

import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.pruning.importance.feature_map import _order


def explained(gram: torch.Tensor, weight: torch.Tensor, chosen: list[int]) -> float:
    """How much of the reader's output the chosen channels predict, by least squares."""
    inner, cross = gram[chosen][:, chosen], gram[chosen]
    found = cross.T @ torch.linalg.pinv(inner) @ cross
    return float((weight.T @ found @ weight).trace())


def test_each_step_takes_the_best_next_channel():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 9, generator=g, dtype=torch.float64) @ torch.randn(9, 9, generator=g, dtype=torch.float64)
    gram, weight = x.T @ x, torch.randn(9, 4, generator=g, dtype=torch.float64)
    order = _order([gram.clone()], [weight]).argsort(descending=True).tolist()
    for step in range(9):
        left = [c for c in range(9) if c not in order[:step]]
        best = max(left, key=lambda c: explained(gram, weight, [*order[:step], c]))
        assert order[step] == best


def test_a_copy_comes_last_however_large():
    gram = torch.diag(torch.tensor([4.0, 3, 2, 1], dtype=torch.float64))
    gram = torch.cat([torch.cat([gram, gram[:, :1]], 1), torch.cat([gram[:1], gram[:1, :1]], 1)])
    assert _order([gram], [torch.ones(5, 1, dtype=torch.float64)]).argmin() in (0, 4)


def test_every_kind_of_coupling(network):
    for group in network.prunable:
        scores = itf.score(network.model, group, "greedy", network.data)
        assert scores[scores > 0].sort().values.tolist() == list(range(int((scores == 0).sum()) + 1, group.size + 1))


def test_dead_channels_come_last(random_weights):
    torch.manual_seed(0)
    model = random_weights(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    )
    model[0].weight.data[[1, 4]], model[0].bias.data[[1, 4]] = 0, -1
    model.card = itf.ModelCard("dead", (0.5,) * 3, (0.3,) * 3, (3, 8, 8), 3, "noise")
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    data = itf.ImageData("noise", "train", images, torch.zeros(30, dtype=torch.int64), tuple("abc"))
    scores = itf.score(model, itf.find_groups(model, torch.zeros(1, 3, 8, 8))[0], "greedy", data)
    assert set(scores.argsort()[:2].tolist()) == {1, 4}


def test_without_images_one_line(networks):
    network = networks("mlp")
    with pytest.raises(itf.IntrafusionError, match="needs images; pass data="):
        itf.score(network.model, network.prunable[0], "greedy")
