import copy
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion as itf
from intrafusion.models.fx.partition import Cuts, trace
from intrafusion.models.fx.sharing import differing
from intrafusion.pruning.groups.feature_maps import private
from intrafusion.pruning.groups.norms import fold_groups
from intrafusion.pruning.pruner import prune_groups


def cut_run(cuts: Cuts, dense: nn.Module, small: nn.Module, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """What lies in front of the change, from the dense network, and the logits that the pruned one makes of it."""
    front = cuts.in_front_of(differing(dense, small))
    head, tail = cuts.head(cuts.input, front), cuts.tail(front)
    assert head is not None
    assert tail is not None
    values = head(dense, images)
    return values, tail(small, *values)[0]


def folded(model: nn.Module, groups) -> nn.Module:
    dense = private(model)
    fold_groups(dense, groups)
    return dense


def read_by(model: nn.Module, names: set[str], images: Tensor) -> dict[str, Tensor]:
    """What these layers read while the network runs."""
    read: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: read.update({name: given[0].clone()}))
        for name in names
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return read


class TestPrunedNetworks:
    """Every small network, cut in front of every group."""

    @torch.inference_mode()
    def test_a_cut_network_answers_as_the_whole_one(self, network, same_logits):
        dense = folded(network.model, network.groups)
        cuts = Cuts(dense, network.images)
        for group in network.prunable:
            small = prune_groups(dense, network.groups, 0.5, groups=(group.name,))
            _, logits = cut_run(cuts, dense, small, network.images)
            same_logits(logits, small(network.images))
        small = prune_groups(dense, network.groups, 0.5)
        _, logits = cut_run(cuts, dense, small, network.images)
        same_logits(logits, small(network.images))

    @torch.inference_mode()
    def test_values_in_front_are_what_the_first_changed_layers_read(self, network):
        dense = folded(network.model, network.groups)
        cuts = Cuts(dense, network.images)
        for group in network.kinds:
            small = prune_groups(dense, network.groups, 0.5, groups=(group.name,))
            changed = differing(dense, small)
            values, _ = cut_run(cuts, dense, small, network.images)
            reads = read_by(dense, changed, network.images).values()
            scale = max(float(read.abs().max()) for read in reads)
            found = [any(v.shape == r.shape and (v - r).abs().max() <= 1e-5 * scale for v in values) for r in reads]
            assert any(found), group.name

    @torch.inference_mode()
    def test_from_one_cut_to_the_next(self, network, same_logits):
        """Where the values of one cut suffice for another, they lead to the same ones."""
        dense = folded(network.model, network.groups)
        cuts = Cuts(dense, network.images)
        fronts = list(dict.fromkeys(cuts.in_front_of({layer.name for layer in g.layers}) for g in network.prunable))
        fronts = fronts[:: max(1, len(fronts) // 5)]
        for start in fronts:
            for end in fronts:
                step = cuts.head(start, end)
                if step is None:
                    continue
                values = step(dense, *cuts.head(cuts.input, start)(dense, network.images))
                for value, expected in zip(values, cuts.head(cuts.input, end)(dense, network.images), strict=True):
                    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert cuts.head(fronts[-1], cuts.input) is None or fronts[-1] == cuts.input

    def test_nothing_in_front_of_the_change_runs_the_pruned_network(self, networks):
        network = networks("cifar10-resnet20")
        dense = folded(network.model, network.groups)
        cuts = Cuts(dense, network.images)
        front = cuts.in_front_of({"layer2.1.conv1", "layer2.1.conv2"})
        small = private(dense)
        for name in ("conv1", "layer1", "layer2.0"):
            for parameter in small.get_submodule(name).parameters():
                parameter.data.fill_(float("nan"))
        values = cuts.head(cuts.input, front)(dense, network.images)
        assert len(front) == 1  # the shortcut reads what conv1 reads
        assert values[0].shape == (4, 32, 16, 16)
        assert cuts.tail(front)(small, *values)[0].isfinite().all()

    def test_what_does_not_suffice_is_none(self, networks):
        network = networks("cifar10-resnet20")
        cuts = Cuts(folded(network.model, network.groups), network.images)
        late, early = cuts.in_front_of({"layer3.1.conv1"}), cuts.in_front_of({"layer1.1.conv1"})
        assert cuts.head(early, late) is not None
        assert cuts.head(late, early) is None
        assert cuts.tail(()) is None
        assert cuts.in_front_of(()) == ()


class TestInPlace:
    """A kept value stays as it is, whatever the network does in place, and the answers are those of the whole."""

    class Net(nn.Module):
        """step(self, y, z): y is kept, z differs between pruned networks."""

        def __init__(self, step: Callable):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4))
            self.linear, self.step = nn.Linear(4, 5), step
            self.relu, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.linear(self.c(self.step(self, y, self.b(y))).mean((2, 3)))

    STEPS: dict[str, Callable] = {  # noqa: RUF012
        "+=": lambda net, y, z: operator.iadd(y, z),
        "-=": lambda net, y, z: operator.isub(y, z),
        "*=": lambda net, y, z: operator.imul(y, z),
        "/=": lambda net, y, z: operator.itruediv(y, 2 + z.abs()),
        "add_": lambda net, y, z: y.add_(z),
        "addcmul_": lambda net, y, z: y.addcmul_(z, z),
        "masked_fill_": lambda net, y, z: y.masked_fill_(z > 0, 1.0),
        "relu_": lambda net, y, z: z + torch.relu_(y),
        "leaky_relu_": lambda net, y, z: z + F.leaky_relu_(y),
        "clamp_": lambda net, y, z: z + torch.clamp_(y, 0, 0.2),
        "F.relu": lambda net, y, z: z + F.relu(y, True),
        "F.elu": lambda net, y, z: z + F.elu(y, inplace=True),
        "F.dropout": lambda net, y, z: z + F.dropout(y, 0.5, net.training, True),
        "ReLU": lambda net, y, z: z + net.relu(y),
        "ReLU of the change": lambda net, y, z: y + net.relu(z),
        "ReLU6 of the sum": lambda net, y, z: net.relu6(y + z),
    }

    @pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
    @torch.inference_mode()
    def test_a_kept_value_stays(self, step, same_logits, random_weights):
        torch.manual_seed(0)
        dense, images = random_weights(self.Net(step)), torch.randn(4, 3, 6, 6)
        small = private(dense)
        small.relu.inplace = small.relu6.inplace = True
        small.b.weight.data += 0.1
        cuts = Cuts(dense, images)
        values, logits = cut_run(cuts, dense, small, images)
        before = [value.clone() for value in values]
        _, again = cut_run(cuts, dense, small, images)
        assert torch.equal(logits, again)
        same_logits(logits, small(images))
        tail = cuts.tail(cuts.in_front_of({"b"}))
        for _ in range(2):
            assert torch.equal(tail(small, *values)[0], logits)
        assert all(map(torch.equal, values, before))

    class Act(nn.Module):
        """Works in place, and is kept whole."""

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x, inplace=True)

    @pytest.mark.parametrize("again", [False, True], ids=["read once", "read again"])
    def test_a_module_that_works_in_place_is_cut_where_it_reads_alone(self, again, same_logits, random_weights):
        torch.manual_seed(0)
        step = (lambda net, y, z: net.act(y) + z + y) if again else (lambda net, y, z: y + net.act(z))
        net = self.Net(step)
        net.act = self.Act()
        dense, images = random_weights(net), torch.randn(4, 3, 6, 6)
        small = private(dense)
        small.b.weight.data += 0.1
        cuts = trace(dense, images)
        assert (cuts is None) == again
        if cuts is not None:
            _, logits = cut_run(cuts, dense, small, images)
            same_logits(logits, small(images))

    UNKNOWN: dict[str, Callable] = {  # noqa: RUF012
        "out": lambda net, y, z: torch.add(y, z, out=y),
        "copy_": lambda net, y, z: y.copy_(z),
        "zero_": lambda net, y, z: y.zero_() + z,
        "setitem": lambda net, y, z: operator.setitem(y, 0, z[0]),
    }

    @pytest.mark.parametrize("step", UNKNOWN.values(), ids=UNKNOWN)
    def test_what_has_no_pure_twin_is_not_cut(self, step):
        assert trace(self.Net(step).eval(), torch.randn(2, 3, 6, 6)) is None

    @pytest.mark.parametrize("make", ["resnet18", "mobilenet_v3_small"])
    def test_torchvisions_networks(self, make, same_logits, random_weights):
        import torchvision

        torch.manual_seed(0)
        dense, images = random_weights(getattr(torchvision.models, make)(num_classes=5)), torch.randn(2, 3, 32, 32)
        groups = itf.find_groups(dense, images[:1])
        fold_groups(dense, groups)  # what it does in place, it goes on doing there
        assert any(getattr(layer, "inplace", False) for layer in dense.modules())
        cuts = Cuts(dense, images)
        for group in [group.name for group in groups if group.reason is None][1::4]:
            small = prune_groups(dense, groups, 0.5, groups=(group,))
            with torch.inference_mode():
                values, logits = cut_run(cuts, dense, small, images)
                kept = [value.clone() for value in values]
                same_logits(logits, small(images.clone()))
                assert torch.equal(cuts.tail(cuts.in_front_of(differing(dense, small)))(small, *values)[0], logits)
                assert all(map(torch.equal, values, kept)), group


