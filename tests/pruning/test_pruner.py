import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import intrafusion as itf
from intrafusion.models.architectures import PadShortcut
from intrafusion.pruning.groups.group import CHANNELWISE, CONSUMER, PRODUCER
from intrafusion.pruning.groups.surgery import shrink
from intrafusion.pruning.pruner import choose_groups, prune_groups
from intrafusion.pruning.transport.planning import block_counts, kept_count

DATA_FREE = {
    kind: [name for name, entry in itf.registry(kind).items() if entry.needs == "nothing"] for kind in ("criterion", "merge")
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_any_group_shrinks_to_a_network_that_computes_what_the_merged_dense_one_does(network, same_logits):
    folded = network.folded
    for group in network.kinds:
        plan = itf.plan(folded, group, itf.score(folded, group), 0.5)
        for merge in ("drop", "fusion"):
            merged = copy.deepcopy(folded)
            itf.registry("merge")[merge](merged, group, plan)
            expected, before = merged(network.images), parameters(merged)
            assert expected.shape == network.logits.shape
            shrink(merged, {group: plan.kept})
            assert parameters(merged) < before
            same_logits(merged(network.images), expected)


@pytest.mark.parametrize("merge", ["drop", "fusion"])
def test_pruning_all_is_score_plan_merge_from_the_output_to_the_input(network, same_logits, merge):
    small = prune_groups(network.model, network.groups, 0.5, merge=merge)
    by_hand = copy.deepcopy(network.folded)
    for group in reversed(network.prunable):
        plan = itf.plan(by_hand, group, itf.score(by_hand, group), 0.5)
        itf.registry("merge")[merge](by_hand, group, plan)
    same_logits(small(network.images), by_hand(network.images))
    assert parameters(small) < 0.6 * parameters(by_hand)


def test_groups_are_merged_from_the_output_to_the_input(networks, monkeypatch):
    network, order = networks("resnet-projection"), []
    entry = itf.registry("merge")["fusion"]

    def record(model, group, plan):
        order.append(group.name)
        entry(model, group, plan)

    monkeypatch.setitem(itf.registry("merge"), "fusion", replace(entry, function=record))
    itf.prune(network.model, network.example, groups=["conv1", "layer2.0.conv2", "layer1.0.conv1"])
    assert order == ["layer2.0.conv2", "layer1.0.conv1", "conv1"]


def test_sparsity_zero_is_the_identity(network, same_logits):
    small = itf.prune(network.model, network.example, sparsity=0)
    same_logits(small(network.images), network.logits)
    shapes = {name: module.weight.shape for name, module in network.model.named_modules() if isinstance(module, nn.Conv2d)}
    assert {n: m.weight.shape for n, m in small.named_modules() if isinstance(m, nn.Conv2d)} == shapes


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["vgg", "resnet-pad", "resnext", "fire"])
def test_every_layer_keeps_its_share_of_channels(networks, name, sparsity):
    network = networks(name)
    small = itf.prune(network.model, network.example, sparsity)
    widths: dict[tuple[str, int], int] = {}
    for group in network.prunable:
        if len(group.block.unique()) == 1:  # blocks share the channels out, by a rule tested with the plan
            for layer in group.layers:
                axis = layer.name, int(layer.role == CONSUMER)
                k = kept_count(group.size, sparsity)
                widths[axis] = widths.get(axis, 0) + k * layer.positions.shape[1]
    for (layer_name, axis), width in widths.items():
        module = small.get_submodule(layer_name)
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.shape[axis] == width, layer_name
    assert small(network.images).shape == network.logits.shape


