"""Paths between networks: the curve's ends, its training, BatchNorm measured again at every place."""

import copy
import itertools

import numpy as np
import pytest
import torch

import intrafusion as itf
from intrafusion.evaluation.loss_landscape import flatten_weights, unflatten
from intrafusion.pruning.groups.feature_maps import normalised
from intrafusion.studies.session import open_session
from intrafusion.studies.weight_space import Solutions
from intrafusion.training import mode_connectivity
from intrafusion.training.augment import wobble
from intrafusion.training.batchnorm import measure_norms, norms_of
from intrafusion.training.loop import Diverged, Recipe, judged, train
from intrafusion.training.lr_search import RATES
from intrafusion.training.mode_connectivity import Curve, Walk, _coarse_first, connect, nothing, walk

QUICK = Recipe(1, wobble, 0.03, weight_decay=0.0, batch=64)


@pytest.fixture(scope="module")
def data():
    return itf.load_data("digits").subset(200)


@pytest.fixture(scope="module")
def train_data():
    return itf.load_data("digits", split="train")


@pytest.fixture(scope="module")
def folded():
    spec = itf.PruneSpec(sparsity=0.4, limit=200)
    made = Solutions(spec, open_session(spec))
    return made.whole("dense"), made.whole("fused")


@pytest.fixture(scope="module")
def siblings(train_data):
    """Two solutions with BatchNorm from one start: the same network trained on other batches."""
    torch.manual_seed(0)
    start = itf.load_model("digits-resnet", weights="random")
    for _ in train(start, train_data, Recipe(2, wobble, 0.1, batch=64), start.card.mean, start.card.std):
        pass
    both = copy.deepcopy(start), copy.deepcopy(start)
    for seed, model in enumerate(both):
        for _ in train(model, train_data, Recipe(4, wobble, 0.2, batch=64, seed=seed), model.card.mean, model.card.std):
            pass
    return both


def test_a_curve_has_its_ends_and_begins_straight(folded):
    curve, t = Curve(*folded), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(curve.vectors(t), torch.stack([flatten_weights(one) for one in folded]), rtol=0, atol=0)
    between = torch.linspace(0, 1, 9)
    torch.testing.assert_close(curve.vectors(between), curve.straight(between), rtol=1e-5, atol=1e-6)
    assert [name for name, p in curve.named_parameters() if name.startswith("bends")] == ["bends"]
    assert curve.bends.shape == (3, len(flatten_weights(folded[0])))


def test_every_pass_of_training_is_at_a_place_of_its_own_by_the_seed(folded):
    images = torch.zeros(2, *folded[0].card.input_size)

    def seen(seed: int) -> list[torch.Tensor]:
        curve = Curve(*folded, seed=seed).train()
        return [curve(images) for _ in range(3)]

    first, again, other = seen(0), seen(0), seen(1)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    curve = Curve(*folded).eval()
    assert torch.equal(curve(images), curve(images))


def test_only_the_bends_learn_and_the_networks_stay(folded, train_data):
    before = [flatten_weights(one) for one in folded]
    curve = Curve(*folded)
    inside, bends = flatten_weights(curve.network), curve.bends.detach().clone()
    for _ in train(curve, train_data, QUICK, folded[0].card.mean, folded[0].card.std, parameters=[curve.bends]):
        pass
    assert not torch.equal(curve.bends, bends)
    assert torch.equal(flatten_weights(curve.network), inside)
    assert all(torch.equal(flatten_weights(one), was) for one, was in zip(folded, before, strict=True))
    torch.testing.assert_close(curve.vectors(torch.tensor([1.0]))[0], before[1], rtol=0, atol=0)


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(folded, train_data, tmp_path):
    def trained(keep, stop: int | None = None) -> Curve:
        curve = Curve(*folded)
        card = folded[0].card
        run = train(curve, train_data, QUICK, card.mean, card.std, parameters=[curve.bends], looks=4, keep=keep)
        for _ in itertools.islice(run, stop):
            pass
        run.close()
        return curve

    trained(tmp_path / "run.pt", stop=2)
    assert (tmp_path / "run.pt").exists()
    torch.testing.assert_close(trained(tmp_path / "run.pt").bends, trained(None).bends, rtol=0, atol=0)


