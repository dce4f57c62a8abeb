import copy
import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_results import DENSE, made_result
from torch import Tensor, nn

import intrafusion as itf
from intrafusion.evaluation.accuracy import Size, size
from intrafusion.pruning.groups.norms import fold_groups
from intrafusion.pruning.groups.surgery import shrink
from intrafusion.pruning.transport.planning import group_counts
from intrafusion.studies.allocation import Shapes, shapes, suggest
from intrafusion.studies.sensitivity import Matrix, sensitivity_matrix

SPARSITIES = (0.2, 0.4, 0.6, 0.8)
IMAGES = 10_000


def shapes_of(network) -> Shapes:
    return shapes(network.model, network.groups, network.example)


def cut_down(network, sparsities: dict[str, float]) -> torch.nn.Module:
    """The network really made smaller, whichever channels stay."""
    small, generator, kept = copy.deepcopy(network.model), torch.Generator().manual_seed(0), {}
    fold_groups(small, network.groups)
    for group in network.prunable:
        stays = []
        for block, count in enumerate(group_counts(group, sparsities[group.name])):
            members = (group.block == block).nonzero()[:, 0]
            stays.append(members[torch.randperm(len(members), generator=generator)[:count]])
        kept[group] = torch.cat(stays).sort().values
    shrink(small, kept)
    return small


def measured(losses: dict[str, dict[float, float]]) -> Matrix:
    """A study in which each group loses so much at each sparsity."""
    results = [
        made_result(group, s, right=np.arange(IMAGES) < round(IMAGES * (DENSE - loss)))
        for group, own in losses.items()
        for s, loss in own.items()
    ]
    return sensitivity_matrix(results, "fusion")


def loss_of(made: Matrix, sparsities: dict[str, float]) -> float:
    """What is expected to be lost: for each group the most that it lost up to its sparsity."""
    return sum(
        max([0.0, *(cell.loss for (group, s), cell in made.cells.items() if group == name and s <= sparsity)])
        for name, sparsity in sparsities.items()
    )


def random_losses(names: list[str], levels: tuple[float, ...], generator: np.random.Generator) -> dict:
    """Steps, or a collapse at one sparsity, which no greedy step sees coming."""
    found = {}
    for name in names:
        steps = np.cumsum(generator.exponential(0.04, len(levels)))
        collapse = generator.random() * 0.6 * np.linspace(0.2, 1, len(levels)) ** 3
        found[name] = dict(zip(levels, steps if generator.random() < 0.5 else collapse, strict=True))
    return found


class Attending(nn.Module):
    """Attention over 16 tokens, whose width cannot be pruned, and an MLP, whose hidden width can."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((x + self.down(F.relu(self.up(x)))).mean(1))


class Mixing(nn.Module):
    """Rows of pixels are mixed by a product with a matrix, once for each channel: it shrinks with the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.register_buffer("rows", torch.rand(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x)) @ self.rows
        return self.head(F.relu(self.second(x)).mean((2, 3)))


OUTSIDE: dict[str, tuple[type[nn.Module], bool]] = {"attention": (Attending, False), "functions": (Mixing, True)}