@pytest.mark.parametrize(("sparsity", "seed"), [(0.3, 0), (0.5, 1), (0.9, 0), (0.98, 1)])
def test_dropping_the_option_a_residual_group_is_masking_its_channels(networks, same_logits, sparsity, seed):
    network = networks("cifar10-resnet20")
    group = network.group("conv1")
    masked = copy.deepcopy(network.folded)
    plan = itf.plan(masked, group, itf.score(masked, group, "random", seed=seed), sparsity)
    gone = torch.ones(64, dtype=torch.bool)
    gone[plan.kept] = False
    # a channel that no layer of its stage writes is zero until the head, and the head reads it as zero
    of_stage = {"conv1": gone[24:40], "layer1": gone[24:40], "layer2": gone[16:48], "layer3": gone}
    for name, module in masked.named_modules():
        stage = name.split(".")[0]
        if name == "conv1" or (name.endswith("conv2") and stage in of_stage):
            module.weight.data[of_stage[stage]] = 0
            module.bias.data[of_stage[stage]] = 0
    small = prune_groups(network.model, network.groups, sparsity, "random", merge="drop", groups=["conv1"], seed=seed)
    same_logits(small(network.images), masked(network.images))
    for name, module in small.named_modules():
        if isinstance(module, PadShortcut):
            width = module.before + module.channels + module.after
            assert min(module.before, module.channels, module.after) >= 0
            stage = int(name[5])
            assert width == int((~of_stage[f"layer{stage}"]).sum())
            assert module.channels == int((~of_stage[f"layer{stage - 1}"]).sum())


@pytest.mark.parametrize("name", ["fire", "densenet", "resnet-projection"])
def test_groups_that_were_not_chosen_stay_as_they_are(networks, name):
    network = networks(name)
    chosen = network.prunable[1:3]
    folded = network.folded.state_dict()
    small = itf.prune(network.model, network.example, groups=[group.name for group in chosen]).state_dict()
    touched = {layer.name for group in chosen for layer in group.layers}
    others = [key for key in small if key.rpartition(".")[0] not in touched]
    assert others
    assert all(torch.equal(small[key], folded[key]) for key in others)
    roles: dict[str, set[str]] = {}
    for layer in (layer for group in chosen for layer in group.layers):
        roles.setdefault(f"{layer.name}.weight", set()).add(layer.role)
    for key in roles.keys() & small.keys():  # norms that are folded have no weight
        before, after = folded[key].shape, small[key].shape
        assert (after[0] < before[0]) == bool(roles[key] & {PRODUCER, CHANNELWISE}), key
        assert (after[1:2] < before[1:2]) == (CONSUMER in roles[key]), key


@pytest.mark.parametrize("groups", ["layer1.0.conv1", ["layer1.0.conv1"], ("layer1.0.conv1",)])
def test_one_group_by_name(networks, same_logits, groups):
    network = networks("resnet-projection")
    small = itf.prune(network.model, network.example, groups=groups)
    assert small.layer1[0].conv1.out_channels == 2
    assert small.layer1[1].conv1.out_channels == 4
    same_logits(small(network.images), itf.prune(network.model, network.example, groups=groups)(network.images))


def test_groups_found_before_give_the_same_network(networks):
    network = networks("densenet")
    fresh = itf.prune(network.model, network.example, 0.5).state_dict()
    again = prune_groups(network.model, network.groups, 0.5).state_dict()
    assert fresh.keys() == again.keys()
    assert all(torch.equal(fresh[key], again[key]) for key in fresh)


