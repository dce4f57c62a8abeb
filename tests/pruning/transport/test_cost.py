import contextlib
import copy
import threading

import numpy as np
import pretend_device
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn

import intrafusion as itf
from intrafusion.pruning.transport import cost
from intrafusion.pruning.transport.cost import (
    Geometry,
    _centroids,
    activation_vectors,
    compare_channels,
    distances_between,
    embed,
    pairwise,
    unit_vectors,
)
from intrafusion.runtime.cancellation import Cancelled, stoppable

MEASURES = [("lp", 1, "cityblock"), ("lp", 2, "euclidean"), ("lp", 3, "minkowski"), ("cosine", 1, "cosine")]


def points(n=7, d=200, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("distance", "p", "theirs"), MEASURES)
def test_distances_are_scipys(distance, p, theirs):
    rows, others = unit_vectors(points(150)), unit_vectors(points(4, seed=1))
    options = {"p": p} if theirs == "minkowski" else {}
    np.testing.assert_allclose(pairwise(rows, distance, p), cdist(rows, rows, theirs, **options), atol=1e-12)
    np.testing.assert_allclose(distances_between(rows, others, distance, p), cdist(rows, others, theirs, **options), atol=1e-12)


@pytest.mark.parametrize(("distance", "p", "theirs"), MEASURES)
def test_distances_are_symmetric_and_zero_between_twins(distance, p, theirs):
    rows = unit_vectors(torch.cat([points(70), points(70)]))
    distances = pairwise(rows, distance, p)
    assert torch.equal(distances, distances.T)
    assert not distances.diagonal().any()
    assert not distances[torch.arange(70), torch.arange(70) + 70].any()


@pytest.mark.parametrize("distance", ["lp", "cosine"])
def test_only_norms_claim_to_be_metrics_and_they_are(distance):
    turns = torch.linspace(0, torch.pi, 9, dtype=torch.float64)
    rows = torch.stack([turns.cos(), turns.sin()], 1)
    D = pairwise(rows, distance, 2 if distance == "lp" else 1)
    detour = (D[:, :, None] + D[None]).amin(1)  # the shortest way over a third channel
    metric = Geometry(rows, D, torch.zeros(9, dtype=torch.int64), distance, 1).metric
    assert bool((detour >= D - 1e-12).all()) == metric == (distance == "lp")


