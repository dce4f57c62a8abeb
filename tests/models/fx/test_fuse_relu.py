import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from intrafusion.models.fx.fuse_relu import conv_relu, join_relus
from intrafusion.models.fx.partition import Cuts

CASES = {
    "3x3": {"kernel_size": 3},
    "1x1": {"kernel_size": 1},
    "no bias": {"kernel_size": 3, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2},
    "stride across": {"kernel_size": (3, 1), "stride": (1, 3)},
    "padding": {"kernel_size": 3, "padding": 1},
    "wide padding": {"kernel_size": (1, 5), "padding": (3, 2), "stride": 2},
    "dilation": {"kernel_size": 3, "dilation": (1, 2), "padding": 2},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "groups, stride, no bias": {"kernel_size": 3, "stride": 2, "groups": 3, "bias": False, "padding": 1},
}
KINDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}  # bf16 keeps 8 bits, once more on the way


def drawn(case: dict, kind: torch.dtype = torch.float32) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, **case).to(kind).to(memory_format=torch.channels_last)
    return layer.requires_grad_(False), torch.randn(3, 6, 9, 11, dtype=kind).to(memory_format=torch.channels_last)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert (actual == 0).any()
    assert (actual > 0).any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.inference_mode()
def test_joined_is_one_after_the_other(case, kind):
    layer, x = drawn(case, kind)
    plain, kept = layer(x), x.clone()
    other = torch.randn_like(plain)
    others = {
        "none": None,
        "same": other,
        "contiguous": other.contiguous(),
        "a channel each": other[:1, :, :1, :1],
        "an image each": other[:, :1, :1, :1],
        "a row": other[..., :1, :],
        "one number": -plain.std() / 2,
    }
    for name, other in others.items():
        before = None if other is None else other.clone()
        expected = F.relu(plain if other is None else plain + other)
        found = conv_relu(layer, x, other)
        assert found.dtype == kind, name
        close(found, expected, KINDS[kind])
        assert torch.equal(x, kept)
        assert other is None or torch.equal(other, before)


@torch.inference_mode()
def test_a_sum_that_broadcasts_the_convolution():
    """As where a pooled branch is added to every pixel."""
    layer, x = drawn({"kernel_size": 1})
    other = torch.randn(3, 12, 5, 4)
    pooled = x.mean((2, 3), keepdim=True)
    close(conv_relu(layer, pooled, other), F.relu(layer(pooled) + other), 1e-5)


@pytest.mark.gpu
@torch.inference_mode()
def test_on_the_gpu_it_is_done_step_by_step():
    layer, x = drawn({"kernel_size": 3, "padding": 1})
    layer, x = layer.cuda(), x.cuda()
    other = torch.randn_like(layer(x))
    close(conv_relu(layer, x, other), F.relu(layer(x) + other), 1e-5)


class Net(nn.Module):
    def __init__(self, step, **options) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1, **options), nn.Conv2d(3, 3, 1)
        self.relu, self.step = nn.ReLU(), step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def joined(net: nn.Module) -> tuple[int, fx.GraphModule]:
    """How many convolutions of a network were joined, and the network with them."""
    graph = fx.Tracer().trace(net)
    join_relus(graph, net)
    graph.lint()
    return sum(node.target is conv_relu for node in graph.nodes), fx.GraphModule(net, graph)


def _read_again(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return F.relu(y) + y


def _sum_read_again(net: Net, x: Tensor) -> Tensor:
    y = net.a(x) + x
    return F.relu(y) * y


def _summed_with_itself(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return F.relu(y + y)


def _later(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return F.relu(y + net.b(F.relu(x)))


JOINED = {
    "relu": (lambda net, x: F.relu(net.a(x)), 1),
    "torch.relu": (lambda net, x: torch.relu(net.a(x)), 1),
    "method": (lambda net, x: net.a(x).relu(), 1),
    "sum": (lambda net, x: F.relu(net.a(x) + x), 1),
    "sum the other way": (lambda net, x: F.relu(x + net.a(x)), 1),
    "torch.add": (lambda net, x: F.relu(torch.add(net.a(x), x)), 1),
    "add": (lambda net, x: F.relu(net.a(x).add(x)), 1),
    "two convolutions": (lambda net, x: F.relu(net.a(x) + net.b(x)), 1),
    "one of another": (lambda net, x: F.relu(net.b(F.relu(net.a(x))) + x), 2),
    "what comes later": (_later, 1),
}
ALONE = {
    "read again": (_read_again, 0),
    "a sum that is read again": (_sum_read_again, 0),
    "summed with itself": (_summed_with_itself, 0),
    "a multiple": (lambda net, x: F.relu(torch.add(net.a(x), x, alpha=3)), 0),
    "a number": (lambda net, x: F.relu(net.a(x) + 1.0), 0),
    "a difference": (lambda net, x: F.relu(net.a(x) - x), 0),
    "no convolution": (lambda net, x: F.relu(x + x), 0),
    "another function": (lambda net, x: F.gelu(net.a(x)), 0),
    "a keyword": (lambda net, x: torch.relu(input=net.a(x)), 0),
}


@pytest.mark.parametrize(("step", "count"), [*JOINED.values(), *ALONE.values()], ids=[*JOINED, *ALONE])
@torch.inference_mode()
def test_joins_what_nothing_else_reads(step, count):
    torch.manual_seed(0)
    net, x = Net(step).eval(), torch.randn(2, 3, 5, 5)
    found, graph = joined(net)
    assert found == count
    torch.testing.assert_close(graph(x), net(x))


@pytest.mark.parametrize("options", [{"padding_mode": "reflect"}, {"padding_mode": "circular"}, {"padding": "same"}], ids=str)
@torch.inference_mode()
def test_leaves_alone_padding_of_other_kinds(options):
    net, x = Net(lambda net, x: F.relu(net.a(x))).eval(), torch.randn(2, 3, 5, 5)
    net.a = nn.Conv2d(3, 3, 3, **{"padding": 1, **options})
    found, graph = joined(net)
    assert found == 0
    torch.testing.assert_close(graph(x), net(x))


@torch.inference_mode()
def test_what_a_head_must_hand_on_is_not_joined():
    """The sum in front of the changed layer is read by two: by the ReLU, and by the shortcut."""
    net, x = Net(_read_again).eval(), torch.randn(2, 3, 5, 5)
    cuts = Cuts(net, x)
    (value,) = cuts.head(cuts.input, ("a",))(net, x)
    assert (value < 0).any()
    torch.testing.assert_close(cuts.tail(("a",))(net, value)[0], net(x))


@torch.inference_mode()
def test_a_smaller_network_runs_with_its_own_numbers():
    """The layers are looked up by name, wherever the code was made."""
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Flatten()).eval()
    small = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.ReLU(), nn.Flatten()).eval()
    x = torch.randn(2, 3, 7, 7)
    cuts = Cuts(dense, x)
    torch.testing.assert_close(cuts.tail(cuts.input)(small, x)[0], small(x))
