"""OT fusion of networks: aligned ones compute the same, and a network shuffled is found again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import intrafusion as itf
from intrafusion.pruning.groups.feature_maps import normalised
from intrafusion.training import fuse_models
from intrafusion.training.batchnorm import measure_norms
from intrafusion.training.model_fusion import align, permute_channels

G = torch.Generator().manual_seed(0)


def shuffled(network, model=None):
    """The network, or another model of its shape, with every group's channels in another order."""
    model = copy.deepcopy(model or network.model)
    for group in network.prunable:
        order = torch.arange(group.size)
        for block in group.block.unique():
            rows = (group.block == block).nonzero()[:, 0]
            order[rows] = rows[torch.randperm(len(rows), generator=G)]
        permute_channels(model, group, order)
    return model


def test_another_order_computes_the_same(network):
    torch.testing.assert_close(shuffled(network)(network.images), network.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_a_shuffled_network_is_found_again(network, by):
    data = network.data if by == "activations" else None
    again = align(shuffled(network), network.model, network.prunable, data)
    torch.testing.assert_close(again(network.images), network.logits, rtol=1e-4, atol=1e-4)
    if by == "weights":
        for name, value in network.model.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value, msg=name)


def test_fusing_a_network_with_its_shuffle_is_the_network(network):
    fused = fuse_models([network.model, shuffled(network)], network.example)
    torch.testing.assert_close(fused(network.images), network.logits, rtol=1e-4, atol=1e-4)


def test_three_networks_are_averaged(networks):
    network = networks("mlp")
    models = [network.model, shuffled(network), shuffled(network)]
    torch.testing.assert_close(fuse_models(models, network.example)(network.images), network.logits, rtol=1e-4, atol=1e-4)


def test_alignment_helps_networks_trained_apart():
    """Two networks that learned from halves of the data: the aligned average beats the plain one."""
    from intrafusion.training.augment import wobble
    from intrafusion.training.loop import Recipe, train

    data, test, models = itf.load_data("digits", "train"), itf.load_data("digits"), []
    for seed, rows in enumerate((slice(0, 600), slice(600, 1200))):
        torch.manual_seed(seed)
        model = itf.load_model("digits-mlp", weights="random")
        half = itf.ImageData("digits", "train", data.images[rows], data.labels[rows], data.classes)
        list(train(model, half, Recipe(epochs=15, augment=wobble, lr=0.1, batch=64), model.card.mean, model.card.std))
        models.append(model)
    plain = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    plain.load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    found = {
        "plain": plain,
        "weights": fuse_models(models, models[0].card.example()),
        "activations": fuse_models(models, models[0].card.example(), data),
    }
    accuracy = {name: itf.evaluate(model, test).accuracy for name, model in found.items()}
    assert accuracy["weights"] > accuracy["plain"] + 0.02
    assert accuracy["activations"] > accuracy["plain"] + 0.02


def test_vectors_are_compared_at_length_one():
    """Two hidden neurons of one direction each: a shorter one is still the same, whatever else lies nearer."""

    def network(*rows):
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
        model[1].weight.data = torch.tensor(rows)
        model[3].weight.data = torch.eye(2)
        return model.eval()

    short, long = network([10.0, 0.0], [0.0, 0.1]), network([3.0, 5.0], [0.3, 0.0])
    short.card = itf.ModelCard("two", (0.0,), (1.0,), (1, 1, 2), 2, "none")
    groups = [group for group in itf.find_groups(short, torch.zeros(1, 1, 1, 2)) if group.reason is None]
    again = align(long, short, groups)
    torch.testing.assert_close(again[1].weight, torch.tensor([[0.3, 0.0], [3.0, 5.0]]))