def two_channels(second):
    """Channel 0 carries x, channel 1 carries `second` times x; one linear layer reads both."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False), nn.Linear(2, 2)).eval()
    model[1].weight.data = torch.tensor([[1.0], [second]])
    model.card = itf.ModelCard("two", (0.0,), (1.0,), (1, 1, 1), 2, "two")
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    data = itf.ImageData("two", "train", images, torch.tensor([0, 1, 0]), ("a", "b"))
    return model, itf.find_groups(model, torch.zeros(1, 1, 1, 1))[0], data


def test_activation_vectors_are_what_the_consumers_read():
    model, group, data = two_channels(-3.0)
    expected = torch.tensor([[0, 0.2, 1], [0, -0.6, -3]], dtype=torch.float64)
    torch.testing.assert_close(activation_vectors(model, group, data), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("second", "distance", "expected"), [
    (2.0, "lp", 0.0), (-1.0, "lp", 2 * 1.2 / np.hypot(0.2, 1)), (-1.0, "cosine", 2.0), (5.0, "cosine", 0.0),
])  # fmt: skip
def test_activation_distances_by_hand(second, distance, expected):
    model, group, data = two_channels(second)
    geometry = compare_channels(model, group, cost="activations", distance=distance, data=data)
    assert float(geometry.distances[0, 1]) == pytest.approx(expected, abs=1e-6)


def test_channels_with_the_same_activations_are_near_though_their_weights_are_far():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False), nn.Linear(3, 2)).eval()
    model[1].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    model.card = itf.ModelCard("grey", (0.5, 0.5), (1.0, 1.0), (2, 1, 1), 2, "grey")
    grey = torch.arange(0, 250, 10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 1, 1)  # both inputs always equal
    data = itf.ImageData("grey", "train", grey, torch.zeros(25, dtype=torch.int64), ("a", "b"))
    group = itf.find_groups(model, torch.zeros(1, 2, 1, 1))[0]
    by_weights = compare_channels(model, group).distances
    by_activations = compare_channels(model, group, cost="activations", data=data).distances
    assert by_weights[0, 1] > 0.5
    assert by_activations[0, 1] == 0
    assert by_activations[0, 2] > 0.5


def test_many_positions_are_sampled_the_same_for_every_channel(networks, monkeypatch):
    network = networks("vgg")
    monkeypatch.setattr("intrafusion.pruning.transport.cost._COORDINATES", 48)  # two of sixteen positions an image
    twins = network.model.features[0]
    group = network.prunable[0]
    vectors = activation_vectors(network.model, group, network.data, seed=3)
    assert vectors.shape == (6, 48)
    assert torch.equal(vectors, activation_vectors(network.model, group, network.data, seed=3))
    assert not torch.equal(vectors, activation_vectors(network.model, group, network.data, seed=4))
    assert twins.out_channels == 6
    whole = {round(v, 5) for v in _all_activations(network, group)[2].tolist()}
    assert {round(v, 5) for v in vectors[2].tolist()} <= whole


def _all_activations(network, group):
    from intrafusion.pruning.groups.feature_maps import feature_maps

    return torch.cat([maps.flatten(2).transpose(0, 1).flatten(1) for b in feature_maps(network.model, group, network.data)
                      for _, maps in b], 1)  # fmt: skip


def test_every_network_has_activation_costs(network):
    for group in network.prunable:
        geometry = compare_channels(network.model, group, cost="activations", data=network.data)
        together = group.block[:, None] == group.block
        assert torch.isfinite(geometry.distances[together]).all()
        assert torch.isinf(geometry.distances[~together]).all()
        assert geometry.distances[together].max() > 0


BAD = {
    "an unknown cost": ({"cost": "vibes"}, "unknown cost 'vibes'"),
    "an unknown distance": ({"distance": "far"}, "unknown distance 'far'"),
    "p below one": ({"p": 0.5}, "0.5"),
    "cosine with p": ({"distance": "cosine", "p": 2}, "has no p"),
    "activations with bias": ({"cost": "activations", "bias": True}, "include biases"),
    "activations without images": ({"cost": "activations", "data": None}, "needs images"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_means_nothing_is_one_clear_line(networks, case):
    network = networks("mlp")
    options, words = BAD[case]
    with pytest.raises(itf.IntrafusionError) as caught:
        compare_channels(network.model, network.prunable[0], **({"data": network.data} | options))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet-pad"])
def test_a_map_has_one_finite_place_a_channel(networks, name, method):
    network = networks(name)
    geometry = compare_channels(network.model, network.prunable[0])
    places, words = embed(geometry, method)
    assert places.shape == (network.prunable[0].size, 2)
    assert torch.isfinite(places).all()
    assert torch.equal(places, embed(geometry, method)[0])
    assert ("PCA" if method == "pca" else "t-SNE") in words


def test_the_pca_map_is_scikit_learns(networks):
    from sklearn.decomposition import PCA

    network = networks("digits-vgg")
    geometry = compare_channels(network.model, network.prunable[0])
    places, words = embed(geometry)
    theirs = PCA(2).fit(geometry.vectors.numpy())
    expected = theirs.transform(geometry.vectors.numpy())
    np.testing.assert_allclose(places.abs().numpy(), np.abs(expected), atol=1e-9)
    assert f"{theirs.explained_variance_ratio_.sum():.0%}" in words


def test_an_unknown_map_is_one_clear_line(networks):
    network = networks("mlp")
    with pytest.raises(itf.IntrafusionError, match="umap"):
        embed(compare_channels(network.model, network.prunable[0]), "umap")


@pytest.mark.gpu
@pytest.mark.parametrize("cost", ["weights", "activations"])
def test_distances_on_the_gpu_are_the_cpus(networks, cost):
    network = networks("digits-vgg")
    group, there = network.prunable[1], copy.deepcopy(network.model).to("cuda")
    expected = compare_channels(network.model, group, cost=cost, data=network.data).distances
    distances = compare_channels(there, group, cost=cost, data=network.data.to("cuda")).distances
    torch.testing.assert_close(distances, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("distance", "p"), [("lp", 1), ("lp", 2), ("lp", 3), ("cosine", 1)])
def test_many_distances_are_measured_on_the_device_with_one_wait(distance, p, monkeypatch):
    vectors, device = unit_vectors(points(90)), torch.device("cuda")
    rows, kept = torch.arange(10, 80), torch.arange(0, 30, 2)
    block = torch.zeros(90, dtype=torch.int64)
    expected, direct = pairwise(vectors, distance, p), distances_between(vectors[rows], vectors[rows[kept]], distance, p)
    monkeypatch.setattr(cost, "_MANY", 0)
    lazy = cost.UnmeasuredGeometry(vectors, vectors[:0, :0], block, distance, p, device)
    with pretend_device.counting() if pretend_device.install() is None else contextlib.nullcontext({"waits": 1}) as found:
        part = lazy.costs(rows, kept, False)
    assert found["waits"] == 1
    torch.testing.assert_close(part, direct, rtol=0, atol=1e-4)
    whole = pairwise(vectors, distance, p, device)
    assert not torch.equal(whole, expected)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)
    monkeypatch.setattr(cost, "_SAME", 0.0)  # as on a device whose sums are wrong
    assert torch.equal(pairwise(vectors, distance, p, device), expected)


@pytest.mark.parametrize("stays", [True, False])
def test_a_plan_measures_only_what_moves(stays):
    vectors, rows, kept = unit_vectors(points(12)), torch.arange(2, 12), torch.tensor([0, 3, 7])
    lazy = cost.UnmeasuredGeometry(vectors, vectors[:0, :0], torch.zeros(12, dtype=torch.int64), "lp", 1.0)
    costs = lazy.costs(rows, kept, stays)
    whole = distances_between(vectors[rows], vectors[rows[kept]])
    moves = torch.ones(10, dtype=torch.bool).index_fill_(0, kept, False)
    torch.testing.assert_close(costs[moves], whole[moves])
    torch.testing.assert_close(costs[kept].isinf(), (torch.eye(3) == 0) if stays else torch.zeros(3, 3, dtype=torch.bool))


@pytest.mark.parametrize(("n", "d", "k"), [(9, 4, 3), (40, 20, 11), (30, 2, 29)])
def test_kmeans_is_that_of_scikit_learn_with_ten_starts_and_can_be_stopped_between_them(n, d, k):
    from sklearn.cluster import KMeans

    vectors = np.random.default_rng(n).normal(size=(n, d))
    whole = KMeans(k, n_init=10, random_state=3).fit(vectors).cluster_centers_
    assert np.array_equal(_centroids(vectors, k, "kmeans", 3), whole)
    stop = threading.Event()
    stop.set()
    with stoppable(stop), pytest.raises(Cancelled):
        _centroids(vectors, k, "kmeans", 3)
