"""Networks of one pruning in one weight space: marks as `evaluate` has them, slices, displacements in sharp directions."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import intrafusion as itf
from intrafusion.evaluation.accuracy import size
from intrafusion.evaluation.loss_landscape import flatten_weights, lanczos, losses_at, share_within, unflatten
from intrafusion.pruning.groups.feature_maps import normalised, private
from intrafusion.studies.session import Session, open_session
from intrafusion.studies.weight_space import CONTROLS, MERGED, Sharpness, Solutions, sharpness, slices

GROUP = "layer2.0.conv1"


def solutions(model: str = "digits-resnet", **spec) -> Solutions:
    made = itf.PruneSpec(model=model, sparsity=0.4, limit=300).but(**spec)
    return Solutions(made, open_session(made))


@pytest.mark.parametrize("groups", ["all", (GROUP,)])
@pytest.mark.parametrize("model", ["digits-resnet", "digits-vgg", "digits-mlp"])
def test_marks_are_exactly_what_evaluate_says(model, groups):
    if groups != "all" and model != "digits-resnet":
        groups = (open_session(itf.PruneSpec(model=model)).groups[0].name,)
    made = solutions(model, groups=groups)
    marks = {mark.name: mark for mark in next(slices(made, size=5)).marks}
    dense, data = itf.load_model(model), itf.load_data("digits")
    networks = {"dense": dense} | {
        name: itf.prune(dense, dense.card.example(), 0.4, merge=merge, groups=groups)
        for name, merge in (("dropped", "drop"), ("fused", "fusion"))
    }
    for name, network in networks.items():
        expected = itf.evaluate(network, data, limit=300, seed=0)
        assert (marks[name].accuracy, marks[name].interval, marks[name].count) == (
            expected.accuracy, expected.interval, expected.count,
        )  # fmt: skip


@pytest.mark.parametrize("groups", ["all", (GROUP,)])
def test_the_plane_itself_says_the_same_at_the_marks(groups):
    made = solutions(groups=groups)
    marks, plane = next(slices(made, size=5)).marks, made.plane()
    loss, accuracy = losses_at(plane.model, plane.vectors, plane.at, list(normalised(plane.model, made.images)))
    assert accuracy.tolist() == [mark.accuracy for mark in marks]
    assert loss.tolist() == pytest.approx([mark.loss for mark in marks], rel=1e-4)
    assert [(mark.x, mark.y) for mark in marks] == [tuple(at) for at in plane.at.tolist()]
    moved = [float((flatten_weights(made.whole(mark.name)) - flatten_weights(made.whole("dense"))).norm()) for mark in marks]
    assert [mark.distance for mark in marks] == pytest.approx(moved)


@pytest.mark.parametrize("name", MERGED)
def test_in_the_dense_shape_it_computes_the_same(name):
    made = solutions(groups=(GROUP,))
    inputs, _ = next(normalised(made.whole(name), made.images))
    with torch.inference_mode():
        small, whole = made.small(name)(inputs), made.whole(name)(inputs)
    torch.testing.assert_close(small, whole, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in made.small(name).parameters()) < sum(p.numel() for p in made.whole(name).parameters())


def test_a_slice_grows_and_its_marks_stay():
    found = list(slices(solutions("digits-mlp", limit=50), size=9))
    assert [one.share for one in found] == sorted(one.share for one in found)
    assert (found[0].share, found[-1].share) == (0, 1)
    assert found[0].surface.finest is None
    assert len(found[1].surface.finest.x) == 3
    assert all(one.marks == found[0].marks for one in found)
    rows = found[-1].rows()
    assert [row["kind"] for row in rows] == ["mark"] * 3 + ["point"] * 81
    middle = next(row for row in rows if row["kind"] == "point" and row["x"] == found[-1].surface.x[4])
    assert middle["accuracy"] == found[-1].surface.accuracy[0, 4]


def test_the_grid_does_not_move_the_marks():
    made = solutions("digits-mlp", limit=50)
    coarse, fine = (next(slices(made, size=count, margin=margin)) for count, margin in ((3, 0.1), (9, 1)))
    assert coarse.marks == fine.marks
    assert fine.surface.x[0] < coarse.surface.x[0] < coarse.surface.x[-1] < fine.surface.x[-1]


def test_a_loss_that_is_no_number_is_none_in_a_row():
    found = next(slices(solutions("digits-mlp", limit=50), size=3))
    holes = found.surface.loss.copy()
    holes[0, 0] = np.inf
    seen = replace(found.surface, loss=holes, accuracy=np.where(holes == np.inf, 0.5, np.nan))
    assert [row["loss"] for row in replace(found, surface=seen).rows()[3:]] == [None]


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({"sparsity": 0.0}, "nothing was pruned"),
        ({"groups": ("nowhere",)}, "no group 'nowhere'"),
        ({"criterion": "luck"}, "luck"),
    ],
)
def test_what_cannot_be_is_one_sentence(spec, match):
    with pytest.raises(itf.IntrafusionError, match=match):
        solutions("digits-mlp", **spec).plane()


def test_norms_that_do_not_fold_have_no_plane(networks):
    network = networks("pre-activation")
    session = Session(network.model, list(network.groups), size(network.model, network.example), network.data)
    made = Solutions(itf.PruneSpec(model="pre-activation", dataset="noise", sparsity=0.5), session)
    with pytest.raises(itf.IntrafusionError, match="cannot be folded"):
        made.plane()


def gradient(model, vector, inputs, labels):
    with torch.enable_grad():
        parameters = {name: value.requires_grad_() for name, value in unflatten(model, vector).items()}
        loss = F.cross_entropy(torch.func.functional_call(model, parameters, inputs), labels)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))]).double()


@pytest.fixture(scope="module")
def found() -> tuple[Solutions, list[Sharpness]]:
    made = solutions(groups=(GROUP,))
    return made, list(sharpness(made, images=64, count=4, steps=25))


class TestSharpness:
    def test_is_told_step_by_step(self, found):
        _, steps = found
        assert [one.step for one in steps] == list(range(1, 26))
        assert [bool(one.shares) for one in steps] == [False] * 24 + [True]
        assert steps[-1].share == 1
        assert steps[-1].images == 64
        top = [float(one.values[0]) for one in steps]
        assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(top))  # of a growing space

    def test_directions_are_eigenvectors_by_differences_of_the_gradient(self, found):
        made, _ = found
        model = private(made.whole("dense")).double()
        data = made.session.training(made.spec.but(training=64))
        inputs, labels = (torch.cat(part) for part in zip(*normalised(made.whole("dense"), data), strict=True))
        inputs = inputs.double()
        model.requires_grad_(True)
        *_, last = lanczos(lambda one: F.cross_entropy(one(inputs), labels), model, count=4, steps=25)
        origin, step = flatten_weights(model), 1e-7
        for value, vector in zip(last.values, last.vectors.T, strict=True):
            up, down = (gradient(model, origin + sign * step * vector, inputs, labels) for sign in (1, -1))
            product = (up - down) / (2 * step)
            torch.testing.assert_close(product, value * vector, rtol=0, atol=2e-3 * float(last.values[0]))
        torch.testing.assert_close(last.values.float(), found[1][-1].values.float(), rtol=1e-3, atol=1e-4)

    def test_residuals_shrink_and_vectors_are_orthonormal(self, found):
        made, steps = found
        assert float(steps[-1].residuals[0]) < 1e-3 * float(steps[5].residuals[0])
        model = private(made.whole("dense")).requires_grad_(True)
        inputs, labels = next(normalised(model, made.images.subset(16)))
        *_, last = lanczos(lambda one: F.cross_entropy(one(inputs), labels), model, count=4, steps=8)
        torch.testing.assert_close(last.vectors.T @ last.vectors, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-8)

    def test_random_directions_have_the_share_of_chance(self, found):
        made, steps = found
        shares, dimensions = steps[-1].shares, steps[-1].dimensions
        assert dimensions == len(flatten_weights(made.whole("dense")))
        assert list(shares) == ["dropped", "fused", "random", "random, changed weights"]
        spread = 4 / (2 * CONTROLS * 4) ** 0.5  # chi-squared with 4 degrees of freedom, mean of CONTROLS
        assert shares["random"] == pytest.approx(4 / dimensions, rel=4 * spread)
        assert shares["random, changed weights"] > 0
        assert all(0 <= share <= 1 for share in shares.values())


def test_every_displacement_lies_in_all_directions():
    made = solutions("digits-mlp", groups=("3",))
    origin = flatten_weights(made.whole("dense"))
    displacement = flatten_weights(made.whole("fused")) - origin
    basis = torch.linalg.qr(torch.stack([displacement, torch.randn(len(origin), dtype=torch.float64)], 1)).Q
    assert share_within(displacement, basis) == pytest.approx(1)