class Branching(nn.Module):
    """Its way depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.linear = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).mean((2, 3))
        return self.linear(x if x.sum() > 0 else -x)


def test_what_cannot_be_traced_is_none():
    assert trace(Branching().eval(), torch.randn(2, 3, 6, 6)) is None


class TestDiffering:
    def test_nothing_changed_is_empty(self, network):
        assert differing(network.model, copy.deepcopy(network.model)) == set()
        assert differing(network.model, network.model) == set()

    def test_finds_the_layers_of_the_group_and_no_others(self, network):
        """Folded, as in a study; a group's layers are its producers, consumers and what lies between."""
        dense = folded(network.model, network.groups)
        for group in network.prunable:
            small = prune_groups(dense, network.groups, 0.5, groups=(group.name,))
            numbers = {n for n, m in dense.named_modules() if any(True for _ in m.parameters(recurse=False))}
            found = differing(dense, small)
            assert found <= {layer.name for layer in group.layers}
            assert {layer.name for layer in group.layers} & numbers <= found

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.weight.data.view(-1)[0].add_(1e-6),
            lambda layer: layer.bias.data.view(-1)[-1].add_(1e-6),
            lambda layer: setattr(layer, "bias", None),
            lambda layer: setattr(layer, "stride", (2, 2)),
            lambda layer: layer.register_buffer("more", torch.ones(1)),
        ],
        ids=["weight", "bias", "no bias", "stride", "buffer"],
    )
    def test_finds_any_difference(self, networks, change):
        dense = folded(networks("vgg").model, networks("vgg").groups)
        other = private(dense)
        change(other.features[0])
        assert differing(dense, other) == {"features.0"}

    def test_finds_a_layer_of_another_kind(self, networks):
        dense = networks("vgg").model
        other = private(dense)
        other.features[2] = nn.Tanh()
        assert differing(dense, other) == {"features.2"}

    def test_finds_a_shortcut_that_pads_otherwise(self, networks):
        dense = networks("resnet-pad").model
        other = private(dense)
        other.layer2[0].shortcut.before += 1
        assert differing(dense, other) == {"layer2.0.shortcut"}

    def test_finds_numbers_that_belong_to_no_layer(self):
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale, self.layer = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

        dense = Scaled()
        other = private(dense)
        other.scale.data[1] = 2
        assert differing(dense, other) == {""}
