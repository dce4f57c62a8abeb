import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import intrafusion as itf
from intrafusion.pruning.groups.group import CHANNELWISE, CONSUMER, PAD, PRODUCER
from intrafusion.pruning.groups.surgery import shrink
from intrafusion.pruning.merge import MERGES

# root -> (size, layers that write the channels, layers that read them, layers with one weight a channel)
COUPLINGS = {
    "mlp": {"1": (8, "1", "3", ""), "3": (6, "3", "5", "")},
    "vgg": {
        "features.0": (6, "features.0", "features.4", "features.1"),
        "features.4": (8, "features.4", "classifier.0", "features.5"),
        "classifier.0": (7, "classifier.0", "classifier.3", ""),
    },
    "resnet-projection": {
        "conv1": (
            4,
            "conv1 layer1.0.conv2 layer1.1.conv2",
            "layer1.0.conv1 layer1.1.conv1 layer2.0.conv1 layer2.0.shortcut.0",
            "bn1 layer1.0.bn2 layer1.1.bn2",
        ),
        "layer1.0.conv1": (4, "layer1.0.conv1", "layer1.0.conv2", "layer1.0.bn1"),
        "layer1.1.conv1": (4, "layer1.1.conv1", "layer1.1.conv2", "layer1.1.bn1"),
        "layer2.0.conv1": (6, "layer2.0.conv1", "layer2.0.conv2", "layer2.0.bn1"),
        "layer2.0.conv2": (
            6,
            "layer2.0.conv2 layer2.0.shortcut.0 layer2.1.conv2",
            "layer2.1.conv1 linear",
            "layer2.0.bn2 layer2.0.shortcut.1 layer2.1.bn2",
        ),
        "layer2.1.conv1": (6, "layer2.1.conv1", "layer2.1.conv2", "layer2.1.bn1"),
    },
    "pre-activation": {
        "body.stem": (6, "body.stem body.conv2", "body.conv1 head", "body.norm1 body.norm3"),
        "body.conv1": (4, "body.conv1", "body.conv2", "body.norm2"),
    },
    "fire": {
        "body.0": (6, "body.0", "body.2.squeeze", ""),
        "body.2.squeeze": (3, "body.2.squeeze", "body.2.one body.2.three", ""),
        "body.2.one": (4, "body.2.one", "body.3.squeeze", ""),
        "body.2.three": (5, "body.2.three", "body.3.squeeze", ""),
        "body.3.squeeze": (2, "body.3.squeeze", "body.3.one body.3.three", ""),
        "body.3.one": (3, "body.3.one", "head", ""),
        "body.3.three": (3, "body.3.three", "head", ""),
    },
    "resnext": {
        "body.0": (4, "body.0", "body.6", "body.1 body.3 body.4"),
        "body.6": (6, "body.6", "head", ""),
    },
    "multiplier": {
        "body.0": (4, "body.0", "body.6", "body.1 body.3 body.4"),
        "body.6": (6, "body.6", "head", ""),
    },
    "squeeze-excite": {
        "body.stem": (6, "body.stem body.up", "body.down head", "body.norm"),
        "body.down": (4, "body.down", "body.up", ""),
    },
    "doubled": {"body.stem": (4, "body.stem", "body.mix", ""), "body.mix": (6, "body.mix", "head", "")},
    "flat-norm": {"0": (4, "0", "4", "3")},
}


@pytest.mark.parametrize("name", COUPLINGS)
def test_groups_couple_exactly_the_layers_that_share_channels(networks, name):
    found = {
        group.name: (
            group.size,
            *({layer.name for layer in group.role(role)} for role in (PRODUCER, CONSUMER, CHANNELWISE)),
        )
        for group in networks(name).prunable
    }
    assert found == {
        root: (size, *(set(names.split()) for names in layers)) for root, (size, *layers) in COUPLINGS[name].items()
    }


