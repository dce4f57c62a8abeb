from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

import intrafusion as itf
from intrafusion.pruning.transport.cost import distances_between, unit_vectors
from intrafusion.pruning.transport.planning import block_counts, kept_count, marginal
from intrafusion.pruning.transport.solvers import Problem, exact

EVEN = [("uniform", "uniform"), ("importance", "importance"), ("softmax", "softmax")]  # the reduction holds
MIXED = [("uniform", "importance"), ("importance", "uniform"), ("softmax", "uniform")]


def seeded(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05


def two_layers(rows, columns, biases=None):
    """A perceptron whose hidden channels are read by `columns` (n, o) and written by `rows` (n, d)."""
    rows, columns = torch.as_tensor(rows), torch.as_tensor(columns)
    model = nn.Sequential(nn.Flatten(), nn.Linear(rows.shape[1], len(rows)), nn.ReLU(), nn.Linear(*columns.shape))
    model[1].weight.data, model[3].weight.data = rows.float(), columns.T.float().contiguous()
    model[1].bias.data = torch.zeros(len(rows)) if biases is None else torch.as_tensor(biases).float()
    return model.eval(), itf.find_groups(model, torch.zeros(1, 1, 1, rows.shape[1]))[0]


def random_layers(n=12, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return two_layers(torch.randn(n, d, generator=generator), torch.randn(n, 3, generator=generator))


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("anchors", ["important", "kmeans", "gmm"])
@pytest.mark.parametrize(("source", "target"), EVEN + MIXED)
def test_every_plan_moves_the_source_marginal_onto_the_target_marginal(anchors, source, target, sparsity):
    model, group = random_layers()
    scores = seeded(12)
    plan = itf.plan(model, group, scores, sparsity, anchors=anchors, source=source, target=target)
    n, k = 12, max(1, int(12 * (1 - sparsity)))
    assert plan.coupling.shape == plan.cost.shape == (n, k)
    assert plan.matrix.shape == (k, n)
    assert plan.source.shape == (n,)
    assert plan.target.shape == plan.kept.shape == (k,)
    assert (plan.coupling >= 0).all()
    torch.testing.assert_close(plan.coupling.sum(1), plan.source)
    torch.testing.assert_close(plan.coupling.sum(0), plan.target)
    assert plan.kept.tolist() == sorted(set(plan.kept.tolist()))
    assert plan.kept.min() >= 0
    assert plan.kept.max() < n
    assert int((plan.coupling > 0).sum()) <= n + k - 1
    torch.testing.assert_close(plan.matrix.sum(0), torch.ones(n, dtype=torch.float64))
    expected = {"uniform": torch.full((n,), 1 / n, dtype=torch.float64), "softmax": scores.softmax(0)}
    torch.testing.assert_close(plan.source, expected.get(source, scores / scores.sum()))


@pytest.mark.parametrize(
    ("name", "anchors"),
    [("cifar10-resnet20", "important"), ("resnet-pad", "important"), ("resnet-pad", "kmeans")],
)
@pytest.mark.parametrize(("source", "target"), [*EVEN, MIXED[0]])
def test_blocks_exchange_no_mass(networks, name, anchors, source, target):
    network = networks(name)
    group = network.group("conv1")
    plan = itf.plan(network.model, group, seeded(group.size), 0.5, anchors=anchors, source=source, target=target)
    across = group.block[:, None] != group.block[plan.kept]
    assert across.any()
    assert not plan.coupling[across].any()
    assert torch.isinf(plan.cost[across]).all()
    assert torch.isfinite(plan.cost[~across]).all()
    torch.testing.assert_close(plan.coupling.sum(1), plan.source)
    torch.testing.assert_close(plan.coupling.sum(0), plan.target)
    torch.testing.assert_close(plan.source.sum(), torch.tensor(1.0, dtype=torch.float64))
    if source == "uniform":
        torch.testing.assert_close(plan.source, torch.full_like(plan.source, 1 / group.size))
    if (source, target) in EVEN and anchors == "important":
        torch.testing.assert_close(plan.matrix[:, plan.kept], torch.eye(len(plan.kept), dtype=torch.float64))
    assert plan.kept.tolist() == sorted(plan.kept.tolist())
    assert group.block[plan.kept].bincount().tolist() == block_counts(group.block, group.size // 2)
    assert plan.total_cost < float("inf")


@pytest.mark.parametrize("anchors", ["important", "gmm"])
@pytest.mark.parametrize("normalise", ["source", "target", "none"])
def test_normalisations_of_the_applied_matrix(anchors, normalise):
    model, group = random_layers()
    plan = itf.plan(model, group, seeded(12), 0.5, normalise=normalise, target="importance", anchors=anchors)
    ones = {"source": plan.matrix.sum(0), "target": plan.matrix.sum(1), "none": plan.matrix.sum()[None]}[normalise]
    torch.testing.assert_close(ones, torch.ones_like(ones))
    positive = plan.matrix > 0
    assert torch.equal(positive, plan.coupling.T > 0)


@pytest.mark.parametrize("p", [1, 1.5, 2])
@pytest.mark.parametrize("seed", range(3))
def test_kept_channels_keep_themselves(p, seed):
    model, group = random_layers(seed=seed)
    plan = itf.plan(model, group, seeded(12, seed), 0.5, p=p)
    assert plan.reduced
    torch.testing.assert_close(plan.matrix[:, plan.kept], torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("anchors", ["important", "kmeans", "gmm"])
def test_kept_are_the_highest_scores_or_distinct_places(anchors):
    model, group = random_layers()
    scores = seeded(12)
    plan = itf.plan(model, group, scores, 0.5, anchors=anchors)
    assert len(set(plan.kept.tolist())) == 6
    if anchors == "important":
        assert set(plan.kept.tolist()) == set(scores.topk(6).indices.tolist())
    else:
        again = itf.plan(model, group, scores, 0.5, anchors=anchors)
        assert torch.equal(plan.coupling, again.coupling)
        assert not plan.reduced


def test_equal_scores_keep_the_first_channels():
    model, group = random_layers()
    assert itf.plan(model, group, torch.ones(12), 0.5).kept.tolist() == [0, 1, 2, 3, 4, 5]


def problem(n, k, d, p, kind, seed, twins=False):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if twins:
        points[n // 2 :] = points[: n - n // 2].clone()
    scores = seeded(n, seed)
    kept = torch.randperm(n, generator=generator)[:k].sort().values
    a, b = marginal(scores, kind), marginal(scores[kept], kind)
    points = unit_vectors(points)
    return Problem(a.numpy(), b.numpy(), distances_between(points, points[kept], p=p).numpy(), kept.numpy())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(2, 24),
    share=st.floats(0, 1),
    d=st.integers(1, 8),
    p=st.sampled_from([1, 1.5, 2, 3]),
    kind=st.sampled_from(["uniform", "importance", "softmax"]),
    seed=st.integers(0, 999),
    twins=st.booleans(),
)
def test_the_reduced_problem_costs_what_the_full_one_does(n, share, d, p, kind, seed, twins):
    k = max(1, round(share * n))
    small = problem(n, k, d, p, kind, seed, twins)
    full = replace(small, kept=None)
    assert small.reducible
    assert not full.reducible
    for coupling in (exact(small), exact(full)):
        np.testing.assert_allclose(coupling.sum(1), small.a, atol=1e-12)
        np.testing.assert_allclose(coupling.sum(0), small.b, atol=1e-12)
        assert (coupling >= 0).all()
        assert (coupling > 1e-15).sum() <= n + k - 1
    assert abs((exact(small) * small.M).sum() - (exact(full) * small.M).sum()) < 1e-9


@pytest.mark.parametrize("kind", ["uniform", "importance"])
def test_the_plan_is_as_cheap_as_an_independent_solvers(kind):
    small = problem(9, 4, 5, 1, kind, seed=1)
    rows, columns = np.kron(np.eye(9), np.ones(4)), np.kron(np.ones(9), np.eye(4))
    oracle = linprog(small.M.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([small.a, small.b]))
    assert oracle.success
    assert (exact(small) * small.M).sum() == pytest.approx(oracle.fun, abs=1e-9)


@pytest.mark.parametrize(("source", "target"), [*EVEN, *MIXED])
def test_the_reduction_is_used_exactly_where_no_residual_is_negative(source, target):
    model, group = random_layers()
    scores = 1.6 ** torch.arange(12, dtype=torch.float64) / 20  # steep: weak and strong channels stay
    plan = itf.plan(model, group, scores, 0.5, source=source, target=target)
    residual = plan.target - plan.source[plan.kept]
    assert plan.reduced == bool(residual.min() >= 0)
    assert plan.reduced == ((source, target) in EVEN)
    full = exact(Problem(plan.source.numpy(), plan.target.numpy(), plan.cost.numpy()))
    assert plan.total_cost == pytest.approx(float((full * plan.cost.numpy()).sum()), abs=1e-9)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_cost_is_the_distance_of_unit_vectors(p):
    rows, columns = [[3.0, 0.0], [0.0, 1.0], [2.0, 0.0]], [[4.0], [0.0], [0.0]]
    model, group = two_layers(rows, columns)
    plan = itf.plan(model, group, torch.tensor([3.0, 2.0, 1.0]), 0.4, p=p)
    units = np.array([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    kept = [0]
    expected = (np.abs(units[:, None] - units[kept][None]) ** p).sum(-1) ** (1 / p)
    assert plan.kept.tolist() == kept
    np.testing.assert_allclose(plan.cost.numpy(), expected, atol=1e-7)


def test_a_layer_that_does_not_hold_a_channel_adds_nothing_to_its_vector(networks):
    network = networks("resnet-pad")
    model, group = itf.fold(network.model, network.example), network.group("conv1")
    # the pads put stage 1 (4 channels) at channels 3 to 6 of 12, and stage 2 (7 channels) at 2 to 8
    first = {"conv1": 3, "layer1.0.conv2": 3, "layer2.0.conv2": 2, "layer3.0.conv2": 0}
    readers = {"layer1.0.conv1": 3, "layer2.0.conv1": 3, "layer3.0.conv1": 2, "linear": 0}
    parts = []
    for layers, axis in ((first, 0), (readers, 1)):
        for name, start in layers.items():
            rows = model.get_submodule(name).weight.double().transpose(0, axis).flatten(1)
            parts.append(torch.zeros(12, rows.shape[1], dtype=torch.float64))
            parts[-1][start : start + len(rows)] = rows
    vectors = torch.cat(parts, 1)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    plan = itf.plan(model, group, seeded(12), 0.5)
    expected = (vectors[:, None] - vectors[plan.kept]).abs().sum(-1)
    together = group.block[:, None] == group.block[plan.kept]
    torch.testing.assert_close(plan.cost[together], expected[together])


def test_biases_are_part_of_the_vector_when_asked():
    rows, columns = [[3.0, 0.0], [3.0, 0.0]], [[4.0], [4.0]]
    model, group = two_layers(rows, columns, biases=[0.0, 12.0])
    scores = torch.tensor([2.0, 1.0])
    assert itf.plan(model, group, scores).cost[1, 0] == 0
    # (3, 0, 4, 0) / 5 and (3, 0, 4, 12) / 13
    expected = 2 * abs(3 / 5 - 3 / 13) - 0 + abs(4 / 5 - 4 / 13) - abs(3 / 5 - 3 / 13) + 12 / 13
    assert itf.plan(model, group, scores, bias=True).cost[1, 0] == pytest.approx(expected)
    same, group = two_layers(rows, columns, biases=[0.0, 0.0])
    assert itf.plan(same, group, scores, bias=True).cost[1, 0] == 0


def test_the_folded_bias_counts_where_a_layer_has_none_of_its_own(networks):
    network = networks("cifar10-resnet20")
    group = network.group("layer1.0.conv1")
    assert network.model.layer1[0].conv1.bias is None
    scores = itf.score(network.model, group)
    with_bias, without = (itf.plan(network.model, group, scores, bias=bias).cost for bias in (True, False))
    assert not torch.allclose(with_bias, without)


def test_the_plan_sees_norms_folded(networks):
    network = networks("resnet-pad")
    folded = itf.fold(network.model, network.example)
    for group in network.prunable:
        scores = seeded(group.size)
        plans = [itf.plan(model, group, scores, bias=True) for model in (network.model, folded)]
        torch.testing.assert_close(plans[0].cost, plans[1].cost, rtol=1e-5, atol=1e-5)


def test_the_scale_of_a_channel_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(6, 4, generator=generator), torch.randn(6, 3, generator=generator)
    scale = torch.tensor([1.0, 10, 0.1, 3, 7, 0.5])[:, None]
    first, second = (itf.plan(*two_layers(rows * by, columns * by), torch.arange(6.0)) for by in (torch.ones(6, 1), scale))
    torch.testing.assert_close(first.cost, second.cost, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("source", "target"), [("uniform", "uniform"), ("importance", "importance")])
def test_a_dropped_duplicate_goes_wholly_to_its_twin(source, target, p):
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)
    twice = torch.arange(8) % 4
    model, group = two_layers(rows[twice], columns[twice])
    scores = torch.tensor([9.0, 9, 9, 9, 1, 1, 1, 1])
    plan = itf.plan(model, group, scores, source=source, target=target, p=p)
    assert plan.kept.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(plan.matrix, torch.eye(4, dtype=torch.float64).repeat(1, 2))
    assert plan.total_cost == 0


DEAD = {
    "a dropped channel": [0],
    "a kept channel": [7],
    "several": [0, 1, 6, 7],
    "all": list(range(8)),
}


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("anchors", ["important", "kmeans", "gmm"])
@pytest.mark.parametrize("kind", ["uniform", "importance", "softmax"])
def test_dead_channels_do_no_harm(dead, anchors, kind):
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)
    rows[DEAD[dead]], columns[DEAD[dead]] = 0, 0
    model, group = two_layers(rows, columns)
    plan = itf.plan(model, group, torch.arange(1.0, 9.0), anchors=anchors, source=kind, target=kind)
    for tensor in (plan.coupling, plan.matrix, plan.cost):
        assert torch.isfinite(tensor).all()
    torch.testing.assert_close(plan.coupling.sum(1), plan.source)
    torch.testing.assert_close(plan.coupling.sum(0), plan.target)
    assert len(set(plan.kept.tolist())) == 4


@pytest.mark.parametrize("kind", ["uniform", "importance", "softmax"])
@pytest.mark.parametrize("scores", [[5.0, 3, 0, 0], [5.0, 0, 0, 0], [0.0, 0, 0, 0], [1000.0, 1000, 0, 0]])
@pytest.mark.parametrize("target", ["same", "uniform"])
def test_channels_without_any_importance_do_no_harm(scores, kind, target):
    model, group = random_layers(n=4)
    target = kind if target == "same" else target
    plan = itf.plan(model, group, torch.tensor(scores), 0.5, source=kind, target=target)
    assert torch.isfinite(plan.matrix).all()
    torch.testing.assert_close(plan.coupling.sum(1), plan.source)
    torch.testing.assert_close(plan.coupling.sum(0), plan.target)


@pytest.mark.parametrize("anchors", ["important", "kmeans", "gmm"])
@pytest.mark.parametrize("kind", ["uniform", "importance"])
def test_sparsity_zero_is_the_identity(anchors, kind):
    model, group = random_layers()
    plan = itf.plan(model, group, seeded(12), 0, anchors=anchors, source=kind, target=kind)
    torch.testing.assert_close(plan.matrix, torch.eye(12, dtype=torch.float64))
    assert plan.total_cost == 0
    assert plan.kept.tolist() == list(range(12))


def test_a_single_target_takes_everything():
    model, group = random_layers()
    plan = itf.plan(model, group, seeded(12), 0.999)
    torch.testing.assert_close(plan.matrix, torch.ones(1, 12, dtype=torch.float64))


BAD = {
    "sparsity of one": ({"sparsity": 1.0}, "sparsity"),
    "sparsity above one": ({"sparsity": 1.3}, "1.3"),
    "negative sparsity": ({"sparsity": -0.1}, "-0.1"),
    "sparsity not a number": ({"sparsity": float("nan")}, "nan"),
    "p below one": ({"p": 0.5}, "0.5"),
    "p not a number": ({"p": float("nan")}, "nan"),
    "unknown source": ({"source": "flat"}, "flat"),
    "unknown target": ({"target": "flat"}, "flat"),
    "unknown anchors": ({"anchors": "heavy"}, "heavy"),
    "unknown solver": ({"solver": "oracle"}, "oracle"),
    "unknown normalisation": ({"normalise": "sideways"}, "sideways"),
    "too few scores": ({"scores": torch.ones(11)}, "12"),
    "too many axes": ({"scores": torch.ones(12, 1)}, "12"),
    "scores that are not numbers": ({"scores": torch.full((12,), torch.nan)}, "finite"),
    "infinite scores": ({"scores": torch.full((12,), torch.inf)}, "finite"),
    "importance marginals of negative scores": (
        {"scores": torch.linspace(-1, 1, 12), "source": "importance"},
        "negative",
    ),
    "importance marginals of negative scores alone": (
        {"scores": torch.linspace(-2, -1, 12), "source": "importance"},
        "negative",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_one_clear_line(case):
    options, words = BAD[case]
    model, group = random_layers()
    with pytest.raises(itf.IntrafusionError) as caught:
        itf.plan(model, group, **{"scores": torch.ones(12), **options})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_with_a_reason_has_no_plan(networks):
    network = networks("mlp")
    with pytest.raises(itf.IntrafusionError, match="outputs"):
        itf.plan(network.model, network.groups[-1], torch.ones(5))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0, 1))
def test_each_block_gets_its_share_and_at_least_one(sizes, share):
    n = sum(sizes)
    k = min(n, max(1, round(share * n)))
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    counts = block_counts(block, k)
    assert sum(counts) == max(k, len(sizes))
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    ideal = [size * k / n for size in sizes]
    if min(ideal) >= 1:
        assert all(abs(count - share) < 1 for count, share in zip(counts, ideal, strict=True))


@pytest.mark.parametrize(("size", "k", "multiple", "expected"), [
    (64, 44, 8, 48), (64, 43, 8, 40), (64, 1, 8, 8), (64, 64, 8, 64), (60, 58, 8, 56), (60, 60, 8, 60), (61, 60, 8, 61),
    (7, 3, 8, 7), (16, 3, 16, 16), (64, 44, 1, 44),
])  # fmt: skip
def test_counts_are_rounded_to_the_nearest_multiple_that_is_there(size, k, multiple, expected):
    assert block_counts(torch.zeros(size, dtype=torch.int64), k, multiple) == [expected]


def test_blocks_are_rounded_each_so_that_every_layer_is():
    block = torch.repeat_interleave(torch.arange(3), torch.tensor([16, 16, 32]))
    assert block_counts(block, 44, 8) == [8, 8, 24]
    assert block_counts(block, 64, 8) == [16, 16, 32]


def test_a_multiple_is_at_least_one():
    with pytest.raises(itf.IntrafusionError, match="round_to must be a whole number of at least 1, not 0"):
        block_counts(torch.zeros(4, dtype=torch.int64), 2, 0)


@pytest.mark.parametrize(
    ("size", "sparsity", "expected"), [(16, 0.3, 11), (16, 0.5, 8), (64, 0.7, 19), (7, 0.99, 1), (2, 0.5, 1), (5, 0, 5)]
)
def test_kept_count_rounds_down_and_never_to_nothing(size, sparsity, expected):
    assert kept_count(size, sparsity) == expected


@pytest.mark.parametrize("size", [*range(1, 130), 160, 320, 576, 960, 1280, 2048])
def test_kept_count_is_that_of_exact_arithmetic(size):
    for thousandths in range(0, 1000, 5):
        right = max(1, size * (1000 - thousandths) // 1000)
        assert kept_count(size, thousandths / 1000) == right, thousandths


def test_a_sparsity_that_is_a_sum_of_floats_keeps_as_many_channels():
    assert kept_count(10, 0.1 + 0.2) == kept_count(10, 0.3) == 7
    assert kept_count(20, 0.1 * 3) == 14
