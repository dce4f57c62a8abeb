import pytest
import torch
from torch import Tensor

from intrafusion.evaluation.bf16_screening import Screen

SEEDS = range(8)


class Net:
    """A network by its logits on N images; bf16's differ by at most `noise` each. looks: images that fp32 ran on."""

    def __init__(self, logits: Tensor, noise: float, generator: torch.Generator):
        self.logits, self.looks = logits, 0
        self.rough = logits + noise * (2 * torch.rand(logits.shape, generator=generator) - 1)

    def best(self, screen: Screen, batch: int = 128) -> Tensor:
        pairs = (((rough,), (exact,)) for rough, exact in zip(self.rough.split(batch), self.logits.split(batch), strict=True))
        return screen.predictions(pairs, lambda v: v[0], self._exact, lambda rows: (self.logits[rows],), batch)

    def _exact(self, values: tuple[Tensor, ...]) -> Tensor:
        self.looks += len(values[0])
        return values[0]


def clear(n: int, classes: int, g: torch.Generator) -> Tensor:
    return 3 * torch.nn.functional.one_hot(torch.randint(0, classes, (n,), generator=g), classes) + near(n, classes, g) / 3


def near(n: int, classes: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, classes, generator=g)


def tied(n: int, classes: int, g: torch.Generator) -> Tensor:
    return near(n, classes, g).round()


def tiny(n: int, classes: int, g: torch.Generator) -> Tensor:
    """All classes alike, but for less than what bf16 loses."""
    return near(n, 1, g) + 1e-3 * near(n, classes, g)


def flat(n: int, classes: int, g: torch.Generator) -> Tensor:
    """A network that answers the same to everything."""
    return torch.ones(n, 1) * near(1, classes, g)


def dead(n: int, classes: int, g: torch.Generator) -> Tensor:
    return torch.zeros(n, classes)


def outlying(n: int, classes: int, g: torch.Generator) -> Tensor:
    """A few images with logits far larger than the others."""
    return near(n, classes, g) * (1 + 50 * (torch.rand(n, 1, generator=g) < 0.01))


@pytest.mark.parametrize("noise", [0, 1e-3, 0.02, 0.3])
@pytest.mark.parametrize(("classes", "count"), [(2, 1500), (10, 1500), (100, 600)])
@pytest.mark.parametrize("draw", [clear, near, tied, tiny, flat, dead, outlying], ids=lambda draw: draw.__name__)
def test_predictions_are_the_exact_ones(draw, classes, count, noise):
    for seed in SEEDS:
        g = torch.Generator().manual_seed(seed)
        screen = Screen()
        for _ in range(3):
            net = Net(draw(count, classes, g), noise, g)
            assert torch.equal(net.best(screen), net.logits.argmax(1)), seed


@pytest.mark.parametrize("noises", [(0.001, 0.003, 0.01, 0.03, 0.1), (0.001, 0.3), (0.3, 0.001, 0.3), (0, 0.05)], ids=str)
@pytest.mark.parametrize("draw", [clear, near, tied], ids=lambda draw: draw.__name__)
def test_errors_that_grow_from_network_to_network_are_found_out(draw, noises):
    for seed in SEEDS:
        g = torch.Generator().manual_seed(seed)
        screen = Screen()
        for noise in noises:
            net = Net(draw(1500, 10, g), noise, g)
            assert torch.equal(net.best(screen), net.logits.argmax(1)), (seed, noise)


def test_logits_that_bf16_cannot_tell_apart():
    """Not even from image to image: they have no spread."""
    g = torch.Generator().manual_seed(0)
    net = Net(100 + 0.01 * near(600, 10, g), 0, g)
    net.rough = net.logits.bfloat16().float()
    assert net.rough.std() == 0
    assert torch.equal(net.best(Screen()), net.logits.argmax(1))


