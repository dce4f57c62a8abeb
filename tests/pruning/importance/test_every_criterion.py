"""What holds for every registered criterion, the ones added later too."""

import copy
from dataclasses import replace

import pytest
import torch

import intrafusion as itf
from intrafusion.pruning.groups.find import _permuted

CRITERIA = itf.registry("criterion")
SEEING = [name for name, entry in CRITERIA.items() if entry.needs != "nothing"]
NETWORKS = ["mlp", "digits-vgg", "resnet-pad", "resnet-projection"]


def applies(criterion, model, group):
    """All criteria apply to all groups, but bn_scale needs a norm with scales."""
    layers = [model.get_submodule(layer.name) for layer in group.layers]
    return criterion != "bn_scale" or any(getattr(layer, "affine", False) for layer in layers)


def state(model):
    """Everything of a network that scoring must leave alone."""
    hooks = [(m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks) for m in model.modules()]
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        [len(hook) for hooks_of in hooks for hook in hooks_of],
        [set(vars(module)) for module in model.modules()],
    )


def check(criterion, network):
    data = network.data.subset(7)
    folded = network.folded
    before = state(network.model)
    for group in network.kinds:
        if not applies(criterion, network.model, group):
            continue
        scores = itf.score(network.model, group, criterion, data)
        assert scores.shape == (group.size,)
        assert scores.dtype == torch.float64
        assert scores.isfinite().all()
        assert (scores >= 0).all()
        assert torch.equal(itf.score(network.model, group, criterion, data), scores)
        close = {"rtol": 1e-3, "atol": 1e-5 * float(scores.max())}
        torch.testing.assert_close(itf.score(folded, group, criterion, data), scores, **close)
    after = state(network.model)
    assert all(torch.equal(before[0][name], tensor) for name, tensor in after[0].items())
    assert after[1:] == before[1:]


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in SEEING])
def test_weights_alone(criterion, network):
    check(criterion, network)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("criterion", SEEING)
def test_with_images(criterion, networks, name):
    check(criterion, networks(name))


@pytest.mark.parametrize("name", ["vgg", "resnet-pad"])
@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
def test_scores_follow_their_channels(criterion, networks, name):
    network = networks(name)
    for group in network.kinds:
        if not applies(criterion, network.model, group):
            continue
        order = torch.arange(group.size)
        for block in group.block.unique():
            order[group.block == block] = order[group.block == block].roll(1)
        permuted = _permuted(network.model, [group], 1)
        scores, moved = (itf.score(model, group, criterion, network.data) for model in (network.model, permuted))
        torch.testing.assert_close(moved, scores[order], rtol=1e-3, atol=1e-5 * float(scores.max()))


@pytest.mark.parametrize("criterion", SEEING)
def test_batches_do_not_matter(criterion, networks, monkeypatch):
    network = networks("resnet-pad")
    expected = [itf.score(network.model, group, criterion, network.data) for group in network.prunable]
    monkeypatch.setattr("intrafusion.data.datasets._PIXELS", 5 * 64)  # 24 images by 5, and 4 at the end
    scores = [itf.score(network.model, group, criterion, network.data) for group in network.prunable]
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("criterion", SEEING)
def test_missing_images_are_one_clear_line(criterion, networks):
    network = networks("mlp")
    with pytest.raises(itf.IntrafusionError, match=f"{criterion} needs {CRITERIA[criterion].needs}") as caught:
        itf.score(network.model, network.prunable[0], criterion)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("criterion", [name for name in SEEING if CRITERIA[name].needs == "images"])
def test_labels_are_not_needed_where_not_asked_for(criterion, networks):
    network = networks("mlp")
    unlabelled = replace(network.data, labels=torch.full_like(network.data.labels, -1))
    scores = [itf.score(network.model, network.prunable[0], criterion, data) for data in (network.data, unlabelled)]
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0"])
def test_torchvisions_networks(name):
    torch.manual_seed(0)
    model = itf.load_model(f"imagenet/{name}", weights="random")
    model.card = replace(model.card, input_size=(3, 64, 64))
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    data = itf.ImageData("noise", "test", images, torch.tensor([3, 700]), tuple(map(str, range(1000))))
    groups = [group for group in itf.find_groups(model, model.card.example()) if group.reason is None]
    group = groups[len(groups) // 2]
    for criterion in CRITERIA:
        if applies(criterion, model, group):
            scores = itf.score(model, group, criterion, data)
            assert scores.shape == (group.size,)
            assert scores.isfinite().all()


def test_entries_say_what_they_are():
    for entry in CRITERIA.values():
        assert 10 <= len(entry.summary) <= 120
        assert entry.needs in ("nothing", "images", "labels")
        assert entry.paper or entry.name == "random"
    assert "reconstructed from the abstract" in CRITERIA["relative"].told


def test_bad_requests_are_one_clear_line(networks):
    network = networks("mlp")
    for group, criterion, words in (
        (network.prunable[0], "vibes", "unknown criterion 'vibes'"),
        (network.groups[-1], "l1", "outputs"),
    ):
        with pytest.raises(itf.IntrafusionError) as caught:
            itf.score(network.model, group, criterion)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_dead_group_scores_no_nan(criterion, networks):
    network = networks("vgg")
    model = copy.deepcopy(network.model)
    for layer in network.prunable[0].layers:
        for tensor in layer.views(model).values():
            tensor.zero_()
    scores = itf.score(model, network.prunable[0], criterion, network.data)
    assert scores.isfinite().all()
    if criterion != "random":
        assert not scores.any()


@pytest.mark.parametrize("criterion", SEEING)
def test_images_of_another_size_are_one_clear_line(criterion, networks):
    network = networks("vgg")
    with pytest.raises(itf.IntrafusionError, match="choose the data the model was trained on") as caught:
        itf.score(network.model, network.prunable[0], criterion, itf.load_data("digits"))
    assert "\n" not in str(caught.value)


def test_a_forward_that_branches_on_values_is_one_clear_line():
    class Moody(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.mean() > 0.1 else -x)

    model = Moody(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).eval()
    model.card = itf.ModelCard("moody", (0.0,), (1.0,), (1, 2, 2), 2, "noise")
    data = itf.ImageData("noise", "test", torch.ones(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3).long(), ("a", "b"))
    group = itf.find_groups(model, model.card.example())[0]
    for criterion, words in (("obd", "obd cannot"), ("deep-lift", "torch.fx can trace")):
        with pytest.raises(itf.IntrafusionError, match=words) as caught:
            itf.score(model, group, criterion, data)
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_on_the_gpu_are_the_cpus(criterion, networks):
    network = networks("digits-vgg")
    group, there = network.prunable[2], copy.deepcopy(network.model).to("cuda")
    expected = itf.score(network.model, group, criterion, network.data)
    scores = itf.score(there, group, criterion, network.data.to("cuda"))
    torch.testing.assert_close(scores, expected, rtol=1e-2, atol=1e-3 * float(expected.max()))