@pytest.mark.parametrize("merge", DATA_FREE["merge"])
@pytest.mark.parametrize("criterion", DATA_FREE["criterion"])
def test_every_data_free_criterion_goes_with_every_data_free_merge(networks, criterion, merge):
    for name in ("resnet-pad", "resnet-projection"):  # every group has a norm, for bn_scale
        network = networks(name)
        small = prune_groups(network.model, network.groups, 0.5, criterion, merge)
        logits = small(network.images)
        assert logits.shape == network.logits.shape
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    "knobs",
    [
        {"p": 2},
        {"source": "importance", "target": "importance"},
        {"source": "softmax", "target": "softmax"},
        {"source": "uniform", "target": "importance"},
        {"anchors": "kmeans"},
        {"anchors": "gmm"},
        {"normalise": "target"},
        {"normalise": "none"},
        {"bias": True},
        {"seed": 3, "anchors": "kmeans"},
    ],
)
def test_every_knob_of_the_plan_reaches_the_merge(networks, same_logits, knobs):
    network, name = networks("digits-vgg"), "features.3"
    small = itf.prune(network.model, network.example, 0.5, groups=[name], **knobs)
    group, by_hand = network.group(name), copy.deepcopy(network.folded)
    plan = itf.plan(by_hand, group, itf.score(by_hand, group), 0.5, **knobs)
    itf.registry("merge")["fusion"](by_hand, group, plan)
    same_logits(small(network.images), by_hand(network.images))
    default = prune_groups(network.model, network.groups, 0.5, groups=[name])
    assert not torch.equal(small(network.images), default(network.images))