def test_option_a_stages_form_one_residual_group_of_three_blocks(networks):
    network = networks("cifar10-resnet20")
    inner = {f"layer{s}.{b}.conv1": width for s, width in ((1, 16), (2, 32), (3, 64)) for b in range(3)}
    assert {group.name: group.size for group in network.prunable} == {"conv1": 64, **inner}
    residual = network.group("conv1")
    assert len(residual.block.unique()) == 3
    assert {layer.name for layer in residual.role(PAD)} == {"layer2.0.shortcut", "layer3.0.shortcut"}
    # stage 1 is padded by 8 into stage 2, stage 2 by 16 into stage 3: channel 24 of the 64 is the stem's first
    depth = torch.zeros(64, dtype=torch.int64)
    depth[16:48] += 1
    depth[24:40] += 1
    same_depth = depth[:, None] == depth
    assert torch.equal(residual.block[:, None] == residual.block, same_depth)
    first = {"conv1": 24, "bn1": 24, "layer1": 24, "layer2": 16, "layer3": 0, "linear": 0}
    before = {"layer2.0.conv1": 24, "layer3.0.conv1": 16}  # these read the stage before theirs
    for layer in residual.layers:
        shift = before.get(layer.name, first[layer.name.split(".")[0]])
        held = layer.present()
        assert torch.equal(layer.positions[held, 0], torch.arange(64)[held] - shift), layer.name


@pytest.mark.parametrize("name", ["cifar10-resnet20", "mobilenet", "densenet", "digits-vgg"])
def test_the_classifier_is_listed_with_its_reason(networks, name):
    last = networks(name).groups[-1]
    assert last.name in ("linear", "classifier.1", "classifier", "classifier.0")
    assert "outputs" in last.reason


def test_densenet_channels_lie_behind_each_other_in_every_later_layer(networks):
    network = networks("densenet")
    starts = {"features.conv0": 0, "features.denseblock1.denselayer1.conv2": 8}
    starts["features.denseblock1.denselayer2.conv2"] = 12
    for name, start in starts.items():
        group = network.group(name)
        readers = {layer.name: layer.positions[:, 0].tolist() for layer in group.role(CONSUMER, CHANNELWISE)}
        for reader in ("features.transition1.conv", "features.transition1.norm"):
            assert readers[reader] == list(range(start, start + group.size))


def test_mobilenet_expansions_carry_their_depthwise_convolution(networks):
    network = networks("mobilenet")
    assert len(network.prunable) == 9
    group = network.group("features.3.conv.0.0")
    assert [layer.name for layer in group.role(CHANNELWISE)] == [
        "features.3.conv.0.1",
        "features.3.conv.1.0",
        "features.3.conv.1.1",
    ]
    residual = network.group("features.2.conv.2")
    assert {layer.name for layer in residual.role(PRODUCER)} == {"features.2.conv.2", "features.3.conv.2"}


def test_flattened_channels_are_blocks_of_inputs(networks):
    (reader,) = networks("digits-vgg").group("features.17").role(CONSUMER)
    assert reader.positions.tolist() == [[4 * j, 4 * j + 1, 4 * j + 2, 4 * j + 3] for j in range(128)]


def test_whole_convolution_groups_are_the_channels(networks):
    group = networks("resnext").group("body.0")
    for layer in group.layers:
        assert layer.positions.tolist() == [[2 * j, 2 * j + 1] for j in range(4)]


def test_every_channel_of_every_axis_is_in_at_most_one_group(network):
    seen = {}
    for group in network.groups:
        for layer in group.layers:
            side = "in" if layer.role == CONSUMER else "out"
            positions = layer.positions[layer.present()].flatten().tolist()
            assert len(set(positions)) == len(positions)
            taken = seen.setdefault((layer.name, side), set())
            assert not taken & set(positions), (group.name, layer.name)
            taken |= set(positions)
    for name, module in network.model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert seen[name, "out"] == set(range(module.weight.shape[0])), name


def test_permuting_a_group_leaves_the_logits_unchanged(network):
    model, images = copy.deepcopy(network.model).double(), network.images.double()
    expected = model(images)
    generator = torch.Generator().manual_seed(1)
    for group in network.prunable:
        order = torch.arange(group.size)
        for block in group.block.unique():
            members = (group.block == block).nonzero()[:, 0]
            order[members] = members[torch.randperm(len(members), generator=generator)]
        for layer in group.layers:
            held = layer.present()
            for view in layer.views(model).values():
                view[layer.positions[held]] = view[layer.positions[order][held]].clone()
    torch.testing.assert_close(model(images), expected)


