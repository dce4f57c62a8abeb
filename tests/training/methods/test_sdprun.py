"""SDprun: plain SGD where it has no strength, gRDA where groups are single weights, and channels that can be removed."""

import copy

import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.training.methods.sdprun import Channels, SDprun, channels_of, without_zeroed, zeroed

G = torch.Generator().manual_seed(0)


def steps(model: nn.Module, optimiser: torch.optim.Optimizer, images: torch.Tensor, count: int = 5) -> None:
    model.requires_grad_(True).train()
    torch.manual_seed(0)  # of dropout
    for number in range(count):
        optimiser.zero_grad()
        (model(images).square().mean() * (1 + number)).backward()
        optimiser.step()
    model.eval().requires_grad_(False)


def test_without_strength_it_is_sgd_bit_for_bit(network):
    ours, theirs = copy.deepcopy(network.model), copy.deepcopy(network.model)
    steps(ours, SDprun(channels_of(ours, network.groups), lr=0.01, c=0.0), network.images)
    steps(theirs, torch.optim.SGD(theirs.parameters(), lr=0.01), network.images)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_groups_of_one_are_grda():
    lr, c, mu = 0.1, 0.05, 0.6
    w = nn.Parameter(torch.randn(50, generator=G))
    A = torch.randn(50, 50, generator=G) / 7
    optimiser = SDprun([w], lr=lr, c=c, mu=mu)
    v, x, a = w.detach().double().clone(), w.detach().double().clone(), 0.0
    for t in range(1, 30):
        optimiser.zero_grad()
        (0.5 * (A @ w).square().sum()).backward()
        optimiser.step()
        v = v - lr * (A.double().T @ (A.double() @ x))
        a = c * lr**0.5 * (t * lr) ** mu
        x = v.sign() * (v.abs() - a).clamp(min=0)
        torch.testing.assert_close(w.detach().double(), x, rtol=1e-4, atol=1e-5)
    assert optimiser.thresholds() == pytest.approx([a])
    assert (w == 0).any()
    assert (w != 0).any()


def test_a_small_channel_is_exactly_zero_and_can_revive():
    w = nn.Parameter(torch.tensor([[0.1, 0.1], [3.0, 4.0]]))
    channels = Channels("g", ((w, torch.arange(2)[:, None]),))
    optimiser = SDprun([channels], lr=1.0, c=1.0, mu=0.5)
    w.grad = torch.zeros_like(w)
    optimiser.step()
    assert optimiser.thresholds() == pytest.approx([1.0])
    assert torch.equal(w[0], torch.zeros(2))
    torch.testing.assert_close(w[1].detach(), torch.tensor([3.0, 4.0]) * (1 - 1 / 5))
    w.grad = torch.tensor([[-9.0, -9.0], [0.0, 0.0]])
    optimiser.step()
    assert float(w[0].detach().norm()) > 1


def test_in_flat_directions_it_moves_and_in_the_others_it_does_not():
    """On (w1 - 1)^2 the minimum stays; w2, which the loss does not see, goes to zero."""
    w = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimiser = SDprun([w], lr=0.01, c=0.05, mu=0.6)
    for _ in range(3000):
        optimiser.zero_grad()
        (20 * (w[0] - 1) ** 2).backward()
        optimiser.step()
    assert w[1].item() == pytest.approx(max(0, 1 - optimiser.thresholds()[0]), abs=1e-4)
    assert abs(w[0].item() - 1) < 0.02 * abs(w[1].item() - 1)


def test_relative_strength_means_the_same_in_every_network():
    for scale in (1.0, 10.0):
        w = nn.Parameter(scale * torch.ones(4, 9))
        optimiser = SDprun([Channels("g", ((w, torch.arange(4)[:, None]),))], lr=1.0, c=0.5, mu=0.5, relative=True)
        w.grad = torch.zeros_like(w)
        optimiser.step()
        torch.testing.assert_close(w.detach(), torch.full((4, 9), 0.5 * scale))


def test_what_is_zero_can_be_removed_and_nothing_changes(network):
    """On every kind of coupling: a third of each group's channels is zeroed as the optimizer does it."""
    model = copy.deepcopy(network.model)
    channels = [one for one in channels_of(model, network.groups) if isinstance(one, Channels)]
    for one in channels:
        factors = torch.ones(one.size)
        factors[torch.randperm(one.size, generator=G)[: one.size // 3]] = 0
        one.scale_(factors, lambda p: p.data)
    assert {name: int(gone.sum()) for name, gone in zeroed(channels).items()} == {one.name: one.size // 3 for one in channels}
    small = without_zeroed(model, network.example)
    before = model(network.images)
    torch.testing.assert_close(small(network.images), before, rtol=0, atol=1e-5 * float(before.abs().max().clamp(min=1)))


def test_removing_makes_it_smaller(networks):
    network = networks("vgg")
    model = copy.deepcopy(network.model)
    first = next(one for one in channels_of(model, network.groups) if isinstance(one, Channels))
    first.scale_((torch.arange(first.size) > 1).float(), lambda p: p.data)
    small = without_zeroed(model, network.example)
    assert small.get_submodule(first.name).out_channels == first.size - 2


def test_training_zeroes_channels_of_a_real_network():
    data = itf.load_data("digits", "train")
    model = itf.load_model("digits-vgg", weights="random")
    example = model.card.example()
    channels = channels_of(model, itf.find_groups(model, example))
    optimiser = SDprun(channels, lr=0.1, c=1.0, mu=0.51)
    model.requires_grad_(True).train()
    images = (data.images.float() / 255 - 0.5) / 0.3
    for _ in range(2):
        for rows in torch.randperm(len(data), generator=G).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), data.labels[rows]).backward()
            optimiser.step()
    model.eval().requires_grad_(False)
    torch.testing.assert_close(without_zeroed(model, example)(images[:50]), model(images[:50]), rtol=1e-4, atol=1e-4)


BAD = {"lr": {"lr": 0.0}, "c": {"c": -1.0}, "mu": {"mu": 1.0}, "mu is no number": {"mu": float("nan")}}


@pytest.mark.parametrize("case", BAD)
def test_settings_out_of_range_are_one_line(case):
    with pytest.raises(itf.IntrafusionError, match="must be a number"):
        SDprun([nn.Parameter(torch.ones(2))], **BAD[case])


def test_nothing_to_optimise_is_one_line():
    with pytest.raises(itf.IntrafusionError, match="no parameters to optimise"):
        SDprun([])
