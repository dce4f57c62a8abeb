"""k-means on inner products: the best of all partitions where these can be counted, scikit-learn's where they cannot."""

import threading
import time
from itertools import product

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

import intrafusion as itf
from intrafusion.pruning.merge import kmeans as module
from intrafusion.pruning.merge.kmeans import gram, kmeans
from intrafusion.runtime.cancellation import Cancelled, stoppable


def drawn(seed: int, n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inertia(vectors: torch.Tensor, labels: torch.Tensor) -> float:
    return sum(float((vectors[labels == one] - vectors[labels == one].mean(0)).square().sum()) for one in labels.unique())


@pytest.mark.parametrize("widths", [(5,), (2, 0, 3), (1,) * 5])
def test_inner_products_add_up_over_parts(monkeypatch, widths):
    monkeypatch.setattr(module, "_STEP", 2 * 7**2)
    vectors = drawn(0, 7, 5)
    torch.testing.assert_close(gram(vectors.split(widths, 1)), vectors @ vectors.T)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_all_partitions_is_found(seed):
    vectors, count = drawn(seed, 6, 3), 2 + seed % 2
    best = min(
        inertia(vectors, labels)
        for labels in map(torch.tensor, product(range(count), repeat=6))
        if len(labels.unique()) == count
    )
    assert inertia(vectors, kmeans(gram([vectors]), count, starts=50)) == pytest.approx(best)


@pytest.mark.parametrize(("seed", "n", "d", "count"), [(0, 40, 3, 4), (1, 60, 100, 30), (2, 25, 9, 24), (3, 50, 1, 7)])
def test_is_as_good_as_scikit_learn(seed, n, d, count):
    vectors = drawn(seed, n, d)
    labels = kmeans(gram([vectors]), count)
    assert labels.unique().tolist() == list(range(count))
    means = torch.stack([vectors[labels == one].mean(0) for one in range(count)])
    assert torch.equal(torch.cdist(vectors, means).argmin(1), labels)
    found = KMeans(count, n_init=10, random_state=0, tol=0).fit(vectors.numpy())
    assert inertia(vectors, labels) <= found.inertia_ * 1.02
    assert np.array_equal(found.labels_, labels.numpy()) or inertia(vectors, labels) != pytest.approx(found.inertia_)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_vectors_make_no_more_clusters_than_there_are_different_ones(count):
    vectors = drawn(0, 3, 4)[[0, 1, 2, 2, 0, 1, 1]]
    labels = kmeans(gram([vectors]), count)
    assert labels.unique().tolist() == list(range(min(count, 3)))
    if count >= 3:
        assert inertia(vectors, labels) == pytest.approx(0)
    assert kmeans(torch.zeros(4, 4, dtype=torch.float64), count).tolist() == [0] * 4


def test_a_cluster_left_empty_takes_the_farthest_vector():
    """Of the means 0, 4 and 20 of these labels the first is nearest to no vector."""
    vectors = torch.tensor([[-6.0], [6.0], [4.0], [4.0], [-7.0], [30.0], [10.0]], dtype=torch.float64)
    labels = module._nearest(gram([vectors]), torch.tensor([0, 0, 1, 1, 2, 2, 2]))
    assert labels.unique().tolist() == [0, 1, 2]
    assert labels[5] != labels[1]


def test_folding_can_be_stopped_at_any_time(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3000, 200), nn.ReLU(), nn.Linear(200, 10)).eval()
    example, times = torch.zeros(1, 3, 10, 100), []
    groups = itf.find_groups(model, example)
    plan = itf.plan(model, groups[0], itf.score(model, groups[0]), 0.5)
    monkeypatch.setattr(module, "checkpoint", lambda: times.append(time.perf_counter()))
    itf.registry("merge")["fold"](model, groups[0], plan)
    assert np.diff(times).max() < 1
    assert len(times) > 1000
    monkeypatch.undo()
    stop = threading.Event()
    stop.set()
    with stoppable(stop), pytest.raises(Cancelled):
        kmeans(torch.eye(3, dtype=torch.float64), 2)