class Mixed(nn.Module):
    """Norms behind some layers only: also a transposed, grouped and a 1-d convolution, a linear layer on (B, H, W, C)."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2, bias=False)
        self.mix, self.along = nn.Linear(8, 7), nn.Conv1d(7, 6, 3)
        self.last_norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.up(F.relu(self.norm(self.stem(x)))))
        x = F.relu(self.mix(x.movedim(1, -1))).movedim(-1, 1)
        return self.head(self.last_norm(F.relu(self.along(x.flatten(2))).mean(2)))


def statistics(model, names, inputs=False):
    """The mean and deviation of what each layer writes (or reads), channel by channel, on the model's own images."""
    found = {}

    def note(module, read, output, name):
        values = read[0] if inputs else output
        values = values.movedim(-1 if isinstance(module, nn.Linear) else 1, -1).flatten(0, -2).double()
        found[name] = torch.stack([values.mean(0), values.std(0, correction=0)])

    hooks = [model.get_submodule(n).register_forward_hook(lambda *told, n=n: note(*told, n)) for n in names]
    model(model.images)
    [hook.remove() for hook in hooks]
    return found


@pytest.fixture
def pair(request, networks, random_weights):
    """Two networks of one architecture, unlike each other; their images, normalised; layers without a norm behind them."""
    torch.manual_seed(1)
    if request.param == "mixed":
        model, data = random_weights(Mixed()), networks("resnet-pad").data
        model.card = networks("resnet-pad").model.card
    else:
        model, data = copy.deepcopy(networks(request.param).model), networks(request.param).data
    for module in model.modules():  # one norm of every sign would be hidden by the other's
        if isinstance(module, _BatchNorm) and module.affine:
            module.weight.data.abs_()
    other = random_weights(copy.deepcopy(model))
    images = torch.cat([images for images, _ in normalised(model, data)])
    normed = {layer.name for group in itf.find_groups(model, images[:1]) for layer in group.layers if layer.norm}
    layers = [name for name, layer in model.named_modules() if isinstance(layer, _ConvNd | nn.Linear)]
    return [model, other], data, images, [name for name in layers if name not in normed]