def test_groups_come_from_input_to_output_with_distinct_names(network):
    calls = [name for name, module in network.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    names = [group.name for group in network.groups]
    assert len(set(names)) == len(names)
    assert names[0] == calls[0]
    assert names[-1] == calls[-1]


class _SharedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        return self.head(x.mean((2, 3)))


class _BareParameter(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.rand(shape))

    def forward(self, x):
        return self.head((F.relu(self.stem(x)) * self.scale).mean((2, 3)))


class _TiedLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.next, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.next.weight = self.stem.weight

    def forward(self, x):
        return self.head(F.relu(self.next(F.relu(self.stem(x.flatten(1)[:, :12])))))


class _Between(nn.Module):
    """A convolution, something between, a linear head on everything or on the means."""

    def __init__(self, between, head=None, layers=0, width=6):
        super().__init__()
        self.stem, self.between, self.pooled = nn.Conv2d(3, width, 3, padding=1), between, head is None
        rest = ((nn.Conv2d(width, width, 3, padding=1), nn.ReLU()) for _ in range(layers))
        self.rest = nn.Sequential(*(module for pair in rest for module in pair))
        self.head = head or nn.Linear(width, 5)

    def forward(self, x):
        x = self.rest(self.between(F.relu(self.stem(x))))
        return self.head(x.mean((2, 3)) if self.pooled else x)


class _Shuffle(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class _Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.full((1, 6, 1, 1), 2.0))

    def forward(self, x):
        return x * self.scale


class _View(nn.Module):
    def forward(self, x):
        return x.view(-1, 6 * 8 * 8)


class _ChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)


def _shuffled_chain():
    return nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), _Shuffle(), nn.Conv2d(6, 6, 1), nn.ReLU())


REASONS = {
    "a layer used twice": (_SharedLayer, "stem", "twice is used more than once"),
    "a bare parameter": (lambda: _BareParameter((6, 1, 1)), "stem", "combined with the parameter"),
    "layer norm": (lambda: _Between(nn.LayerNorm([6, 8, 8])), "stem", "LayerNorm"),
    "group norm": (lambda: _Between(nn.GroupNorm(2, 6)), "stem", "GroupNorm"),
    "a transposed convolution": (lambda: _Between(nn.ConvTranspose2d(6, 6, 1)), "stem", "transposed"),
    "tied weights": (_TiedLayers, "stem", "share their weights"),
    "channels flattened last": (lambda: _Between(_ChannelsLast(), nn.Linear(384, 5)), "stem", "mixes them"),
    "a channel shuffle": (lambda: _Between(_Shuffle()), "stem", "mixes them"),
    "the network's outputs": (_SharedLayer, "head", "outputs"),
    "a single channel": (
        lambda: nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)),
        "0",
        "only one channel",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_be_pruned_says_why(random_weights, case):
    make, root, words = REASONS[case]
    torch.manual_seed(0)
    groups = {group.name: group for group in itf.find_groups(random_weights(make()), torch.zeros(1, 3, 8, 8))}
    assert groups[root].reason is not None
    assert words in groups[root].reason


