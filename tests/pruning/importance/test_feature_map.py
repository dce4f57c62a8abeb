import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.pruning.importance import feature_map


def pixels(values):
    """Images of one channel, given as rows of pixels between 0 and 1."""
    images = (torch.tensor(values) * 255).round().to(torch.uint8)[:, None]
    return itf.ImageData("pixels", "test", images, torch.full((len(images),), -1), ("a",))


@pytest.fixture
def positive_and_negative():
    """2x2 images x -> channels relu(x), relu(-x) and relu(2x), read by a 1x1 convolution."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 1, 1), nn.Flatten()).eval()
    model[0].weight.data = torch.tensor([1.0, -1.0, 2.0]).view(3, 1, 1, 1)
    model.card = itf.ModelCard("signs", (0.0,), (1.0,), (1, 2, 2), 4, "pixels")
    return model, itf.find_groups(model, model.card.example())[0]


def test_hrank_by_hand(positive_and_negative):
    data = pixels([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(itf.score(*positive_and_negative, "hrank", data).tolist(), [1.0, 0.0, 1.0])


def test_chip_by_hand(positive_and_negative):
    # rows x, 0 and 2x have nuclear norm |x| sqrt(5): 2|x| without the first, |x| without the last
    data = pixels([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    length = (2**0.5 + 2) / 2
    expected = [length * (5**0.5 - 2), 0.0, length * (5**0.5 - 1)]
    torch.testing.assert_close(itf.score(*positive_and_negative, "chip", data).tolist(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (2, 9, 2, 3), (2, 6, 2, 3), (4, 7, 1, 1), (1, 1, 3, 3)])
@pytest.mark.parametrize("held", [1, 100, 1 << 24])
def test_nuclear_losses_are_those_of_a_plain_loop(shape, held, monkeypatch):
    monkeypatch.setattr(feature_map, "_GRAMS", held)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    features[0, 0] = 0
    losses = feature_map.nuclear_losses(features)
    for image, of_image in zip(features.flatten(2).double(), losses, strict=True):
        for channel, loss in enumerate(of_image):
            without = image.clone()
            without[channel] = 0
            expected = torch.linalg.matrix_norm(image, "nuc") - torch.linalg.matrix_norm(without, "nuc")
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert losses[0, 0] == 0


def test_relative_by_hand():
    # h = (x, 2x); the first output reads |4h| and |-h|: shares 2/3 and 1/3; the second reads the last channel alone
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 3)).eval()
    model[1].weight.data = torch.tensor([[1.0], [2.0]])
    model[3].weight.data = torch.tensor([[4.0, -1.0], [0.0, 5.0], [0.0, 0.0]])
    model.card = itf.ModelCard("shares", (0.0,), (1.0,), (1, 1, 1), 3, "pixels")
    group = itf.find_groups(model, model.card.example())[0]
    scores = itf.score(model, group, "relative", pixels([[[1.0]], [[0.2]], [[0.0]]]))  # nothing to share at x = 0
    torch.testing.assert_close(scores.tolist(), [2 / 3 * 2 / 3, 4 / 3 * 2 / 3])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(5, 4, 3, padding=1),
        nn.Conv2d(5, 4, 3, stride=2, bias=False),
        nn.Conv2d(5, 4, (1, 3), padding=2, dilation=2, padding_mode="circular"),
        nn.Linear(5, 4),
    ],
)
def test_shares_are_each_inputs_part_of_the_sum(layer):
    inputs = torch.randn(3, 5, *(() if isinstance(layer, nn.Linear) else (7, 6)))
    magnitudes = feature_map._magnitudes(layer)
    shares = feature_map._shares(magnitudes, inputs)
    assert shares.shape == inputs.shape
    whole = magnitudes(inputs.abs())
    positions = whole[0, 0].numel()
    for channel in range(5):
        alone = torch.zeros_like(inputs)
        alone[:, channel] = inputs[:, channel].abs()
        expected = (magnitudes(alone) / whole).sum() / positions
        torch.testing.assert_close(shares[:, channel].sum(), expected)
    assert float(shares.sum()) == pytest.approx(3.0 * 4, rel=1e-5)  # every output of every image shares out one
    assert layer.weight.min() < 0
