"""Layers that work on the dense network's outputs give what they give on its inputs."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.evaluation.output_mixing import remixed
from intrafusion.models.fx.partition import trace
from intrafusion.models.fx.sharing import differing
from intrafusion.pruning.groups.bn_folding import fold
from intrafusion.pruning.groups.find import find_groups
from intrafusion.pruning.pruner import prune_groups

Pair = Callable[..., tuple[nn.Sequential, nn.Sequential]]


@pytest.fixture
def pair(random_weights) -> Pair:
    """Two convolutions, and what a merge makes of the channels between them."""

    def made(merge: str, sparsity: float = 0.5, **kinds: object) -> tuple[nn.Sequential, nn.Sequential]:
        torch.manual_seed(0)
        options = {"kernel_size": 3, "padding": 1} | kinds
        body = (nn.Conv2d(8, 12, **options), nn.ReLU(), nn.Conv2d(12, 6, 3))
        model = random_weights(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)))
        groups = find_groups(model, torch.zeros(1, 8, 9, 9))
        return model, prune_groups(model, groups, sparsity, merge=merge, groups=[groups[0].name])

    return made


@pytest.mark.parametrize("merge", ["drop", "fusion"])
@pytest.mark.parametrize("kinds", [{}, {"stride": 2}, {"bias": False}, {"kernel_size": 5}, {"dilation": 2}], ids=str)
def test_the_outputs_are_mixed(pair, merge, kinds):
    dense, small = pair(merge, **kinds)
    mixed, again = remixed(dense, small, ["0"])
    assert again == {"0"}
    x = torch.randn(4, 8, 9, 9)
    torch.testing.assert_close(mixed[0](dense[0](x)), small[0](x), rtol=1e-4, atol=1e-5)
    assert mixed[2] is small[2]
    assert small[0].kernel_size != (1, 1)


@pytest.mark.parametrize("kinds", [{"kernel_size": 1}, {"kernel_size": 3, "groups": 2}], ids=str)
def test_nothing_is_gained(kinds):
    dense = nn.Sequential(nn.Conv2d(8, 12, **kinds))
    assert remixed(dense, small := copy.deepcopy(dense), ["0"]) == (small, frozenset())


def test_what_is_no_combination_runs(pair):
    dense, small = pair("fusion")
    small[0].weight.data[0, 0, 0, 0] += 1e-2
    small[0].weight.data[1:] *= 2
    mixed, again = remixed(dense, small, ["0"])
    x = torch.randn(4, 8, 9, 9)
    expected = small[0](x)
    torch.testing.assert_close(mixed[0](dense[0](x) if again else x), expected, rtol=1e-4, atol=1e-5)
    wide = copy.deepcopy(small)
    wide[0] = nn.Conv2d(8, 20, 3, padding=1)
    assert remixed(dense, wide, ["0"])[1] == frozenset()


def test_dead_channels_do_not_hurt(pair):
    dense, small = pair("drop")
    for layer in (dense[0], small[0]):
        layer.weight.data[2:4] = 0
        layer.bias.data[2:4] = 0
    mixed, again = remixed(dense, small, ["0"])
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(mixed[0](dense[0](x) if again else x), small[0](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", ["drop", "fusion"])
def test_a_tail_of_a_real_network(merge):
    model = itf.load_model("digits-resnet")
    groups = find_groups(model, model.card.example())
    dense = fold(model, model.card.example())
    name = next(group.name for group in groups if group.reason is None and "conv1" in group.name and "." in group.name)
    small = prune_groups(dense, groups, 0.5, merge=merge, groups=[name])
    changed, cuts = differing(dense, small), trace(dense, model.card.example())
    mixed, again = remixed(dense, small, cuts.first_of(changed))
    assert again == {name}
    names = cuts.in_front_of(changed, again)
    x = torch.randn(3, *model.card.input_size)
    with torch.inference_mode():
        values = cuts.head(cuts.input, names)(dense, x)
        torch.testing.assert_close(cuts.tail(names, again)(mixed, *values)[0], small(x), rtol=1e-3, atol=1e-4)
