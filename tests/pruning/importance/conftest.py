"""Two networks to work out by hand, and Torch-Pruning as the other opinion."""

import pytest
import torch
from torch import nn

import intrafusion as itf


@pytest.fixture
def hand_net():
    """Two hidden channels: row sums 3 and 3.5, column sums 4 and 1; in squares 5 and 9.25, 16 and 1."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    model[1].weight.data = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    model[1].bias.data = torch.tensor([100.0, -100.0])  # biases do not count
    model[3].weight.data = torch.tensor([[4.0, -1.0], [0.0, 0.0]])
    return model, itf.find_groups(model, torch.zeros(1, 1, 1, 2))[0]


@pytest.fixture
def even_net():
    """One pixel x -> h = (x, 2x) -> logits (4x, 4x), so p = (1/2, 1/2): (model, group, data), images x = 1 and 0.2.

    At label 0 the loss's slope is (-1/2, 1/2) at the logits and (1, -1/2) at h; at label 1 it is the opposite.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).eval()
    model[1].weight.data = torch.tensor([[1.0], [2.0]])
    model[3].weight.data = torch.tensor([[2.0, 1.0], [4.0, 0.0]])
    model.card = itf.ModelCard("even", (0.0,), (1.0,), (1, 1, 1), 2, "two pixels")
    images = torch.tensor([255, 51], dtype=torch.uint8).view(2, 1, 1, 1)
    data = itf.ImageData("two pixels", "test", images, torch.tensor([0, 1]), ("a", "b"))
    return model, itf.find_groups(model, model.card.example())[0], data


@pytest.fixture(scope="session")
def torch_pruning():
    """Torch-Pruning's score of the group of layer `name`, on a network whose gradients are there if it needs them."""
    import torch_pruning as tp

    def score(model: nn.Module, name: str, importance) -> torch.Tensor:
        layer = model.get_submodule(name)
        graph = tp.DependencyGraph().build_dependency(model, model.card.example())
        pruner = graph.get_pruner_of_module(layer).prune_out_channels
        return importance(graph.get_pruning_group(layer, pruner, list(range(layer.weight.shape[0])))).detach().double()

    return score


@pytest.fixture(scope="session")
def same_up_to_scale():
    """Asserts that two criteria give the same scores but for a factor."""

    def check(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-4) -> None:
        actual, expected = (torch.as_tensor(scores).double() for scores in (actual, expected))
        torch.testing.assert_close(actual / actual.mean(), expected / expected.mean(), rtol=rtol, atol=1e-7)

    return check