class _Gated(nn.Module):
    """A branch multiplied by another one through detach, which no gradient shows; both go on on their own."""

    def __init__(self, width):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, width, 1), nn.Conv2d(3, width, 1)
        self.first, self.second, self.head = nn.Conv2d(width, 6, 1), nn.Conv2d(width, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        one, other = self.one(x), self.other(x)
        return self.head(F.relu(self.first(one * other.detach()) * self.second(other)).mean((2, 3)))


@pytest.mark.parametrize("width", [2, 3, 8])
def test_groups_of_one_size_that_depend_on_each_other_are_not_taken_for_independent(random_weights, width):
    torch.manual_seed(0)
    found = itf.find_groups(random_weights(_Gated(width)), torch.zeros(1, 3, 4, 4))
    assert {group.name for group in found if group.reason is None} == {"first"}


@pytest.mark.parametrize("parameters", [1, 6])
def test_prelu_is_one_slope_for_all_or_a_weight_of_each_channel(random_weights, same_logits, parameters):
    torch.manual_seed(0)
    model, images = random_weights(_Between(nn.PReLU(parameters))), torch.randn(4, 3, 8, 8)
    nn.init.uniform_(model.between.weight, -1, 1)
    group = itf.find_groups(model, images[:1])[0]
    assert group.reason is None
    assert [layer.name for layer in group.role(CHANNELWISE)] == (["between"] if parameters > 1 else [])
    scores = itf.score(model, group)
    small = itf.prune(model, images[:1], 0.5, merge="drop", groups=[group.name])
    masked = copy.deepcopy(model)
    gone = scores.argsort()[:3]
    masked.stem.weight.data[gone] = 0
    masked.stem.bias.data[gone] = 0
    assert small.between.weight.shape == (parameters // 2 or 1,)
    same_logits(small(images), masked(images))


def test_local_response_norm_is_tried_on_large_activations(random_weights):
    torch.manual_seed(0)
    model = random_weights(_Between(nn.LocalResponseNorm(5, alpha=1e-4, k=2)))  # AlexNet's: nothing happens below 10
    assert itf.find_groups(model, torch.zeros(1, 3, 8, 8))[0].reason is not None


def test_a_network_that_answers_by_chance_is_refused():
    model = _Between(nn.Identity())
    model.between.forward = lambda x: F.dropout(x, 0.5)
    with pytest.raises(itf.IntrafusionError, match="not deterministic"):
        itf.find_groups(model, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(("output", "words"), [(lambda y: {"logits": y}, "dict"), (lambda y: (y, y), "tuple")])
def test_an_output_that_is_no_tensor_is_named(output, words):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    model.register_forward_hook(lambda module, inputs, result: output(result))
    with pytest.raises(itf.IntrafusionError, match=f"not {words}; wrap it"):
        itf.find_groups(model, torch.zeros(1, 3, 8, 8))


TREACHEROUS = {
    "layer norm without parameters": lambda: _Between(nn.LayerNorm([6, 8, 8], elementwise_affine=False)),
    "group norm without parameters": lambda: _Between(nn.GroupNorm(2, 6, affine=False)),
    "group norm of four channels": lambda: _Between(nn.GroupNorm(2, 4, affine=False), width=4),
    "local response norm": lambda: _Between(nn.LocalResponseNorm(3, alpha=1)),
    "instance norm": lambda: _Between(nn.InstanceNorm2d(6)),
    "instance norm with statistics": lambda: _Between(nn.InstanceNorm2d(6, track_running_stats=True)),
    "batch norm without statistics": lambda: _Between(nn.BatchNorm2d(6, track_running_stats=False)),
    "a constant buffer": lambda: _Between(_Scale()),
    "a view of fixed size": lambda: _Between(_View(), nn.Linear(384, 5)),
    "softmax over channels": lambda: _Between(nn.Softmax(1)),
    "a scalar parameter": lambda: _BareParameter(()),
    "a channel shuffle": lambda: _Between(_shuffled_chain()),
}


@pytest.mark.filterwarnings("ignore:input's size at dim=1")
@pytest.mark.parametrize("case", TREACHEROUS)
def test_a_group_without_a_reason_prunes_right_or_is_refused(random_weights, same_logits, case):
    torch.manual_seed(0)
    model, images = random_weights(TREACHEROUS[case]()), torch.randn(4, 3, 8, 8)
    try:
        groups = itf.find_groups(model, images[:1])
    except itf.IntrafusionError:
        return
    for group in (group for group in groups if group.reason is None):
        plan = itf.plan(model, group, itf.score(model, group))
        merged = itf.fold(model, images[:1])
        MERGES["fusion"](merged, group, plan)
        small = copy.deepcopy(merged)
        shrink(small, {group: plan.kept})
        same_logits(small(images), merged(images))


@pytest.mark.parametrize("width", range(2, 9))
def test_few_channels_are_checked_as_well_as_many(random_weights, width):
    # a random permutation of two or four channels may be the identity, or one that the mixing happens to survive
    torch.manual_seed(0)
    model = random_weights(_Between(_ChannelsLast(), nn.Linear(width * 64, 5), width=width))
    assert itf.find_groups(model, torch.zeros(1, 3, 8, 8))[0].reason is not None


@pytest.mark.parametrize("layers", [0, 4, 8])
def test_a_shuffle_far_from_the_logits_is_never_prunable(layers):
    # PyTorch's own initialisation shrinks the signal at each layer, until the head's bias is all that the logits show
    torch.manual_seed(0)
    model = _Between(_Shuffle(), layers=layers).eval()
    stem = itf.find_groups(model, torch.zeros(1, 3, 8, 8))[0]
    assert stem.name == "stem"
    assert stem.reason is not None


class _Loud(nn.Module):
    """Values so large that float32 rounds away, in one order or another, some of what tells two images apart."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(F.relu(self.two(F.relu(self.one(x)))).mean((2, 3)) + 1e5)


def test_rounding_is_not_taken_for_mixing(random_weights):
    groups = itf.find_groups(random_weights(_Loud()), torch.zeros(1, 3, 8, 8))
    assert [group.reason for group in groups[:2]] == [None, None]


@pytest.mark.parametrize("place", range(5))
def test_one_wrong_group_is_told_from_the_right_ones(random_weights, place):
    layers = [[nn.Conv2d(3 if i == 0 else 6, 6, 1), nn.ReLU(), _Shuffle() if i == place else nn.Identity()] for i in range(5)]
    model = nn.Sequential(*(layer for three in layers for layer in three), nn.Flatten(), nn.Linear(6 * 64, 5))
    groups = itf.find_groups(random_weights(model), torch.zeros(1, 3, 8, 8))
    assert [group.reason is None for group in groups[:5]] == [i != place for i in range(5)]


class _Bad(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.stem, self.head, self.act = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), forward

    def forward(self, x):
        return self.act(self, x)


def _asserts(model, x):
    raise AssertionError  # a bare assert in a forward: an exception without any text


UNTRACEABLE = {
    "input of another size": lambda model, x: model.head(model.stem(x).flatten(1)),
    "a bare assertion": _asserts,
    "two outputs": lambda model, x: (model.head(model.stem(x).mean((2, 3))), x),
    "an exception": lambda model, x: 1 // 0,
}


@pytest.mark.parametrize("case", UNTRACEABLE)
def test_a_network_that_cannot_be_traced_is_one_clear_line(case):
    with pytest.raises(itf.IntrafusionError) as caught:
        itf.find_groups(_Bad(UNTRACEABLE[case]).eval(), torch.zeros(1, 3, 8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet-pad", "densenet", "digits-vgg"])
def test_finding_groups_touches_nothing(networks, name):
    model = copy.deepcopy(networks(name).model).train()
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    random_state = torch.get_rng_state()
    itf.find_groups(model, networks(name).example)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_only_the_shape_of_the_example_matters(networks):
    network = networks("resnet-pad")
    again = itf.find_groups(network.model, torch.full_like(network.images, 7.0))
    assert [(g.name, g.size, g.reason, g.block.tolist()) for g in again] == [
        (g.name, g.size, g.reason, g.block.tolist()) for g in network.groups
    ]


def test_inference_mode_is_refused_in_one_line():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    with torch.inference_mode(), pytest.raises(itf.IntrafusionError, match="outside of torch"):
        itf.find_groups(model, torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(("tracks", "told"), [(False, True), (True, False)])
def test_a_network_whose_answers_depend_on_the_batch_is_told(caplog, tracks, told):
    norm = nn.BatchNorm2d(4, track_running_stats=tracks)
    itf.find_groups(nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(144, 3)), torch.zeros(1, 1, 8, 8))
    assert ("depend on the other images" in caplog.text) == told
