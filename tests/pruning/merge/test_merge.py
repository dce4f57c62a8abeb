import copy

import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.pruning.merge import MERGES, apply

# neither square nor a selection, rows of different sums, as a plan with uneven marginals gives
T = torch.tensor([[0.2, 1.0, 0.0, 0.7], [0.8, 0.0, 1.0, 0.1]], dtype=torch.float64)
KEPT = torch.tensor([1, 2])
AVERAGE = T / T.sum(1, keepdim=True)


def merged(model, root, example):
    copied = copy.deepcopy(model)
    group = next(group for group in itf.find_groups(model, example) if group.name == root)
    assert group.reason is None
    apply(copied, group, T, KEPT)
    return copied


def place(rows, axis=0):
    """The k rows at the kept channels of n = 4, zeros elsewhere."""
    shape = list(rows.shape)
    shape[axis] = 4
    return torch.zeros(shape, dtype=rows.dtype).index_copy(axis, KEPT, rows)


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def weight(module):
    return module.weight.data.double()


def bias(module):
    return module.bias.data.double()


def test_a_linear_layer_is_the_explicit_matrix_product(random_weights):
    torch.manual_seed(0)
    model = random_weights(nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Linear(4, 3)))
    new = merged(model, "1", torch.zeros(1, 1, 2, 3))
    close(new[1].weight, place(T @ weight(model[1])))
    close(new[1].bias, place(T @ bias(model[1])))
    close(new[2].weight, place(weight(model[2]) @ T.T, axis=1))
    close(new[2].bias, bias(model[2]))
    x = torch.randn(5, 1, 2, 3)
    hidden = x.flatten(1).double() @ weight(model[1]).T + bias(model[1])
    close(new(x), hidden @ T.T @ T @ weight(model[2]).T + bias(model[2]))


def test_a_convolution_is_the_product_over_its_channels(random_weights):
    torch.manual_seed(0)
    model = random_weights(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten()))
    new = merged(model, "0", torch.zeros(1, 2, 5, 5))
    close(new[0].weight, place(torch.einsum("kn,nihw->kihw", T, weight(model[0]))))
    close(new[0].bias, place(T @ bias(model[0])))
    close(new[2].weight, place(torch.einsum("onhw,kn->okhw", weight(model[2]), T), axis=1))
    close(new[2].bias, bias(model[2]))


def test_after_a_flatten_t_acts_on_blocks_of_inputs(random_weights):
    torch.manual_seed(0)
    model = random_weights(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)))
    new = merged(model, "0", torch.zeros(1, 2, 5, 5))
    whole = torch.kron(place(T), torch.eye(9, dtype=torch.float64))  # (4 * 9, 4 * 9): T on channels, one for each pixel
    close(new[3].weight, weight(model[3]) @ whole.T)


def test_a_depthwise_convolution_is_averaged_and_its_bias_summed(random_weights):
    torch.manual_seed(0)
    model = random_weights(
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten())
    )
    new = merged(model, "0", torch.zeros(1, 2, 5, 5))
    close(new[0].weight, place(torch.einsum("kn,nihw->kihw", T, weight(model[0]))))
    close(new[1].weight, place(torch.einsum("kn,nihw->kihw", AVERAGE, weight(model[1]))))
    close(new[1].bias, place(T @ bias(model[1])))
    close(new[3].weight, place(torch.einsum("onhw,kn->okhw", weight(model[3]), T), axis=1))


def test_depthwise_convolutions_of_one_kernel_commute_with_the_merge(random_weights):
    # averaging is right because of this: summed channels through a shared kernel are the sum of its outputs
    torch.manual_seed(0)
    model = random_weights(nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 1), nn.Flatten()))
    model[1].weight.data[:] = model[1].weight.data[0].clone()
    new, x = merged(model, "0", torch.zeros(1, 2, 5, 5)), torch.randn(3, 2, 5, 5)
    hidden = model[:2](x).double()
    close(new[:2](x), place(torch.einsum("kn,bnhw->bkhw", T, hidden), axis=1))