class TestConnect:
    def test_the_path_of_folded_networks_is_better_than_the_line(self, folded, train_data, data):
        steps = list(connect(*folded, train_data, data, epochs=3, points=17))
        shares = [step.share for step in steps]
        assert shares == sorted(shares)
        assert shares[-1] == 1
        last = steps[-1]
        assert (last.norms, last.seen, last.count) == (0, 0, 200)
        assert last.rate in RATES
        assert {step.rate for step in steps if step.moments} == {last.rate}
        assert last.curve.loss.mean() < 0.5 * last.line.loss.mean()
        for walked in (last.line, last.curve):
            for place, network in ((0, folded[0]), (-1, folded[1])):
                loss, accuracy = judged(network, data, folded[0].card.mean, folded[0].card.std)
                assert walked.accuracy[place] == pytest.approx(accuracy, abs=1e-9)
                assert walked.loss[place] == pytest.approx(loss, rel=1e-4)

    def test_networks_with_batchnorm_meet_on_a_path(self, siblings, train_data, data):
        *_, last = connect(*siblings, train_data, data, epochs=1.5, rate=0.03, points=9)
        assert last.norms == len(norms_of(siblings[0])) > 0
        assert last.seen == 512
        assert last.curve.accuracy.min() > 0.9
        assert last.curve.loss.mean() <= last.line.loss.mean()

    def test_rows_have_both_walks(self, folded, train_data, data):
        rows = next(connect(*folded, train_data, data, points=5)).rows()
        assert [row["t"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
        assert np.isfinite(rows[0]["line_loss"])
        assert np.isnan(rows[0]["curve_loss"])

    @pytest.mark.parametrize(("last", "match"), [("digits-vgg", "of the same shape"), ("digits-resnet", "same network")])
    def test_what_has_no_path(self, folded, last, match, train_data, data):
        other = folded[0] if last == "digits-resnet" else itf.load_model(last)
        with pytest.raises(itf.IntrafusionError, match=match):
            next(connect(folded[0], other, train_data, data))

    def test_a_folded_network_and_one_with_norms_have_no_path(self, folded):
        with pytest.raises(itf.IntrafusionError, match="of the same shape"):
            Curve(folded[0], itf.load_model("digits-resnet"))

    def test_a_given_rate_is_taken_and_its_divergence_told(self, folded, train_data, data):
        found = next(step for step in connect(*folded, train_data, data, 0.5, 0.02, points=3) if step.moments)
        assert found.rate == 0.02
        with pytest.raises(Diverged, match="learning rate below"):
            list(connect(*folded, train_data, data, 2, 1e30, points=3))

    def test_a_rate_that_a_long_run_does_not_bear_is_made_smaller(self, folded, train_data, data, monkeypatch):
        monkeypatch.setattr(mode_connectivity, "best_rate", lambda probe: 1e6)
        rates = [step.rate for step in connect(*folded, train_data, data, 0.5, points=3)]
        assert rates[0] is None
        assert 1e-5 < rates[-1] < 1e5

    def test_where_no_rate_learns_it_says_so(self, folded, train_data, data, monkeypatch):
        monkeypatch.setattr(mode_connectivity, "best_rate", lambda probe: None)
        with pytest.raises(itf.IntrafusionError, match="choose other ends"):
            list(connect(*folded, train_data, data, points=3))


class TestNorms:
    def test_statistics_are_those_that_torch_measures(self, siblings, train_data):
        network = copy.deepcopy(siblings[0])
        vector = (flatten_weights(siblings[0]) + flatten_weights(siblings[1])) / 2
        parameters = unflatten(network, vector)
        batches = [images for images, _ in normalised(network, train_data.subset(256), 64)]
        measure_norms(network, batches, parameters)
        theirs = copy.deepcopy(siblings[0])
        theirs.load_state_dict(theirs.state_dict() | parameters)
        torch.optim.swa_utils.update_bn(batches, theirs)
        for ours, other in zip(norms_of(network), norms_of(theirs), strict=True):
            torch.testing.assert_close(ours.running_mean, other.running_mean)
            torch.testing.assert_close(ours.running_var, other.running_var)
        assert not network.training

    def test_half_way_the_ends_statistics_would_not_do(self, siblings, train_data, data):
        """What measuring again is for: with the first end's statistics the middle of the line is a worse network."""
        curve = Curve(*siblings)
        *_, walked = walk(curve, data, train_data.subset(512), straight=True, points=3)
        middle = copy.deepcopy(siblings[0])
        middle.load_state_dict(middle.state_dict() | unflatten(middle, curve.straight(torch.tensor([0.5]))[0].detach()))
        loss, _ = judged(middle, data, middle.card.mean, middle.card.std)
        assert walked.loss[1] < loss

    def test_without_images_it_says_so(self, siblings, data):
        with pytest.raises(itf.IntrafusionError, match="needs images"):
            next(walk(Curve(*siblings), data))


def test_a_walk_goes_from_coarse_to_fine(folded, data):
    seen = list(walk(Curve(*folded), data.subset(20), straight=True, points=9))
    assert [round(one.share * 9) for one in seen] == list(range(1, 10))
    assert np.isfinite(seen[1].accuracy[[0, 8]]).all()
    assert sorted(_coarse_first(61)) == list(range(61))
    assert _coarse_first(61)[:5] == [0, 60, 16, 32, 48]


def test_barriers_by_hand():
    t, accuracy = np.array([0, 0.5, 1]), np.zeros(3)
    assert Walk(t, np.array([1.0, 4.0, 2.0]), accuracy).barrier == 2
    assert Walk(t, np.array([1.0, 1.5, 2.0]), accuracy).barrier == 0
    assert nothing(5).share == 0
