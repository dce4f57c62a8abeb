import copy
import math
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import intrafusion as itf
from intrafusion.evaluation.accuracy import stratified
from intrafusion.evaluation.incremental import Meter
from intrafusion.models.fx.sharing import differing
from intrafusion.pruning.groups.feature_maps import private
from intrafusion.pruning.groups.norms import fold_groups
from intrafusion.pruning.pruner import prune_groups
from intrafusion.runtime.cancellation import Cancelled, stoppable

BATCH = 64
WHOLE = [0, 597]


@dataclass(frozen=True)
class Pruned:
    """A network that lost channels, the layers in which it differs, and which images it gets right, as `evaluate` says."""

    network: nn.Module
    changed: Collection[str]
    right: Tensor


@dataclass(frozen=True)
class Case:
    dense: nn.Module
    data: itf.ImageData
    pruned: list[Pruned]  # from the input to the output

    def meter(self, memory: int = 1 << 30, **options) -> Meter:
        return Meter(self.dense, self.data, memory=memory, **{"batch": BATCH, **options})


def answers(network: nn.Module, data: itf.ImageData, seed: int = 0) -> Tensor:
    """What a meter should say, in its order of the images."""
    return itf.evaluate(network, data, limit=None).correct[stratified(data.labels.cpu(), seed)]


def made(name: str, device: str = "cpu") -> Case:
    model, data = itf.load_model(name, device=device), itf.load_data("digits", device=device)
    groups = itf.find_groups(model, model.card.example().to(device))
    dense = private(model)
    fold_groups(dense, groups)
    pruned = []
    for group in (group for group in groups if group.reason is None):
        network = prune_groups(dense, groups, 0.5, merge="drop", groups=(group.name,), share=True)
        pruned.append(Pruned(network, differing(dense, network), answers(network, data)))
    return Case(dense, data, pruned)


@pytest.fixture(scope="module", params=["digits-mlp", "digits-vgg", "digits-resnet"])
def case(request: pytest.FixtureRequest) -> Case:
    return made(request.param)


@pytest.fixture(scope="module")
def mlp() -> Case:
    return made("digits-mlp")


@pytest.fixture(scope="module")
def resnet() -> Case:
    return made("digits-resnet")