def test_grouped_convolutions_merge_whole_groups(random_weights):
    torch.manual_seed(0)
    model = random_weights(
        nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 3, 1), nn.Flatten())
    )
    new = merged(model, "0", torch.zeros(1, 2, 5, 5))

    def units(tensor, matrix):  # channel 2 j + i is channel i of group j
        rows = tensor.unflatten(0, (4, 2))
        return place(torch.tensordot(matrix, rows, dims=1)).flatten(0, 1)

    close(new[0].weight, units(weight(model[0]), T))
    close(new[2].weight, units(weight(model[2]), AVERAGE))
    close(new[2].bias, units(bias(model[2]), T))
    close(new[3].weight.transpose(0, 1), units(weight(model[3]).transpose(0, 1), T))


def _norm_behind_a_flatten(affine):
    # the flatten keeps the norm from being folded
    return nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Flatten(), nn.BatchNorm1d(4 * 4, eps=0.1, affine=affine), nn.ReLU(), nn.Linear(16, 3)
    )


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_of_one_scale_commutes_with_the_merge(random_weights, affine):
    # y = a x + s with the same a for all: T y = a (T x) + T s, whatever the means and shifts
    torch.manual_seed(0)
    model = random_weights(_norm_behind_a_flatten(affine))
    model[2].running_var.fill_(0.7)
    if affine:
        model[2].weight.data.fill_(1.3)
    new, x = merged(model, "0", torch.zeros(1, 2, 2, 2)), torch.randn(3, 2, 2, 2)
    whole = torch.kron(place(T), torch.eye(4, dtype=torch.float64))
    expected = model[:3](x).double() @ whole.T
    alive = place(torch.ones(2, dtype=torch.float64)).repeat_interleave(4)  # a dead channel's norm may say anything
    close(new[:3](x) * alive, expected)


@pytest.mark.parametrize("affine", [True, False])
def test_a_norms_scale_is_averaged(random_weights, affine):
    torch.manual_seed(0)
    model = random_weights(_norm_behind_a_flatten(affine))
    norm, rows = merged(model, "0", torch.zeros(1, 2, 2, 2))[2], [4, 5, 6, 7, 8, 9, 10, 11]

    def mix(tensor, matrix):
        return (matrix @ tensor.double().view(4, 4)).flatten()

    close(norm.running_mean[rows], mix(model[2].running_mean, T))
    close(norm.running_var[rows], mix(model[2].running_var, AVERAGE))
    if affine:
        close(norm.weight[rows], mix(model[2].weight, AVERAGE))


@pytest.mark.parametrize("name", ["resnet-pad", "pre-activation", "densenet", "multiplier", "resnext", "flat-norm"])
def test_dropping_zeroes_the_dropped_channels_and_changes_nothing_else(networks, name):
    network = networks(name)
    folded = itf.fold(network.model, network.example)
    for group in network.prunable:
        plan = itf.plan(folded, group, itf.score(folded, group, "random"))
        dropped, zeroed = copy.deepcopy(folded), copy.deepcopy(folded)
        MERGES["drop"](dropped, group, plan)
        gone = torch.ones(group.size, dtype=torch.bool)
        gone[plan.kept] = False
        for layer in group.layers:
            for view in layer.views(zeroed).values():
                view[layer.positions[gone & layer.present()]] = 0
        expected = zeroed.state_dict()
        for key, value in dropped.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-7, msg=f"{group.name}: {key}")


@pytest.mark.parametrize("merge", ["drop", "fusion"])
def test_a_merge_leaves_every_layer_outside_the_group_alone(network, merge):
    folded = itf.fold(network.model, network.example)
    state = folded.state_dict()
    group = network.prunable[len(network.prunable) // 2]
    new = copy.deepcopy(folded)
    MERGES[merge](new, group, itf.plan(folded, group, itf.score(folded, group)))
    inside = {layer.name for layer in group.layers}
    assert all(
        torch.equal(value, state[key]) for key, value in new.state_dict().items() if key.rpartition(".")[0] not in inside
    )


def test_fusion_applies_the_plans_matrix(networks):
    network = networks("mlp")
    group = network.group("1")
    plan = itf.plan(network.model, group, itf.score(network.model, group), source="importance", normalise="target")
    by_merge, by_hand = copy.deepcopy(network.model), copy.deepcopy(network.model)
    MERGES["fusion"](by_merge, group, plan)
    apply(by_hand, group, plan.matrix, plan.kept)
    assert all(torch.equal(value, by_hand.state_dict()[key]) for key, value in by_merge.state_dict().items())
    new = plan.matrix @ weight(network.model[1])
    close(by_merge[1].weight[plan.kept], new)