@functools.cache
def outside(name: str) -> SimpleNamespace:
    """A network that multiplies outside of its layers, with what tests ask of the fixture's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, example = OUTSIDE[name][0]().eval().requires_grad_(False), torch.zeros(1, 3, 8, 8)
    groups = tuple(itf.find_groups(model, example))
    usable = [group for group in groups if group.reason is None]
    return SimpleNamespace(name=name, model=model, example=example, groups=groups, prunable=usable)


class TestSizes:
    @pytest.mark.parametrize("seed", range(4))
    def test_are_those_of_really_pruned_networks(self, network, seed):
        generator = np.random.default_rng(seed)
        sparsities = {group.name: float(generator.choice([0, 0.1, 0.3, 0.5, 0.9])) for group in network.prunable}
        assert shapes_of(network).size(sparsities) == size(cut_down(network, sparsities), network.example)

    def test_are_those_of_prune(self, network):
        small = itf.prune(network.model, network.example, 0.4, merge="drop")
        sparsities = {group.name: 0.4 for group in network.prunable}
        assert shapes_of(network).size(sparsities) == size(small, network.example)

    @pytest.mark.parametrize("name", OUTSIDE)
    @pytest.mark.parametrize("seed", range(3))
    def test_of_what_no_layer_multiplies_are_exact_too(self, name, seed):
        network = outside(name)
        generator = np.random.default_rng(seed)
        sparsities = {group.name: float(generator.choice([0, 0.25, 0.5, 0.75])) for group in network.prunable}
        assert shapes_of(network).size(sparsities) == size(cut_down(network, sparsities), network.example)

    @pytest.mark.parametrize("name", OUTSIDE)
    def test_are_counted_anew_only_where_they_change(self, name):
        assert (shapes_of(outside(name)).network is not None) == OUTSIDE[name][1]

    def test_of_nothing_pruned_are_the_folded_network_s(self, network):
        folded = itf.fold(network.model, network.example)
        made = shapes_of(network)
        assert made.size({}) == size(folded, network.example)
        assert made.dense == size(network.model, network.example)

    def test_a_group_that_cannot_be_pruned_is_refused(self, networks):
        with pytest.raises(itf.IntrafusionError, match=r"no prunable group 'head'.*choose one of"):
            shapes_of(networks("resnext")).size({"head": 0.5})

    def test_the_network_is_left_alone(self, networks):
        network = networks("resnet-pad")
        before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
        shapes_of(network)
        assert all(torch.equal(before[name], tensor) for name, tensor in network.model.state_dict().items())


BRUTE = ["mlp", "vgg", "resnet-pad", "fire", "squeeze-excite", "flat-norm", "digits-vgg"]
TARGETS = [("macs", 0.7), ("macs", 0.4), ("params", 0.6), ("params", 0.3), ("accuracy", 0.85), ("accuracy", 0.6)]


class TestSuggest:
    @pytest.mark.parametrize("name", BRUTE)
    def test_is_close_to_the_best_of_all_choices(self, networks, name):
        """Not always the best: within half a point of loss, or 3 % of the size, of what trying all choices finds."""
        network = networks(name)
        made, names = shapes_of(network), [group.name for group in network.prunable][:5]
        levels = SPARSITIES if len(names) < 5 else SPARSITIES[1::2]
        choices = [dict(zip(names, c, strict=True)) for c in itertools.product((0, *levels), repeat=len(names))]
        sizes = [made.size(choice) for choice in choices]
        for seed in range(3):
            study = measured(random_losses(names, levels, np.random.default_rng(seed)))
            losses = np.array([loss_of(study, choice) for choice in choices])
            for target, value in TARGETS:
                found = suggest(study, made, target, value)
                if target == "accuracy":
                    best = min(s.macs for s, loss in zip(sizes, losses, strict=True) if DENSE - loss >= value - 1e-9)
                    assert found.met
                    assert found.size.macs <= 1.03 * best
                    continue
                fits = np.array([getattr(s, target) <= value * getattr(made.dense, target) for s in sizes])
                assert found.met == fits.any()
                if found.met:
                    assert loss_of(study, found.sparsities) <= losses[fits].min() + 0.005

    @pytest.mark.parametrize(("target", "value"), TARGETS)
    def test_is_never_worse_than_one_sparsity_for_all(self, networks, target, value):
        network = networks("resnet-projection")
        made, names = shapes_of(network), [group.name for group in network.prunable]
        study = measured(random_losses(names, SPARSITIES, np.random.default_rng(7)))
        found = suggest(study, made, target, value)
        for sparsity in SPARSITIES:
            uniform = dict.fromkeys(names, sparsity)
            after, lost = made.size(uniform), loss_of(study, uniform)
            if target == "accuracy" and DENSE - lost >= value:
                assert found.size.macs <= after.macs
            elif target != "accuracy" and getattr(after, target) <= value * getattr(made.dense, target):
                assert DENSE - found.accuracy <= lost + 1e-9

    @pytest.mark.parametrize("name", OUTSIDE)
    @pytest.mark.parametrize("value", [0.95, 0.8, 0.6])
    def test_a_budget_holds_for_what_no_layer_multiplies(self, name, value):
        network = outside(name)
        names, made = [group.name for group in network.prunable], shapes_of(network)
        choices = [dict(zip(names, c, strict=True)) for c in itertools.product((0, *SPARSITIES), repeat=len(names))]
        study = measured(random_losses(names, SPARSITIES, np.random.default_rng(5)))
        found = suggest(study, made, "macs", value)
        real = size(cut_down(network, found.sparsities), network.example)
        fits = [choice for choice in choices if made.size(choice).macs <= value * made.dense.macs]
        assert found.size == real
        assert found.met == bool(fits) == (real.macs <= value * made.dense.macs)
        if fits:
            assert loss_of(study, found.sparsities) <= min(loss_of(study, choice) for choice in fits) + 0.01

    @pytest.mark.parametrize(("target", "value"), TARGETS)
    def test_tells_what_it_suggests(self, networks, target, value):
        network = networks("resnet-pad")
        names = [group.name for group in network.prunable]
        study, made = measured(random_losses(names, SPARSITIES, np.random.default_rng(3))), shapes_of(network)
        found = suggest(study, made, target, value)
        assert found == suggest(study, made, target, value)
        assert found.merge == "fusion"
        assert list(found.sparsities) == names
        assert set(found.sparsities.values()) <= {0.0, *SPARSITIES}
        assert found.size == size(cut_down(network, found.sparsities), network.example)
        assert found.dense == size(network.model, network.example)
        assert found.accuracy == pytest.approx(max(0, DENSE - loss_of(study, found.sparsities)))
        assert found.dense_accuracy == DENSE
        assert found.channels == {g.name: (sum(group_counts(g, found.sparsities[g.name])), g.size) for g in network.prunable}
        assert (found.met, found.note) == (True, "")

    def test_takes_from_the_group_that_loses_least(self, networks):
        network = networks("mlp")
        first, second = (group.name for group in network.prunable)
        losses = {first: dict.fromkeys(SPARSITIES, 0.3), second: dict.fromkeys(SPARSITIES, 0.001)}
        found = suggest(measured(losses), shapes_of(network), "accuracy", DENSE - 0.01)
        assert found.sparsities == {first: 0.0, second: 0.8}

    def test_looks_beyond_a_step_that_does_not_pay(self, networks):
        network = networks("mlp")
        first, second = (group.name for group in network.prunable)
        losses = {
            first: dict.fromkeys(SPARSITIES, 0.1),
            second: dict(zip(SPARSITIES, (0.05, 0.1, 0.2, 0.3), strict=True)),
        }
        made = shapes_of(network)
        most = made.size({first: 0.8}).params / made.dense.params
        assert suggest(measured(losses), made, "params", most).sparsities == {first: 0.8, second: 0.0}

    def test_does_not_profit_from_noise(self, networks):
        network = networks("mlp")
        (first, *_) = (group.name for group in network.prunable)
        found = suggest(measured({first: {0.2: 0.1, 0.4: 0.02, 0.6: -0.03}}), shapes_of(network), "params", 0.7)
        assert found.sparsities[first] > 0
        assert found.accuracy == pytest.approx(DENSE - 0.1)

    def test_what_was_not_measured_or_prunes_nothing_stays_whole(self, networks):
        network = networks("resnet-pad")
        first, second, *others = (group.name for group in network.prunable)
        empty = made_result(second, 0.6, right=DENSE, channels=(4, 4))
        found = suggest(sensitivity_matrix([made_result(first, 0.4), empty], "fusion"), shapes_of(network), "macs", 0.01)
        assert found.sparsities == {first: 0.4, second: 0.0, **dict.fromkeys(others, 0.0)}

    @pytest.mark.parametrize("target", ["params", "macs"])
    def test_a_size_out_of_reach_is_said_and_the_smallest_network_given(self, networks, target):
        network = networks("vgg")
        made, names = shapes_of(network), [group.name for group in network.prunable]
        found = suggest(measured({name: {0.2: 0.0, 0.4: 0.1} for name in names}), made, target, 0.01)
        assert not found.met
        assert found.sparsities == dict.fromkeys(names, 0.4)
        stays = getattr(found.size, target) / getattr(found.dense, target)
        assert found.note.startswith(f"{stays:.1%} of the ")
        assert "measure larger" in found.note
        assert "\n" not in found.note

    def test_an_accuracy_above_the_dense_one_is_said(self, networks):
        network = networks("vgg")
        names = [group.name for group in network.prunable]
        found = suggest(measured({name: {0.2: 0.05} for name in names}), shapes_of(network), "accuracy", 0.95)
        assert not found.met
        assert found.sparsities == dict.fromkeys(names, 0.0)
        assert found.note == "95.0% is above the 90.0% of the unpruned network; choose a lower target"

    def test_the_dense_network_needs_no_step(self, networks):
        found = suggest(measured({"conv1": {0.2: 0.1}}), shapes_of(networks("resnet-pad")), "macs", 1.0)
        assert found.sparsities["conv1"] == 0
        assert found.met

    def test_the_measure_of_size_decides_which_is_smallest(self, networks):
        network = networks("resnet-pad")
        made, names = shapes_of(network), [group.name for group in network.prunable]
        study = measured(random_losses(names, SPARSITIES, np.random.default_rng(11)))
        by: dict[str, Size] = {unit: suggest(study, made, "accuracy", 0.75, unit).size for unit in ("params", "macs")}
        assert by["params"].params <= by["macs"].params
        assert by["macs"].macs <= by["params"].macs

    @pytest.mark.parametrize(
        ("target", "value", "says"),
        [
            ("flops", 0.5, "unknown target"),
            ("macs", 0, "above 0"),
            ("macs", 1.5, "at most 1"),
            ("accuracy", 85, "at most 1"),
        ],
    )
    def test_what_cannot_be_asked_is_refused(self, networks, target, value, says):
        with pytest.raises(itf.IntrafusionError, match=says):
            suggest(measured({"conv1": {0.2: 0.1}}), shapes_of(networks("resnet-pad")), target, value)

    @pytest.mark.parametrize("results", [[], [made_result("conv1", 0.2, channels=(4, 4))], [made_result("elsewhere", 0.2)]])
    def test_without_measurements_there_is_no_suggestion(self, networks, results):
        with pytest.raises(itf.IntrafusionError, match=r"no group of this network was measured .* run the study"):
            suggest(sensitivity_matrix(results, "fusion"), shapes_of(networks("resnet-pad")), "macs", 0.5)