@pytest.fixture(params=["fp32 alone", "bf16 first"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of predicting, on any CPU."""
    screens = request.param == "bf16 first"
    monkeypatch.setattr("intrafusion.evaluation.incremental.has_bf16", lambda device: screens)
    monkeypatch.setattr("intrafusion.evaluation.incremental._PAYS", math.inf, raising=False)
    return request.param


def read(meter: Meter, pruned: Pruned, ends: list[int] = WHOLE) -> Tensor:
    """A network's answers, asked for in slices."""
    return torch.cat([meter.correct(pruned.network, pruned.changed, *slice_) for slice_ in pairwise(ends)])


@pytest.fixture
def passed() -> Iterator[Callable[[nn.Module], list[int]]]:
    """How many images pass through a layer, call by call."""
    hooks = []

    def count(layer: nn.Module) -> list[int]:
        seen: list[int] = []
        hooks.append(layer.register_forward_hook(lambda _, given, out: seen.append(len(out))))
        return seen

    yield count
    for hook in hooks:
        hook.remove()


@pytest.mark.usefixtures("way")
class TestAnswers:
    @pytest.mark.parametrize("memory", [0, 100_000, 1 << 30])
    def test_are_those_of_evaluate_in_whatever_slices(self, case, memory):
        meter = case.meter(memory)
        for number, pruned in enumerate(case.pruned):
            ends = [WHOLE, [0, 1, 63, 65, 200, 597], [0, 64, 128, 597], [0, 100, 101, 596, 597]][number % 4]
            found = read(meter, pruned, ends)
            assert (found.dtype, found.device.type) == (torch.bool, "cpu")
            assert torch.equal(found, pruned.right)
        assert len({int(pruned.right.sum()) for pruned in case.pruned}) > 1  # or nothing would be shown

    @pytest.mark.parametrize(
        ("order", "memory"),
        [("backwards", 0), ("there and back", 1_000_000), ("mixed", 0), ("mixed", 1_000_000), ("mixed", 1 << 30),
         ("twice each", 1 << 30)],
    )  # fmt: skip
    def test_do_not_depend_on_the_order_of_the_cuts(self, resnet, memory, order):
        forwards = list(range(len(resnet.pruned)))
        turns = {
            "backwards": forwards[::-1],
            "there and back": forwards[::3] + forwards[::-3],
            "mixed": [3, 7, 0, 7, 5, 1, 8, 2],
            "twice each": [n for n in forwards[::2] for _ in range(2)],
        }[order]
        meter = resnet.meter(memory)
        for n in turns:
            assert torch.equal(read(meter, resnet.pruned[n], [0, 200, 597]), resnet.pruned[n].right), n

    def test_first_looks_at_all_then_the_rest_of_all(self, resnet):
        """As a sweep goes about it."""
        meter = resnet.meter(2_000_000)
        first = [read(meter, pruned, [0, 128]) for pruned in resnet.pruned[::3]]
        for pruned, begun in zip(resnet.pruned[::3], first, strict=True):
            assert torch.equal(torch.cat([begun, read(meter, pruned, [128, 597])]), pruned.right)

    def test_no_slice_must_begin_at_the_beginning(self, mlp):
        for start, stop in ((300, 301), (5, 60), (64, 128), (596, 597)):
            found = mlp.meter().correct(mlp.pruned[0].network, mlp.pruned[0].changed, start, stop)
            assert torch.equal(found, mlp.pruned[0].right[start:stop])

    def test_of_another_seed_come_in_another_order(self, mlp):
        pruned = mlp.pruned[0]
        found = mlp.meter(seed=3).correct(pruned.network, pruned.changed, *WHOLE)
        assert torch.equal(found, answers(pruned.network, mlp.data, 3))
        assert not torch.equal(found, pruned.right)

    def test_every_kind_of_network(self, network):
        dense = private(network.model)
        fold_groups(dense, network.groups)
        meter = Meter(dense, network.data, batch=7)
        for group in network.prunable[:: max(1, len(network.prunable) // 3)]:
            small = prune_groups(dense, network.groups, 0.5, groups=(group.name,))
            expected = answers(small, network.data)
            for _ in range(2):
                assert torch.equal(read(meter, Pruned(small, differing(dense, small), expected), [0, 10, 24]), expected)

    def test_of_all_groups_together(self, resnet):
        groups = itf.find_groups(resnet.dense, resnet.dense.card.example())
        small = prune_groups(resnet.dense, groups, 0.3)
        meter = resnet.meter()
        for pruned in (Pruned(small, differing(resnet.dense, small), answers(small, resnet.data)), resnet.pruned[2]):
            assert torch.equal(read(meter, pruned), pruned.right)

    def test_without_a_copy_of_the_images(self, mlp):
        """A large data set lies in a mapped file, and may be larger than memory."""
        assert mlp.meter().data.images.data_ptr() == mlp.data.images.data_ptr()

    def test_of_the_dense_network(self, case):
        expected, meter = answers(case.dense, case.data), case.meter()
        for stop in (10, 64, 100, 597, 5):
            assert torch.equal(meter.dense(stop), expected[:stop])
        assert torch.equal(meter.correct(copy.deepcopy(case.dense), set(), *WHOLE), expected)

    def test_of_a_network_in_fp64(self, mlp):
        dense, network = copy.deepcopy(mlp.dense).double(), copy.deepcopy(mlp.pruned[0].network).double()
        found = Meter(dense, mlp.data, batch=BATCH).correct(network, mlp.pruned[0].changed, *WHOLE)
        assert torch.equal(found, mlp.pruned[0].right)

    def test_leave_the_networks_as_they_were(self, resnet):
        networks = [resnet.dense, resnet.pruned[4].network]
        before = [copy.deepcopy(network.state_dict()) for network in networks]
        read(resnet.meter(), resnet.pruned[4])
        for network, states in zip(networks, before, strict=True):
            for name, tensor in network.state_dict().items():
                assert tensor.dtype == states[name].dtype
                assert torch.equal(tensor, states[name])


class TestNotTwice:
    """What lies in front of the change is computed once."""

    @pytest.fixture
    def late(self, mlp) -> list[Pruned]:
        """Two networks that are changed at the same, last place."""
        groups = itf.find_groups(mlp.dense, mlp.dense.card.example())
        networks = [prune_groups(mlp.dense, groups, share, groups=("3",), share=True) for share in (0.3, 0.6)]
        return [Pruned(small, differing(mlp.dense, small), answers(small, mlp.data)) for small in networks]

    @pytest.mark.usefixtures("way")
    def test_a_second_network_at_a_cut_runs_no_unchanged_layer(self, mlp, late, passed):
        meter = mlp.meter()
        seen = passed(mlp.dense.get_submodule("1"))
        assert torch.equal(read(meter, late[0], [0, 100, 597]), late[0].right)
        assert 597 <= sum(seen) <= 597 + 4  # and a few that show that the cut is sound
        seen.clear()
        assert torch.equal(read(meter, late[1]), late[1].right)
        assert sum(seen) == 0

    @pytest.mark.usefixtures("way")
    def test_the_next_cut_goes_on_from_the_last(self, mlp, late, passed):
        meter = mlp.meter()
        read(meter, mlp.pruned[0])
        seen = passed(mlp.dense.get_submodule("1"))
        meter.data = replace(meter.data, images=torch.zeros_like(meter.data.images))  # nobody reads the images again
        found = read(meter, late[0])
        assert torch.equal(found, late[0].right)
        assert 597 <= sum(seen) <= 597 + 4

    @pytest.mark.parametrize("batches", [0, 1, 4, 9])
    def test_as_many_batches_are_kept_as_there_is_room_for(self, mlp, late, passed, batches, monkeypatch):
        monkeypatch.setattr("intrafusion.evaluation.incremental.has_bf16", lambda device: False)
        meter = mlp.meter(batches * BATCH * 128 * 4 + 100)  # 128 floats an image
        read(meter, late[0])
        seen = passed(mlp.dense.get_submodule("1"))
        for _ in range(2):
            seen.clear()
            assert torch.equal(read(meter, late[1]), late[1].right)
            assert sum(seen) == 597 - batches * BATCH


def held(thing: object, seen: dict[int, int] | None = None) -> int:
    """Bytes of all tensors that can be reached, but for those of networks."""
    seen = {} if seen is None else seen
    if isinstance(thing, Tensor):
        seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, dict | list | tuple):
        for inner in thing.values() if isinstance(thing, dict) else thing:
            held(inner, seen)
    elif type(thing).__module__.startswith("intrafusion"):
        held(vars(thing), seen)
    return sum(seen.values())


@pytest.mark.usefixtures("way")
class TestMemory:
    @pytest.mark.parametrize("memory", [0, 300_000, 3_000_000])
    def test_no_more_is_kept_than_allowed(self, resnet, memory):
        meter = resnet.meter(memory)
        meter.dense(597)
        meter.forget()
        before, most = held(meter), 0
        for n in (0, 4, 5, 8, 2, 7):
            read(meter, resnet.pruned[n], [0, 100, 597])
            kept = held(meter) - before
            assert kept <= memory
            most = max(most, kept)
        assert most >= memory / 2

    def test_forgetting_gives_all_back(self, resnet):
        meter = resnet.meter()
        before = held(meter)
        for n in (3, 6, 5):
            read(meter, resnet.pruned[n])
            assert held(meter) - before > 1_000_000
            meter.forget()
            assert held(meter) == before
        assert torch.equal(read(meter, resnet.pruned[6]), resnet.pruned[6].right)

    def test_room_that_was_given_back_can_be_used_again(self, mlp, passed):
        """The bytes are not counted twice, whatever comes in between."""
        meter = mlp.meter(2 * 597 * 128 * 4 + 100_000)
        for _ in range(3):
            for pruned in (mlp.pruned[0], mlp.pruned[1], mlp.pruned[0]):
                read(meter, pruned)
            meter.forget()
            read(meter, mlp.pruned[1])
            read(meter, mlp.pruned[1])
        seen = passed(mlp.dense.get_submodule("1"))
        read(meter, mlp.pruned[1])
        assert sum(seen) == 0


@pytest.mark.usefixtures("way")
class TestPatience:
    def test_ends_after_a_whole_batch_and_goes_on_from_there(self, mlp):
        pruned, meter = mlp.pruned[0], mlp.meter()
        found = meter.correct(pruned.network, pruned.changed, 0, 597, patience=0)
        assert len(found) == BATCH
        found = torch.cat([found, meter.correct(pruned.network, pruned.changed, len(found), 597, patience=0)])
        assert len(found) == 2 * BATCH
        found = torch.cat([found, meter.correct(pruned.network, pruned.changed, len(found), 597, patience=1000)])
        assert torch.equal(found, pruned.right)

    def test_from_within_a_batch_ends_with_it(self, mlp):
        pruned = mlp.pruned[0]
        found = mlp.meter().correct(pruned.network, pruned.changed, 50, 597, patience=0)
        assert torch.equal(found, pruned.right[50:BATCH])

    def test_cancelling_reaches_in_between_two_batches(self, mlp):
        pruned, meter, stop = mlp.pruned[0], mlp.meter(), threading.Event()
        stop.set()
        with stoppable(stop), pytest.raises(Cancelled):
            read(meter, pruned)
        assert torch.equal(read(meter, pruned), pruned.right)


class TestBatch:
    def test_is_found_by_trying(self, case):
        meter = case.meter(batch=None)
        assert 16 <= meter.batch <= 597
        assert torch.equal(read(meter, case.pruned[-1]), case.pruned[-1].right)

    @pytest.mark.parametrize("count", [1, 3, 70])
    def test_is_no_more_than_there_are_images(self, mlp, count):
        data = mlp.data.subset(count)
        meter = Meter(mlp.dense, data)
        assert 1 <= meter.batch <= count
        right = answers(mlp.pruned[0].network, data)
        assert torch.equal(meter.correct(mlp.pruned[0].network, mlp.pruned[0].changed, 0, count), right)
        assert len(meter) == count

    def test_a_slow_network_takes_few_images_at_once(self, mlp, monkeypatch):
        """Somebody who cancels does not wait for 64 images of a quarter of a second each."""
        clock = [0.0]

        def forward(layer, given, out):
            clock[0] += 0.01 * len(out)

        slow = copy.deepcopy(mlp.dense)
        slow.get_submodule("1").register_forward_hook(forward)
        monkeypatch.setattr("time.perf_counter", lambda: clock[0])
        assert Meter(slow, mlp.data).batch <= 32

    @pytest.mark.parametrize("batch", [1, 64, 100, 597, 1000])
    def test_whole_batches_hold(self, mlp, batch):
        meter = mlp.meter(batch=batch)
        assert len(meter) == 597
        for count in (1, 63, 64, 65, 100, 596, 597, 5000):
            found = meter.up_to(count)
            assert min(count, 597) <= found <= 597
            assert found == 597 or (found % batch == 0 and found - count < batch)


class Branching(nn.Module):
    """Its way depends on the data: no trace follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 6, 3), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        return self.linear(x if x.sum() > 0 else -x)


class Written(nn.Module):
    """Its trace writes out how many channels the dense network has: it holds for no pruned one."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Conv2d(4, width, 3), nn.Linear(16 * width, 10)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x).relu()).relu()
        return self.linear(x.reshape(x.shape[0], self.width * 16))


class Scaled(Written):
    """Its trace writes out a number, and runs nevertheless."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x).relu()).relu() + (self.width - 6)
        return self.linear(x.flatten(1))


def narrower(dense: Written, width: int) -> nn.Module:
    """The network without its last channels, by hand."""
    small = copy.deepcopy(dense)
    small.width = width
    small.conv.weight.data, small.conv.bias.data = dense.conv.weight.data[:width], dense.conv.bias.data[:width]
    small.linear.weight.data = dense.linear.weight.data[:, : 16 * width]
    return small


@pytest.mark.usefixtures("way")
class TestUncuttable:
    """Where no trace tells what the network does, it runs whole."""

    def carded(self, model: nn.Module, mlp: Case, random_weights) -> nn.Module:
        torch.manual_seed(0)
        model = random_weights(model)
        model.card = mlp.dense.card
        return model

    def test_a_network_that_branches(self, mlp, random_weights):
        dense = self.carded(Branching(), mlp, random_weights)
        meter = Meter(dense, mlp.data, batch=BATCH)
        assert torch.equal(meter.dense(597), answers(dense, mlp.data))
        for bias in (0.1, 5.0):
            other = copy.deepcopy(dense)
            other.linear.bias.data[3] += bias
            assert torch.equal(meter.correct(other, {"linear"}, 0, 597), answers(other, mlp.data))

    @pytest.mark.parametrize("kind", [Written, Scaled])
    @pytest.mark.parametrize("memory", [0, 1 << 30])
    def test_a_trace_that_holds_for_the_dense_network_only(self, mlp, random_weights, kind, memory):
        dense = self.carded(kind(), mlp, random_weights)
        meter = Meter(dense, mlp.data, memory=memory, batch=BATCH)
        assert torch.equal(meter.dense(597), answers(dense, mlp.data))
        for width in (3, 5, 1):
            small = narrower(dense, width)
            found = torch.cat([meter.correct(small, {"conv", "linear"}, a, b) for a, b in ((0, 90), (90, 597))])
            assert torch.equal(found, answers(small, mlp.data))

    def test_whole_and_cut_networks_take_turns(self, mlp, random_weights):
        dense = self.carded(Written(), mlp, random_weights)
        meter = Meter(dense, mlp.data, batch=BATCH)
        tuned = copy.deepcopy(dense)
        tuned.linear.bias.data[3] += 5
        for _ in range(2):
            small = narrower(dense, 3)
            assert torch.equal(meter.correct(small, {"conv", "linear"}, 0, 597), answers(small, mlp.data))
            assert torch.equal(meter.correct(tuned, {"linear"}, 0, 597), answers(tuned, mlp.data))


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                lambda d: itf.ImageData("big", "test", torch.zeros(4, 3, 32, 32, dtype=torch.uint8), d.labels[:4], d.classes),
                "big",
            ),
            (lambda d: itf.ImageData("more", "test", d.images, d.labels, tuple(map(str, range(11)))), "11"),
        ],
        ids=["size", "classes"],
    )
    def test_images_that_do_not_fit_are_one_line(self, mlp, change, match):
        with pytest.raises(itf.IntrafusionError, match=match) as caught:
            Meter(mlp.dense, change(mlp.data))
        assert "\n" not in str(caught.value)

    def test_a_network_without_a_card_is_one_line(self, mlp):
        with pytest.raises(itf.IntrafusionError, match="card"):
            Meter(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), mlp.data)


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("name", ["digits-mlp", "digits-resnet"])
    @pytest.mark.parametrize("memory", [0, 1_000_000, 1 << 30])
    def test_answers_are_those_of_evaluate(self, name, memory, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        case = made(name, "cuda")
        meter = case.meter(memory)
        for pruned in [*case.pruned, *case.pruned[::-2]]:
            found = read(meter, pruned, [0, 100, 597])
            assert found.device.type == "cpu"
            assert (found != pruned.right).sum() <= 1  # another algorithm may add in another order
        assert (meter.dense(597) != answers(case.dense, case.data)).sum() <= 1

    def test_batch_is_found_by_trying(self):
        case = made("digits-resnet", "cuda")
        meter = case.meter(batch=None)
        assert 64 <= meter.batch <= 597
        assert (read(meter, case.pruned[2]) != case.pruned[2].right).sum() <= 1