def test_one_large_error_is_remembered():
    """The first image shows it, hundreds show none, and the last one's margin is smaller."""
    g = torch.Generator().manual_seed(0)
    net = Net(clear(600, 10, g), 0, g)
    net.rough[0, 3] += 0.5
    net.logits[599], net.rough[599] = torch.eye(10)[4] * 2, torch.eye(10)[4] * 2
    net.logits[599, 7], net.rough[599, 7] = 2.1, 1.7
    assert net.best(Screen(), 100)[599] == 7


@pytest.mark.parametrize("count", [1, 2, 7, 128, 129, 255, 256])
def test_few_images(count):
    """Fewer than must have been seen before a margin is believed: in as many portions as it takes."""
    g = torch.Generator().manual_seed(count)
    screen = Screen()
    nets = [Net(near(count, 10, g), 0.05, g) for _ in range(4)]
    for net in nets:
        best = net.best(screen)
        assert (best.dtype, best.shape) == (torch.int64, (count,))
        assert torch.equal(best, net.logits.argmax(1))
    assert nets[0].looks == count


@pytest.mark.parametrize("batch", [1, 64, 100, 5000])
def test_whatever_the_batch(batch):
    g = torch.Generator().manual_seed(0)
    screen = Screen()
    for _ in range(2):
        net = Net(near(500, 10, g), 0.02, g)
        assert torch.equal(net.best(screen, batch), net.logits.argmax(1))


class TestPrice:
    """How many images fp32 looks at."""

    def test_large_margins_are_believed(self):
        g = torch.Generator().manual_seed(0)
        screen = Screen()
        nets = [Net(clear(2000, 10, g), 0.02, g) for _ in range(5)]
        for net in nets:
            net.best(screen)
        assert nets[0].looks < 400  # the first network's errors must be seen
        assert all(net.looks < 60 for net in nets[1:])

    def test_each_image_is_looked_at_once_at_most(self):
        g = torch.Generator().manual_seed(0)
        screen = Screen()
        for draw, noise in ((near, 0.01), (near, 0.5), (tiny, 0.5), (near, 10.0)):
            net = Net(draw(1000, 10, g), noise, g)
            net.best(screen)
            assert net.looks <= 1000

    def test_more_noise_costs_more(self):
        looks = []
        for noise in (0.001, 0.01, 0.1):
            g = torch.Generator().manual_seed(0)
            screen = Screen()
            nets = [Net(near(2000, 10, g), noise, g) for _ in range(2)]
            for net in nets:
                net.best(screen)
            looks.append(nets[1].looks)
        assert looks[0] < 60
        assert looks[0] < looks[1] / 2 < looks[2] / 4

    def test_what_is_asked_for_again_is_only_what_was_not_at_hand(self):
        """Errors that turn out larger than thought: more images are doubted than when they passed by."""
        g = torch.Generator().manual_seed(0)
        screen = Screen()
        Net(near(1000, 10, g), 0.001, g).best(screen)
        net, asked = Net(near(1000, 10, g), 0.1, g), []

        def again(rows: Tensor) -> tuple[Tensor]:
            asked.extend(rows.tolist())
            return (net.logits[rows],)

        best = screen.predictions([((net.rough,), (net.logits,))], lambda v: v[0], lambda v: v[0], again, 1000)
        assert torch.equal(best, net.logits.argmax(1))
        assert 0 < len(asked) < 600
        assert len(set(asked)) == len(asked)


def test_several_values_of_several_types():
    """A cut through a residual block hands on two values; bf16 sees them in bf16."""
    g = torch.Generator().manual_seed(0)
    screen = Screen()
    a, b = near(600, 10, g), near(600, 10, g)
    pairs = [((a[i:][:100].bfloat16(), b[i:][:100].bfloat16()), (a[i:][:100], b[i:][:100])) for i in range(0, 600, 100)]

    def logits(values: tuple[Tensor, ...]) -> Tensor:
        first, second = values
        assert first.dtype == second.dtype
        return first - second

    for _ in range(2):
        best = screen.predictions(pairs, logits, logits, lambda rows: (a[rows], b[rows]), 100)
        assert torch.equal(best, (a - b).argmax(1))