@pytest.mark.parametrize("pair", ["mlp", "vgg", "pre-activation", "fire", "squeeze-excite", "mixed"], indirect=True)
def test_a_fused_network_has_the_mean_of_the_statistics_of_its_members(pair):
    models, data, images, names = pair
    example = images[:1] * 0
    fused = fuse_models(models, example, data)
    groups = [group for group in itf.find_groups(models[0], example) if group.reason is None]
    members = [models[0], align(models[1], models[0], groups, data)]
    for model in (fused, *members):
        model.images = images
    wanted = [statistics(member, names) for member in members]
    norms = [name for name, module in fused.named_modules() if isinstance(module, _BatchNorm)]
    tolerance = 0.03 if norms else 1e-4  # norms keep the variance that n - 1 gives, of few images here
    assert names
    for name, found in statistics(fused, names).items():
        mean = (wanted[0][name] + wanted[1][name]) / 2
        torch.testing.assert_close(found, mean, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    for name, (mean, std) in statistics(fused, norms, inputs=True).items():
        norm = fused.get_submodule(name)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(norm.running_var.double().sqrt(), std, rtol=tolerance, atol=tolerance)
    assert {n: tuple(v.shape) for n, v in fused.named_parameters() if n in dict(models[0].named_parameters())} == {
        n: tuple(v.shape) for n, v in models[0].named_parameters()
    }


@pytest.mark.parametrize("name", ["mlp", "resnet-projection", "pre-activation", "mobilenet"])
@pytest.mark.parametrize("by", ["weights", "activations"])
def test_with_images_a_network_fused_with_its_shuffle_is_the_network_measured_again(networks, same_logits, name, by):
    network = networks(name)
    again = copy.deepcopy(network.model)
    images = torch.cat([images for images, _ in normalised(network.model, network.data)])
    measure_norms(again, [images])
    fused = fuse_models([again, shuffled(network, again)], network.example, network.data, by=by)
    same_logits(fused(network.images), again(network.images), 0.05)  # norms keep n - 1 once more


@pytest.fixture(scope="module")
def halves():
    """Two small VGGs that learned from halves of the digits."""
    from intrafusion.models.architectures import Vgg
    from intrafusion.training.augment import wobble
    from intrafusion.training.loop import Recipe, train

    data, models, card = itf.load_data("digits", "train"), [], itf.load_model("digits-vgg").card
    for seed, rows in enumerate((slice(0, 600), slice(600, 1200))):
        torch.manual_seed(seed)
        model = Vgg((16, 16, "M", 32, 32, "M"), (128, 10), in_channels=1)
        half = itf.ImageData("digits", "train", data.images[rows], data.labels[rows], data.classes)
        list(train(model, half, Recipe(epochs=8, augment=wobble, lr=0.1, batch=64), card.mean, card.std))
        models.append(model.requires_grad_(False))
        model.card = card
    return models


@pytest.mark.parametrize("folded", [False, True])
def test_images_bring_back_what_averaging_takes_from_networks_trained_apart(halves, folded):
    """With their norms, and with these folded in."""
    test, example = itf.load_data("digits"), halves[0].card.example()
    models = [itf.fold(model, example) for model in halves] if folded else halves
    found = models[0], fuse_models(models, example), fuse_models(models, example, itf.load_data("digits", "train"))
    one, averaged, fused = (itf.evaluate(model, test, None).accuracy for model in found)
    assert averaged < one - 0.2
    assert fused > one - 0.03


def test_the_result_has_the_mode_and_the_card_of_the_first(networks):
    network = networks("resnet-projection")
    first, other = copy.deepcopy(network.model).train(), copy.deepcopy(network.model)
    first.get_submodule("head" if hasattr(first, "head") else next(iter(dict(first.named_children())))).eval()
    modes, values = [m.training for m in first.modules()], copy.deepcopy(first.state_dict())
    fused = fuse_models([first, other], network.example, network.data)
    assert [m.training for m in fused.modules()] == modes == [m.training for m in first.modules()]
    assert not any(m.training for m in fuse_models([other, first], network.example, network.data).modules())
    assert fused.card == network.model.card
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, values[name], rtol=0, atol=0)


def test_without_images_one_warning_says_that_statistics_are_averages(networks, caplog):
    network = networks("resnet-projection")
    fuse_models([network.model] * 3, network.example)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "statistics are averages" in caplog.text
    caplog.clear()
    fuse_models([network.model] * 3, network.example, network.data)
    assert not caplog.records


@pytest.mark.parametrize(
    ("names", "words"), [(["digits-mlp"], "at least two networks"), (["digits-mlp", "digits-vgg"], "same architecture")]
)
def test_what_cannot_be_fused_is_one_line(names, words):
    models = [itf.load_model(name) for name in names]
    with pytest.raises(itf.IntrafusionError, match=words):
        fuse_models(models, models[0].card.example())


def test_statistics_of_one_image_are_one_line(networks):
    network = networks("mlp")
    with pytest.raises(itf.IntrafusionError, match="at least two images"):
        fuse_models([network.model] * 2, network.example, network.data.subset(1))


def test_computed_weights_are_written_out(networks):
    network = networks("mlp")
    models = [copy.deepcopy(network.model), shuffled(network)]
    expected = fuse_models(models, network.example, network.data)(network.images)
    for model in models:
        name = next(name for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
        torch.nn.utils.parametrizations.weight_norm(model.get_submodule(name))
    fused = fuse_models(models, network.example, network.data)
    torch.testing.assert_close(fused(network.images), expected, rtol=1e-4, atol=1e-4)


def test_numbers_that_are_not_finite_are_one_line(networks):
    network = networks("mlp")
    model = copy.deepcopy(network.model)
    name, layer = next((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(itf.IntrafusionError, match=f"of {name} has NaN"):
        fuse_models([network.model, model], network.example, network.data)
