"""Every solver against POT, against properties, and with every other knob."""

import itertools
import warnings
from dataclasses import replace

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linprog

import intrafusion as itf
from intrafusion.options import CHOICES
from intrafusion.pruning.pruner import prune_groups
from intrafusion.pruning.transport.cost import compare_channels, distances_between, unit_vectors
from intrafusion.pruning.transport.planning import marginal, solve
from intrafusion.pruning.transport.solvers import Problem

SOLVERS = itf.registry("solver")


def random_problem(seed):
    """Unit vectors, a tenth of them dead and a third of them twins; marginals of every kind, scores with ties."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 40, (), generator=generator))
    k = int(torch.randint(1, n + 1, (), generator=generator))
    points = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    if seed % 3 == 0:
        points[n // 2 :] = points[: n - n // 2].clone()
    points[torch.rand(n, generator=generator) < 0.1] = 0
    scores = torch.rand(n, generator=generator, dtype=torch.float64)
    if seed % 2:
        scores = (scores * 3).round() / 3  # ties, and zeros
    kept = scores.argsort(descending=True, stable=True)[:k].sort().values
    source, target = CHOICES["source"][seed % 3], CHOICES["source"][seed // 3 % 3]
    a, b = marginal(scores, source), marginal(scores[kept], target)
    points = unit_vectors(points)
    p = 1 + seed % 2
    return Problem(a.numpy(), b.numpy(), distances_between(points, points[kept], p=p).numpy(), kept.numpy())


@pytest.mark.parametrize("seed", range(200))
def test_exact_costs_what_pots_emd_does(seed):
    problem = random_problem(seed)
    G = SOLVERS["exact"](problem)
    theirs = ot.emd(problem.a, problem.b * (problem.a.sum() / problem.b.sum()), problem.M)
    assert (G * problem.M).sum() == pytest.approx((theirs * problem.M).sum(), abs=1e-9)
    np.testing.assert_allclose(G.sum(1), problem.a, atol=1e-12)
    np.testing.assert_allclose(G.sum(0), problem.b, atol=1e-12)


def test_the_random_problems_try_both_ways():
    assert 50 < sum(random_problem(seed).reducible for seed in range(200)) < 200


@pytest.mark.parametrize("seed", range(12))
def test_a_squared_distance_is_never_reduced(seed):
    problem = random_problem(seed)
    squared = replace(problem, M=problem.M**2, metric=False)
    assert not squared.reducible
    theirs = ot.emd(squared.a, squared.b * (squared.a.sum() / squared.b.sum()), squared.M)
    assert (SOLVERS["exact"](squared) * squared.M).sum() == pytest.approx((theirs * squared.M).sum(), abs=1e-9)


def test_reducing_a_squared_distance_would_be_wrong():
    # three points on a line: with squared costs two short steps are cheaper than one long one, so a kept channel moves on
    places = np.array([0.0, 1.0, 2.0])
    M = (places[:, None] - places[[1, 2]]) ** 2
    problem = Problem(np.full(3, 1 / 3), np.array([1 / 3, 2 / 3]), M, np.array([1, 2]), metric=False)
    best = (SOLVERS["exact"](problem) * M).sum()
    wrong = (SOLVERS["exact"](replace(problem, metric=True)) * M).sum()
    assert best == pytest.approx(2 / 3)
    assert wrong == pytest.approx(4 / 3)


@pytest.mark.parametrize("seed", range(0, 60, 4))
@pytest.mark.parametrize("reg", [0.001, 0.02, 1.0])
def test_sinkhorn_meets_its_marginals_and_costs_no_less_than_exact(seed, reg):
    problem = replace(random_problem(seed), reg=reg)
    G, best = SOLVERS["sinkhorn"](problem), SOLVERS["exact"](problem)
    np.testing.assert_allclose(G.sum(1), problem.a, atol=1e-12)
    np.testing.assert_allclose(G.sum(0), problem.b, atol=1e-12)
    assert (G >= 0).all()
    assert (G * problem.M).sum() >= (best * problem.M).sum() - 1e-12


def test_sinkhorn_goes_from_the_exact_plan_to_independence():
    problem = random_problem(4)
    costs = [(SOLVERS["sinkhorn"](replace(problem, reg=reg)) * problem.M).sum() for reg in (0.02, 0.1, 0.5, 50)]
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx((SOLVERS["exact"](problem) * problem.M).sum(), rel=0.02)
    loose = SOLVERS["sinkhorn"](replace(problem, reg=1e6))
    np.testing.assert_allclose(loose, np.outer(problem.a, problem.b), atol=1e-6)


@pytest.mark.parametrize("seed", range(0, 60, 4))
@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 1.0])
def test_partial_moves_its_share_within_the_marginals(seed, mass):
    problem = replace(random_problem(seed), mass=mass)
    G = SOLVERS["partial"](problem)
    assert G.sum() == pytest.approx(mass * problem.a.sum(), abs=1e-9)
    assert (G.sum(1) <= problem.a + 1e-9).all()
    assert (G.sum(0) <= problem.b + 1e-9).all()
    assert (G * problem.M).sum() <= (SOLVERS["exact"](problem) * problem.M).sum() + 1e-9


def test_partial_leaves_the_farthest_channel_behind():
    M = np.array([[0.0], [1.0], [9.0]])
    G = SOLVERS["partial"](Problem(np.full(3, 1 / 3), np.ones(1), M, np.array([0]), mass=2 / 3))
    np.testing.assert_allclose(G[:, 0], [1 / 3, 1 / 3, 0], atol=1e-12)


def test_unbalanced_solves_its_problem():
    # one source, one target: min g m + r (KL(g | a) + KL(g | b)) has the minimiser sqrt(a b) exp(-m / 2 r)
    M = np.array([[0.7]])
    G = SOLVERS["unbalanced"](Problem(np.ones(1), np.full(1, 0.25), M, reg_m=2.0))
    assert float(G[0, 0]) == pytest.approx(np.sqrt(0.25) * np.exp(-0.7 / (2 * 2.0 * 0.7)), rel=1e-6)


def test_unbalanced_keeps_the_marginals_the_better_the_larger_reg_m():
    problem = random_problem(4)
    gaps = [np.abs(SOLVERS["unbalanced"](replace(problem, reg_m=r)).sum(1) - problem.a).sum() for r in (0.1, 1, 10)]
    assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_cost_at_all_is_no_problem(solver):
    problem = Problem(np.full(4, 0.25), np.full(2, 0.5), np.zeros((4, 2)), np.array([0, 1]))
    G = SOLVERS[solver](problem)
    assert np.isfinite(G).all()
    assert G.sum() == pytest.approx(problem.mass if solver == "partial" else 1, abs=1e-6)


@pytest.mark.parametrize(("knob", "value"), [("reg", 0), ("reg", -1), ("reg_m", float("nan")), ("mass", 0), ("mass", 2)])
def test_bad_strengths_are_one_clear_line(networks, knob, value):
    network = networks("mlp")
    with pytest.raises(itf.IntrafusionError) as caught:
        itf.plan(network.model, network.prunable[0], torch.ones(8), **{knob: value})
    assert knob in str(caught.value)
    assert str(value) in str(caught.value)


COMPARED = [("lp", 1), ("lp", 2), ("cosine", 1)]


def combinations():
    """Every two choices together; centroids, which are slow, with four of the pairs of marginals."""
    few = [("uniform", "uniform"), ("importance", "softmax"), ("softmax", "uniform"), ("importance", "importance")]
    for (i, source), (j, target) in itertools.product(enumerate(CHOICES["source"]), repeat=2):
        yield source, target, CHOICES["normalise"][(i + j) % 3], "important"
    for (source, target), anchors in itertools.product(few, CHOICES["anchors"][1:]):
        yield source, target, "source", anchors


NAMES = ["mlp", "vgg", "resnet-pad"]  # in turn: what a solver sees of a network is its distances


@pytest.mark.parametrize("cost", CHOICES["cost"])
@pytest.mark.parametrize(("distance", "p"), COMPARED)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_combination_of_knobs_works(networks, cost, distance, p, solver):
    turn = CHOICES["cost"].index(cost) + COMPARED.index((distance, p)) + list(SOLVERS).index(solver)
    network = networks(NAMES[turn % 3])
    group = network.prunable[0]
    scores = itf.score(network.model, group)
    geometry = compare_channels(network.model, group, cost=cost, distance=distance, p=p, data=network.data)
    for source, target, normalise, anchors in combinations():
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a solver that does not converge says so
            plan = solve(
                geometry, scores, 0.4, source=source, target=target, normalise=normalise, anchors=anchors, solver=solver
            )
        case = f"{source} {target} {normalise} {anchors}"
        assert torch.isfinite(plan.matrix).all(), case
        assert (plan.coupling >= 0).all(), case
        assert len(set(plan.kept.tolist())) == len(plan.kept), case
        assert 0 <= plan.share_moved <= 1, case
        assert 0 <= plan.entropy <= np.log(plan.coupling.numel()) + 1e-9, case
        assert not plan.coupling[group.block[:, None] != group.block[plan.kept]].any(), case
        if solver in ("exact", "sinkhorn"):
            torch.testing.assert_close(plan.coupling.sum(1), plan.source, msg=case)
            torch.testing.assert_close(plan.coupling.sum(0), plan.target, msg=case)
        rows = plan.source if normalise == "source" else torch.ones(group.size).double()
        columns = plan.target if normalise == "target" else torch.ones(len(plan.kept)).double()
        torch.testing.assert_close(plan.matrix.T * rows[:, None] * columns, plan.coupling, msg=case)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("name", "knobs"), [
    ("mlp", {}), ("vgg", {"cost": "activations"}), ("resnet-pad", {"bias": True}), ("vgg", {"distance": "cosine"}),
    ("resnet-pad", {"anchors": "kmeans", "normalise": "target"}),
], ids=str)  # fmt: skip
def test_whole_networks_are_pruned_with_every_solver(networks, name, solver, knobs):
    network = networks(name)
    small = prune_groups(network.model, network.groups, 0.4, solver=solver, data=network.data, **knobs)
    logits = small(network.images)
    assert logits.shape == network.logits.shape
    assert torch.isfinite(logits).all()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.model.parameters())


def spread_problem(seed):
    """Masses that are dozens of powers of ten apart, some of them zero; the targets' independent, or the kept channels'."""
    rng = np.random.default_rng(seed)
    n, low = int(rng.integers(3, 12)), float(rng.choice([-6, -15, -20, -60, -250]))
    k = int(rng.integers(1, n))
    a = 10 ** rng.uniform(low, 0, n) * (rng.random(n) > 0.1)
    a[0] = 1
    a /= a.sum()
    points, kept = rng.normal(size=(n, 3)), np.arange(k)
    b = a[:k] if seed % 2 else 10 ** rng.uniform(low, 0, k)
    M = np.linalg.norm(points[:, None] - points[kept], axis=2)
    return Problem(a, b / b.sum(), M, kept, metric=seed % 3 > 0)


def least_cost(problem):
    """By linear programming; None where it fails on such numbers."""
    n, k = problem.M.shape
    sums = np.concatenate([np.kron(np.eye(n), np.ones(k)), np.kron(np.ones(n), np.eye(k))])[:-1]
    precise = {"primal_feasibility_tolerance": 1e-10}
    return linprog(problem.M.ravel(), A_eq=sums, b_eq=np.concatenate([problem.a, problem.b])[:-1], options=precise).fun


def shares(G, masses):
    """Rows of G as shares of the masses, where there are any."""
    return G[masses > 0] / masses[masses > 0, None]


@pytest.mark.parametrize("seed", range(60))
def test_exact_meets_marginals_of_any_size_at_the_least_cost(seed):
    problem = spread_problem(seed)
    G = SOLVERS["exact"](problem)
    np.testing.assert_allclose(G.sum(1), problem.a, rtol=1e-12)
    np.testing.assert_allclose(G.sum(0), problem.b, atol=1e-12)
    best = least_cost(problem)
    assert best is None or (G * problem.M).sum() == pytest.approx(best, abs=1e-8)


def test_linear_programming_has_a_word_on_most_of_them():
    assert sum(least_cost(spread_problem(seed)) is not None for seed in range(60)) > 40


@pytest.mark.parametrize("seed", range(60))
def test_no_solver_makes_much_of_a_tiny_mass(seed):
    problem = spread_problem(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = {solver: SOLVERS[solver](problem) for solver in SOLVERS}
    for solver, G in made.items():
        assert np.isfinite(G).all(), solver
        assert (G >= 0).all(), solver
        assert shares(G, problem.a).sum(1).max() < 2, solver
        assert shares(G.T, problem.b).sum(1).max() < 2, solver
    np.testing.assert_allclose(made["sinkhorn"].sum(1), problem.a, rtol=1e-9)
    np.testing.assert_allclose(made["sinkhorn"].sum(0), problem.b, atol=1e-12)
    assert made["partial"].sum() == pytest.approx(0.9)
    assert (made["partial"].sum(1) <= problem.a * (1 + 1e-9)).all()


@pytest.mark.parametrize("solver", ["exact", "partial"])
@pytest.mark.parametrize("own", [True, False], ids=["kept marginal", "another"])
@pytest.mark.parametrize("seed", range(4))
def test_where_tiny_masses_go_does_not_depend_on_how_tiny_they_are(solver, own, seed):
    rng = np.random.default_rng(seed)
    n, k = 12, 5
    points, kept, goes, another = rng.normal(size=(n, 3)), np.arange(k), rng.random(n - k) + 0.1, rng.random(k)
    M = np.linalg.norm(points[:, None] - points[kept], axis=2)
    found = []
    for tiny in (1e-6, 1e-31, 1e-250):
        a = np.concatenate([np.arange(1.0, k + 1), tiny * goes])
        a /= a.sum()
        b = a[:k] if own else another
        found.append(shares(SOLVERS[solver](Problem(a, b / b.sum(), M, kept)), a)[k:])
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_unbalanced_gives_up_the_same_share_of_masses_however_tiny(seed):
    rng = np.random.default_rng(seed)
    n, k = 12, 5
    points, goes, b = rng.normal(size=(n, 3)), rng.random(n - k) + 0.1, rng.random(k) + 0.1
    M = np.linalg.norm(points[:, None] - points[:k], axis=2)
    found = []
    for tiny in (1e-5, 1e-40):
        G = SOLVERS["unbalanced"](Problem(np.concatenate([b, tiny * goes]), b, M))
        found.append(G[k:].sum(1) / (tiny * goes))
    np.testing.assert_allclose(found[1], found[0], rtol=0.02)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("masses", [
    [1, 0, 0, 0], [1, 5e-324, 1e-310, 0], [0, 0, 5e-324, 1], [5e-324, 5e-324, 1, 1e-320],
], ids=str)  # fmt: skip
def test_masses_that_are_zero_or_subnormal_are_no_problem(solver, masses):
    a, M = np.array(masses), np.abs(np.arange(4.0)[:, None] - np.arange(2))
    for b in (np.array([0.5, 0.5]), np.array([1, 5e-324]), np.array([0.0, 1])):
        G = SOLVERS[solver](Problem(a, b, M, np.arange(2)))
        assert np.isfinite(G).all()
        if solver in ("exact", "sinkhorn"):
            np.testing.assert_allclose(G.sum(1), a, atol=1e-12)
            np.testing.assert_allclose(G.sum(0), b, atol=1e-12)


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_partial_costs_what_pots_does(seed):
    problem = replace(random_problem(seed), mass=0.7)
    theirs = ot.partial.partial_wasserstein(problem.a, problem.b / problem.b.sum(), problem.M, m=0.7)
    assert (SOLVERS["partial"](problem) * problem.M).sum() == pytest.approx((theirs * problem.M).sum(), abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("normalise", CHOICES["normalise"])
@pytest.mark.parametrize("apart", [50, 700, 1e5])
def test_softmax_of_scores_far_apart_leaves_every_kept_channel_in_its_place(networks, solver, normalise, apart):
    network = networks("mlp")
    group = network.prunable[0]
    scores = torch.linspace(0, apart, group.size).double()
    for source, target in itertools.product(CHOICES["source"], CHOICES["source"]):
        plan = solve(
            compare_channels(network.model, group),
            scores,
            0.5,
            source=source,
            target=target,
            solver=solver,
            normalise=normalise,
        )
        assert torch.isfinite(plan.matrix).all()
        assert plan.matrix.max() < 2 * group.size
        if solver == "exact" and source == target == "softmax" and normalise != "none":
            torch.testing.assert_close(plan.stays, plan.source[plan.kept], rtol=1e-9, atol=0)
            torch.testing.assert_close(
                plan.matrix.sum(0 if normalise == "source" else 1),
                torch.ones(plan.matrix.shape[1 if normalise == "source" else 0]).double(),
            )