def test_the_seed_reaches_the_criterion(networks):
    network = networks("vgg")
    first, again, other = (
        itf.prune(network.model, network.example, 0.5, "random", "drop", seed=seed)(network.images) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_data_reach_the_criterion(networks, monkeypatch):
    seen = []
    entry = itf.registry("criterion")["l1"]

    def record(model, group, data, generator):
        seen.append(data)
        return entry(model, group, data, generator)

    monkeypatch.setitem(itf.registry("criterion"), "l1", replace(entry, function=record, needs="labels"))
    network, data = networks("mlp"), itf.load_data("digits")
    with pytest.raises(itf.IntrafusionError, match="labels"):
        itf.prune(network.model, network.example)
    itf.prune(network.model, network.example, data=data, calibration=7, seed=3)
    assert len(seen) == 2
    assert all(torch.equal(part.images, data.subset(7, 3).images) for part in seen)


@pytest.mark.parametrize("act", ["find", "score", "plan", "drop", "fusion", "fold"])
@pytest.mark.parametrize("name", ["resnet-pad", "densenet", "digits-vgg"])
def test_the_model_is_never_touched(networks, name, act):
    network = networks(name)
    model = copy.deepcopy(network.model)
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    tensors = {key: value.data_ptr() for key, value in model.state_dict().items()}
    match act:
        case "find":
            itf.find_groups(model, network.example)
        case "score":
            for criterion in DATA_FREE["criterion"]:
                itf.score(model, network.prunable[0], criterion)
        case "plan":
            itf.plan(model, network.prunable[0], torch.arange(float(network.prunable[0].size)), anchors="kmeans")
        case "fold":
            itf.fold(model, network.example)
        case merge:
            small = itf.prune(model, network.example, 0.5, merge=merge)
            for tensor in small.state_dict().values():
                tensor.fill_(1)
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
        assert value.data_ptr() == tensors[key]
    assert torch.equal(model(network.images), network.logits)


def test_the_global_random_state_is_left_alone(networks):
    network = networks("vgg")
    before = torch.get_rng_state()
    itf.prune(network.model, network.example, 0.5, "random", anchors="gmm")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_in_training_mode_prunes_as_it_evaluates(networks):
    network = networks("resnet-pad")
    training = copy.deepcopy(network.model).train()
    small = itf.prune(training, network.example, 0.5)
    assert training.training
    expected = itf.prune(network.model, network.example, 0.5)
    assert torch.equal(small.eval()(network.images), expected(network.images))


def test_the_card_goes_with_the_network():
    model = itf.load_model("digits-mlp", weights="random")
    assert itf.prune(model, model.card.example(), 0.5).card == model.card


def test_a_pruned_network_can_be_pruned_again(networks):
    network = networks("resnet-pad")
    once = itf.prune(network.model, network.example, 0.5)
    found = {group.name: group.size for group in itf.find_groups(once, network.example) if group.reason is None}
    assert found == {group.name: sum(block_counts(group.block, kept_count(group.size, 0.5))) for group in network.prunable}
    twice = itf.prune(once, network.example, 0.5)
    assert parameters(twice) < parameters(once)
    assert twice(network.images).shape == network.logits.shape


def test_a_pruned_network_learns(networks):
    network = networks("resnet-pad")
    model = copy.deepcopy(network.model).requires_grad_(True)
    small = itf.prune(model, network.example, 0.5)
    F.cross_entropy(small.train()(network.images), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())


ERRORS = {
    "unknown group": ({"groups": ["layer9"]}, "layer9"),
    "unknown group by name": ({"groups": "layer9"}, "layer9"),
    "group with a reason": ({"groups": ["linear"]}, "outputs"),
    "no groups": ({"groups": []}, "no group"),
    "unknown group of a mapping": ({"sparsity": {"layer1.0.conv9": 0.5}}, "layer1.0.conv1"),
    "group with a reason, of a mapping": ({"sparsity": {"linear": 0.5}}, "outputs"),
    "group of a mapping that is not chosen": (
        {"sparsity": {"conv1": 0.5, "layer1.0.conv1": 0.5}, "groups": ["conv1"]},
        "layer1.0.conv1",
    ),
    "unknown merge": ({"merge": "melt"}, "melt"),
    "unknown criterion": ({"criterion": "vibes"}, "vibes"),
    "unknown solver": ({"solver": "oracle"}, "oracle"),
    "unknown marginal": ({"source": "flat"}, "flat"),
    "unknown anchors": ({"anchors": "heavy"}, "heavy"),
    "sparsity of one": ({"sparsity": 1.0}, "sparsity"),
    "sparsity above one": ({"sparsity": 1.3}, "1.3"),
    "negative sparsity": ({"sparsity": -0.1}, "-0.1"),
    "sparsity not a number": ({"sparsity": float("nan")}, "sparsity"),
    "p below one": ({"p": 0.5}, "0.5"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_arguments_are_one_clear_line(networks, case):
    options, words = ERRORS[case]
    network = networks("resnet-projection")
    with pytest.raises(itf.IntrafusionError) as caught:
        itf.prune(network.model, network.example, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


NUMBERS = {
    "a weight": ("layer1.0.conv1.weight", "weight of layer1.0.conv1 has NaN or infinite values"),
    "a bias": ("linear.bias", "bias of linear has NaN"),
    "statistics": ("layer1.0.bn1.running_var", "running_var of layer1.0.bn1 has NaN"),
}


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_refused_with_their_layers_name(networks, case, number):
    network = networks("resnet-projection")
    name, words = NUMBERS[case]
    model = copy.deepcopy(network.model)
    model.state_dict()[name].view(-1)[0] = number
    calls = [lambda: itf.fold(model, network.example), lambda: itf.prune(model, network.example, merge="drop")]
    if not name.startswith("linear"):
        group = network.group("layer1.0.conv1")
        calls += [lambda: itf.score(model, group), lambda: itf.plan(model, group, torch.ones(group.size))]
    for call in calls:
        with pytest.raises(itf.IntrafusionError, match=words):
            call()


class TestModes:
    """A network that is in training is pruned as in eval mode, and comes back in the mode that it came in."""

    @pytest.mark.parametrize(
        ("name", "merge"),
        [
            *(
                ("resnet-projection", merge)
                for merge in ("drop", "fusion", "fold", "calibrated", "refit", "refit-all", "fold-r")
            ),
            *(("densenet", merge) for merge in ("fusion", "refit")),
        ],
    )
    def test_the_mode_changes_nothing(self, networks, name, merge):
        network = networks(name)
        data = itf.ImageData(
            "noise", "train", torch.randint(0, 256, (16, *network.example.shape[1:]), dtype=torch.uint8),
            torch.arange(16) % 5, tuple("abcde"),
        )  # fmt: skip
        answers = []
        for train in (False, True):
            model = copy.deepcopy(network.model).train(train)
            model.card = itf.ModelCard("x", (0.5,) * 3, (0.25,) * 3, tuple(network.example.shape[1:]), 5, "noise")
            next(iter(model.children())).eval()
            modes = {part: module.training for part, module in model.named_modules()}
            state = copy.deepcopy(model.state_dict())
            small = itf.prune(model, network.example, 0.5, merge=merge, data=data)
            assert {part: module.training for part, module in model.named_modules()} == modes
            assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
            assert all(module.training == modes.get(part, train) for part, module in small.named_modules())
            answers.append(small.eval()(network.images))
        torch.testing.assert_close(*answers, rtol=0, atol=0)

    def test_a_fold_comes_back_in_the_mode_that_the_model_is_in(self, networks):
        network = networks("resnet-projection")
        folded = itf.fold(copy.deepcopy(network.model).train(), network.example)
        assert all(module.training for module in folded.modules())


def test_a_loaded_and_a_pruned_network_can_be_trained_as_they_are():
    model = itf.load_model("digits-resnet")
    small = itf.prune(model, model.card.example(), 0.3)
    for network in (model, small):
        network.train()(torch.randn(4, 1, 8, 8)).square().sum().backward()
        assert all(p.grad is not None for p in network.parameters())


def test_what_is_frozen_stays_frozen(networks):
    network = networks("resnet-projection")
    model = copy.deepcopy(network.model).requires_grad_(True)
    model.layer1[0].conv1.weight.requires_grad_(False)
    small = itf.prune(model, network.example, 0.5)
    assert not small.layer1[0].conv1.weight.requires_grad
    assert small.layer1[0].conv2.weight.requires_grad


def test_a_network_without_hidden_channels_has_nothing_to_prune():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
    with pytest.raises(itf.IntrafusionError, match="no group to prune"):
        itf.prune(model, torch.zeros(1, 3, 2, 2))


def test_chosen_groups_come_in_the_order_found(networks):
    network = networks("resnet-projection")
    names = [group.name for group in network.prunable]
    assert [group.name for group in choose_groups(network.groups, names[::-1])] == names
    assert [group.name for group in choose_groups(network.groups, "all")] == names


@pytest.mark.parametrize("merge", ["drop", "fusion", "fold", "interpolation", "refit"])
def test_rounded_widths_are_multiples_everywhere(networks, merge):
    network = networks("cifar10-resnet20")  # its shortcuts have blocks of channels
    small = prune_groups(network.model, network.groups, 0.3, merge=merge, round_to=8, data=network.data, calibration=8)
    widths = [module.out_channels for module in small.modules() if isinstance(module, torch.nn.Conv2d)]
    assert {width % 8 for width in widths} == {0}
    assert sorted(set(widths)) == [8, 16, 24, 40, 48]
    assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("model", "example", "sparsity", "words"),
    [
        (nn.Linear(3, 2).state_dict(), torch.zeros(1, 3), 0.5, "must be an nn.Module, not a OrderedDict"),
        (nn.Linear, torch.zeros(1, 3), 0.5, "not the class Linear"),
        (nn.Linear(3, 2), None, 0.5, "example must be an input tensor .* not a NoneType"),
        (nn.Linear(3, 2), (1, 3), 0.5, "not a tuple"),
        *((nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3), sparsity, "sparsity must be a number of")
          for sparsity in ("0.5", None, [0.5], float("nan"), 1)),
    ],
)  # fmt: skip
def test_arguments_of_another_kind_are_one_line(model, example, sparsity, words):
    with pytest.raises(itf.IntrafusionError, match=words):
        itf.prune(model, example, sparsity)


@pytest.mark.parametrize(("kind", "told"), [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)])
def test_norms_that_stay_in_half_precision_are_told(caplog, kind, told):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).to(kind)
    itf.prune(model, torch.zeros(1, 1, 8, 8, dtype=kind), 0.5)
    assert ("BatchNorm is not folded" in caplog.text) == told
