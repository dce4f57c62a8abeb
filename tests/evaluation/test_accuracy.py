import copy
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.data.datasets import ImageData
from intrafusion.evaluation.accuracy import layer_sizes, size, wilson

CARD = itf.ModelCard("reader", mean=(0.0,), std=(1 / 255,), input_size=(1, 2, 2), classes=4, dataset="toy")


class Reader(nn.Module):
    """Predicts the number written in the first pixel; remembers what it was shown."""

    def __init__(self, card=CARD):
        super().__init__()
        self.card, self.shown = card, []
        self.norm, self.drop = nn.BatchNorm2d(1), nn.Dropout(0.9)

    def forward(self, x):
        self.shown.append(x)
        return -(x[:, 0, 0, 0, None] - torch.arange(4.0)).abs()


def toy(labels, written):
    images = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.as_tensor(written, dtype=torch.uint8)
    return ImageData("toy", "test", images, torch.as_tensor(labels), ("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        # published values of statsmodels' proportion_confint(method="wilson") and of Newcombe 1998, table I
        (8, 10, 0.4902, 0.9433),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_the_interval_is_wilsons(hits, count, low, high):
    assert wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("count", [1, 7, 10_000])
def test_the_interval_is_symmetric_and_holds_the_share(count):
    for hits in {0, 1, count // 2, count}:
        low, high = wilson(hits, count)
        assert 0 <= low <= hits / count <= high <= 1
        assert wilson(count - hits, count) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("hits", "count"), [(1, 0), (-1, 10), (11, 10)])
def test_no_interval_of_impossible_counts(hits, count):
    with pytest.raises(itf.IntrafusionError):
        wilson(hits, count)


def test_accuracy_counts_the_right_answers():
    result = itf.evaluate(Reader(), toy([0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 1, 1, 1, 1]))
    assert (result.accuracy, result.count) == (5 / 8, 8)
    assert result.correct.tolist() == [True, True, True, True, False, True, False, False]
    assert result.interval == wilson(5, 8)


def test_images_are_normalised_by_the_card():
    model = Reader(replace(CARD, mean=(0.2,), std=(0.5,)))
    itf.evaluate(model, toy([0, 0], [0, 255]))
    (shown,) = model.shown
    torch.testing.assert_close(shown[:, 0, 0, 0], torch.tensor([-0.4, 1.6]))


def test_many_batches_are_one_evaluation(monkeypatch):
    labels = torch.arange(10) % 4
    data, model = toy(labels, labels.flip(0)), Reader()
    whole = itf.evaluate(model, data)
    monkeypatch.setattr(sys.modules["intrafusion.data.datasets"], "_PIXELS", 12)  # three images a batch
    model.shown.clear()
    pieces = itf.evaluate(model, data)
    assert [len(batch) for batch in model.shown] == [3, 3, 3, 1]
    assert torch.equal(pieces.correct, whole.correct)
    assert pieces.accuracy == whole.accuracy


@pytest.mark.parametrize(("limit", "count"), [(5, 5), (40, 40), (41, 40), (10_000, 40), (None, 40), (1, 1)])
def test_at_most_limit_images_count(limit, count):
    result = itf.evaluate(Reader(), toy([1] * 40, [1] * 40), limit=limit)
    assert (result.accuracy, result.count, len(result.correct)) == (1.0, count, count)


def test_the_same_seed_takes_the_same_images():
    written = torch.arange(200) % 251
    data, shown = toy([0] * 200, written), []
    for seed in (0, 0, 1):
        model = Reader()
        itf.evaluate(model, data, limit=30, seed=seed)
        shown.append(torch.cat(model.shown)[:, 0, 0, 0].round().int().tolist())
    assert shown[0] == shown[1] != shown[2]
    assert len(set(shown[0])) == 30


def test_different_networks_see_the_same_images():
    labels = torch.arange(100) % 4
    results = [itf.evaluate(Reader(), toy(labels, written), limit=20) for written in (labels, labels.roll(1))]
    assert [result.accuracy for result in results] == [1.0, 0.0]


BAD = {
    "no card": (lambda: nn.Flatten(), lambda: toy([0], [0]), {}, "no card"),
    "images of another size": (
        lambda: Reader(replace(CARD, input_size=(1, 8, 8))),
        lambda: toy([0], [0]),
        {},
        "(1, 2, 2)",
    ),
    "images of other channels": (
        lambda: Reader(replace(CARD, input_size=(3, 2, 2))),
        lambda: toy([0], [0]),
        {},
        "(1, 2, 2)",
    ),
    "more classes than the network knows": (
        lambda: Reader(replace(CARD, classes=3)),
        lambda: toy([0], [0]),
        {},
        "3 classes",
    ),
    "a limit of nothing": (Reader, lambda: toy([0, 1], [0, 1]), {"limit": 0}, "limit"),
    "a negative limit": (Reader, lambda: toy([0, 1], [0, 1]), {"limit": -3}, "-3"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_clear_line(case):
    model, data, options, words = BAD[case]
    with pytest.raises(itf.IntrafusionError) as caught:
        itf.evaluate(model(), data(), **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_mode_of_every_layer_is_kept(training, frozen):
    model = Reader().train(training)
    model.norm.train(frozen)  # a frozen norm in a network in training, or a dropout left on in one that is not
    before = {name: module.training for name, module in model.named_modules()}
    itf.evaluate(model, toy([0, 1], [0, 1]))
    assert {name: module.training for name, module in model.named_modules()} == before


def test_the_mode_is_kept_when_the_network_fails():
    class Failing(Reader):
        def forward(self, x):
            assert not self.training
            raise RuntimeError("out of order")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="out of order"):
        itf.evaluate(model, toy([0], [0]))
    assert model.training


def test_evaluating_touches_neither_the_network_nor_the_data():
    model = itf.load_model("digits-resnet", weights="random").train()
    state, data = copy.deepcopy(model.state_dict()), itf.load_data("digits")
    images = data.images.clone()
    itf.evaluate(model, data, limit=20)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(data.images, images)


def test_sizes_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),  # 4 * 3 * 9 + 4 parameters, each weight at 8 * 8 places
        nn.BatchNorm2d(4),  # 8
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False),  # 4 * 9, at 4 * 4 places
        nn.Flatten(),
        nn.Linear(64, 5),  # 64 * 5 + 5
    ).eval()
    layers = layer_sizes(model, torch.zeros(1, 3, 8, 8))
    assert {name: (s.params, s.macs) for name, s in layers.items()} == {
        "0": (112, 108 * 64),
        "2": (36, 36 * 16),
        "4": (325, 320),
    }
    total = size(model, torch.zeros(1, 3, 8, 8))
    assert (total.params, total.macs) == (112 + 8 + 36 + 325, 108 * 64 + 36 * 16 + 320)


def test_a_layer_used_twice_multiplies_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x.flatten(1)))

    total = size(Twice(), torch.zeros(1, 1, 2, 2))
    assert (total.params, total.macs) == (20, 32)


def test_pruning_shrinks_the_size_as_counted_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    example = torch.zeros(1, 3, 2, 2)
    small = itf.prune(model, example, 0.5)
    assert (size(model, example).params, size(model, example).macs) == (12 * 8 + 8 + 8 * 5 + 5, 12 * 8 + 8 * 5)
    assert (size(small, example).params, size(small, example).macs) == (12 * 4 + 4 + 4 * 5 + 5, 12 * 4 + 4 * 5)
