import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.training.recovery import distillation_loss, image_similarity, similarity_loss
from intrafusion.training.recovery.distillation import stages, watching

G = torch.Generator().manual_seed(0)
Q = torch.randn(6, 4, 5, 5, generator=G)


def test_similarity_by_hand():
    features = torch.tensor([[1.0, 0], [1, 1], [0, 2]])
    gram = torch.tensor([[1.0, 1, 0], [1, 2, 2], [0, 2, 4]])
    torch.testing.assert_close(image_similarity(features), gram / gram.norm(dim=1, keepdim=True))
    other = torch.eye(3)
    expected = ((image_similarity(features) - torch.eye(3)) ** 2).sum() / 9
    torch.testing.assert_close(similarity_loss(features, other), expected)


def test_features_that_say_the_same_have_no_loss():
    rotation = torch.linalg.qr(torch.randn(100, 100, generator=G)).Q
    assert float(similarity_loss(Q, Q)) == 0
    assert float(similarity_loss(7.5 * Q, Q)) < 1e-10
    assert float(similarity_loss(Q.flatten(1) @ rotation, Q)) < 1e-10
    assert float(similarity_loss(Q.repeat(1, 3, 1, 1), Q)) < 1e-10  # other widths compare
    assert float(similarity_loss(Q.flip(0), Q)) > 1e-3


def test_distillation_by_hand():
    student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    p = torch.tensor([1.0, 2.718281828459045]) / 3.718281828459045
    q = torch.tensor([0.5**0.5, 1.0])
    q = torch.softmax(torch.tensor([0.5, 0.0]), 0)
    expected = float((p * (p / q).log()).sum()) * 16
    assert float(distillation_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("digits-mlp", ["1", "3"]),
        ("digits-resnet", ["layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2"]),
    ],
)
def test_stages_are_the_last_layers_of_each_size(name, names):
    model = itf.load_model(name)
    assert stages(model, model.card.example())[: len(names)] == names


def test_sizes_of_maps_behind_linear_layers_are_without_their_channels():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.d(self.c(self.b(self.a(x).movedim(1, -1))).mean((1, 2)))

    assert stages(Last(), torch.zeros(1, 3, 8, 8)) == ["c"]


def test_watching_ends():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with watching(model, ["0"]) as seen:
        model(torch.ones(1, 3))
        assert list(seen) == ["0"]
    seen.clear()
    model(torch.ones(1, 3))
    assert not seen
