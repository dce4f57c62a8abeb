"""The plane through three networks, sharp directions and curves, against what can be computed by hand."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.evaluation.loss_landscape import (
    Surface,
    bezier,
    flatten_weights,
    lanczos,
    losses_at,
    plane_grid,
    plane_through,
    share_within,
    sharpest,
    surface,
    unflatten,
)
from intrafusion.training.loop import judged

G = torch.Generator().manual_seed(0)


def moved(model: nn.Module, by: float) -> nn.Module:
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=G)
    return twin


@pytest.fixture(scope="module")
def three():
    model = itf.load_model("digits-mlp")
    return model, moved(model, 0.02), moved(model, 0.03)


@pytest.fixture(scope="module")
def data():
    return itf.load_data("digits").subset(80)


def test_vectors_are_parameters_and_back(three):
    again = unflatten(three[0], flatten_weights(three[1]))
    assert all(torch.equal(again[name], p) for name, p in three[1].named_parameters())


def test_the_plane_holds_the_three_networks(three):
    made = plane_through(*three)
    for at, model in zip(made.at, three, strict=True):
        torch.testing.assert_close(made.vectors(at[None])[0], flatten_weights(model), rtol=0, atol=1e-9)
    assert made.at[0].tolist() == [0, 0]
    assert abs(float(made.at[1, 1])) < 1e-9
    assert abs(float(made.u @ made.v)) < 1e-9
    distance = (flatten_weights(three[1]) - flatten_weights(three[2])).norm()
    assert float((made.at[1] - made.at[2]).norm()) == pytest.approx(float(distance))  # the picture keeps distances


def test_points_of_the_plane_are_measured_as_the_networks_are(three, data):
    made = plane_through(*three)
    card = three[0].card
    batches = [((data.images.float() / 255 - card.mean[0]) / card.std[0], data.labels)]
    loss, accuracy = losses_at(three[0], made.vectors, made.at, batches)
    for number, model in enumerate(three):
        expected = judged(model, data, card.mean, card.std)
        assert (float(loss[number]), float(accuracy[number])) == pytest.approx(expected, rel=1e-4)


def test_a_surface_grows_from_coarse_to_fine(three, data):
    seen = list(surface(plane_through(*three), data, size=9, stride=4))
    assert [one.loss.shape for one in seen] == [(9, 9)] * 3
    assert [round(one.share * 81) for one in seen] == [9, 25, 81]
    for earlier, later in itertools.pairwise(seen):
        known = np.isfinite(earlier.loss)
        np.testing.assert_array_equal(earlier.loss[known], later.loss[known])
    assert np.isfinite(seen[-1].accuracy).all()


def test_a_slow_surface_tells_of_unfinished_grids(three, data):
    seen = list(surface(plane_through(*three), data.subset(2), size=5, stride=2, patience=0))
    assert [round(one.share * 25) for one in seen] == list(range(1, 26))


def test_a_grid_reaches_beyond_the_networks_by_as_much_on_every_side(three):
    made = plane_through(*three)
    empty, extent = plane_grid(made, 5, 0.5), made.at.max(0).values - made.at.min(0).values
    room = 0.5 * float(extent.max())
    assert (made.at[:, 0].min() - empty.x[0], empty.x[-1] - made.at[:, 0].max()) == pytest.approx((room, room))
    assert (made.at[:, 1].min() - empty.y[0], empty.y[-1] - made.at[:, 1].max()) == pytest.approx((room, room))
    assert (len(empty.x), len(empty.y), empty.share) == (5, 5, 0)


@pytest.mark.parametrize(("size", "margin"), [(1, 0.3), (5, -0.1), (5, float("nan")), (5, float("inf"))])
def test_what_is_no_grid_is_refused(three, size, margin):
    with pytest.raises(itf.IntrafusionError, match="size must be"):
        plane_grid(plane_through(*three), size, margin)


def test_the_finest_even_grid_that_is_measured():
    def seen(*places: int) -> Surface | None:
        accuracy = np.full((5, 5), np.nan)
        for stride in places:
            accuracy[::stride, ::stride] = 0.5
        return Surface(np.arange(5.0), np.arange(5.0), accuracy, accuracy).finest

    assert seen() is None
    assert seen(4).x.tolist() == [0, 4]
    assert seen(4, 2).x.tolist() == [0, 2, 4]
    assert seen(1).accuracy.shape == (5, 5)


def test_networks_on_a_line_have_no_plane(three):
    middle = copy.deepcopy(three[0])
    middle.load_state_dict({name: (value + three[1].state_dict()[name]) / 2 for name, value in three[0].state_dict().items()})
    for second, third in ((three[1], three[1]), (three[0], three[1])):
        with pytest.raises(itf.IntrafusionError, match="collinear"):
            plane_through(three[0], second, third)


def test_other_shapes_have_no_plane(three):
    with pytest.raises(itf.IntrafusionError, match="same weight shapes"):
        plane_through(three[0], three[1], itf.load_model("digits-vgg"))


def test_sharpest_directions_of_a_known_hessian():
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    values = torch.linspace(30, 1, 30, dtype=torch.float64)
    H = Q @ values.diag() @ Q.T
    model = nn.ParameterList([nn.Parameter(torch.randn(30, dtype=torch.float64))])
    found, vectors = sharpest(lambda m: 0.5 * m[0] @ H @ m[0], model, count=3, steps=30)
    torch.testing.assert_close(found, values[:3], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(H @ vectors, vectors * found, rtol=1e-6, atol=1e-6)
    early = next(one for one in lanczos(lambda m: 0.5 * m[0] @ H @ m[0], model, count=3) if one.step == 12)
    assert len(early.values) == 3
    real = (H @ early.vectors - early.vectors * early.values).norm(dim=0)
    torch.testing.assert_close(early.residuals, real, rtol=1e-6, atol=1e-9)
    assert share_within(vectors[:, 0] + vectors[:, 1], vectors) == pytest.approx(1)
    assert share_within(Q[:, -1], vectors) == pytest.approx(0, abs=1e-9)


def test_bezier_ends_where_it_should_and_bends_by_hand():
    ends, bends = torch.randn(2, 5, generator=G).double(), torch.randn(3, 5, generator=G).double()
    points = bezier(ends, bends, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(points[[0, 2]], ends)
    five = torch.cat([ends[:1], bends, ends[1:]])
    torch.testing.assert_close(points[1], (torch.tensor([1.0, 4, 6, 4, 1]).double()[:, None] * five).sum(0) / 16)


def test_several_networks_in_one_pass_answer_as_each_alone(three):
    made, points = plane_through(*three), torch.randn(5, 2, generator=G).double() * 0.5
    batches = [(torch.randn(6, 1, 8, 8, generator=G), torch.arange(6))]
    alone, together = (losses_at(three[0], made.vectors, points, batches, together=count) for count in (1, 3))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
