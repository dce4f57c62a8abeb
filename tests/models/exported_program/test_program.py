"""Programs of torch.export as networks: the same logits, the same groups, and the rest of the house works on them."""

import copy
from collections.abc import Callable
from typing import Any

import own_files as files
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models import VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.regnet import BlockParams

import intrafusion as itf
from intrafusion.models import hub
from intrafusion.models.exported_program import read_program
from intrafusion.models.fingerprint import of_model
from intrafusion.models.fx.partition import trace
from intrafusion.studies.uploads import remove, take_program, take_weights


class Odd(nn.Module):
    """What people write: computed sizes, sums in place, splits, a shared layer, a bare parameter, calls of two results."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8, affine=False)
        self.twice, self.deep = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.scale, self.head = nn.Parameter(torch.rand(8, 1, 1) + 0.5), nn.Linear(8 * 4, 5)
        self.register_buffer("shift", torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = self.twice(F.hardswish(self.twice(x)))
        x += self.deep(x)
        first, second = torch.split(x * self.scale + self.shift, 4, dim=1)
        x, _ = F.max_pool2d(torch.cat([second, first], 1), 2, return_indices=True)
        x = F.adaptive_avg_pool2d(x, 2)
        return self.head(x.view(x.size(0), -1))


class Shared(nn.Module):
    """One matrix that two layers use in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x)) + F.conv2d(x, self.one.weight, padding=2, dilation=2)
        return self.head(x.mean((2, 3)))


def _timm(make: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make(pytest.importorskip("timm").models)


FAMILIES: dict[str, Callable[[], nn.Module]] = {  # a small one of each that people export
    "shufflenet": lambda: models.ShuffleNetV2([1, 1, 1], [4, 8, 16, 16, 16], num_classes=5),
    "mobilenet": lambda: models.MobileNetV2(5, 0.25, [[1, 16, 1, 1], [6, 16, 2, 2]]),
    "convnext": lambda: models.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5),
    "squeezenet": lambda: models.SqueezeNet("1_1", 5),
    "regnet": lambda: models.RegNet(BlockParams.from_init_params(1, 16, 8.0, 2.0, 8, 0.25), 5, 8),
    "vit": lambda: VisionTransformer(32, 16, 1, 2, 8, 12, num_classes=5),
    "maxvit": lambda: models.MaxVit((32, 32), 8, 4, [8, 8], [1, 1], 8, 0.0, num_classes=5),
    "resmlp": _timm(lambda timm: timm.MlpMixer(
        5, 32, patch_size=16, num_blocks=1, embed_dim=8, mlp_ratio=4, block_layer=timm.mlp_mixer.ResBlock,
        norm_layer=timm.mlp_mixer.Affine,
    )),
    "swin": _timm(lambda timm: timm.SwinTransformer(32, 2, 3, 5, "avg", 8, (2, 2), (2, 2), window_size=4)),
    "ghostnet": _timm(lambda timm: timm.GhostNet([[[3, 8, 8, 0, 1]], [[3, 16, 8, 0.25, 2]]], 5, 0.5)),
}  # fmt: skip
SMALL = {"odd": (Odd, (3, 8, 8)), "shared": (Shared, (3, 8, 8)), "tiny": (files.network, (1, 8, 8))}
NETWORKS = (
    "mlp",
    "vgg",
    "resnet-projection",
    "resnet-pad",
    "densenet",
    "mobilenet",
    "resnext",
    "squeeze-excite",
    "fire",
    "plain-norm",
)


def opened(tmp_path: Any, model: nn.Module, size: tuple[int, ...], **options: bool) -> nn.Module:
    program, found, classes = read_program(files.export(model, tmp_path / "p.pt2", size, **options))
    assert found == size
    assert classes == model(torch.zeros(1, *size)).shape[1]
    return program


@pytest.mark.parametrize("core", [False, True], ids=["as written", "core operators"])
@pytest.mark.parametrize("name", SMALL)
def test_logits_are_the_networks(tmp_path, random_weights, same_logits, name, core):
    make, size = SMALL[name]
    model = random_weights(make())
    program = opened(tmp_path, model, size, core=core)
    images = torch.randn(5, *size)
    for batch in (images, images[:1]):
        same_logits(program(batch), model(batch), 1e-5) if len(batch) > 1 else torch.testing.assert_close(
            program(batch), model(batch), rtol=1e-5, atol=1e-5
        )
    assert not program.training
    assert {name for name, _ in program.named_parameters()} <= {name for name, _ in model.named_parameters()}
    assert not any(parameter.requires_grad for parameter in program.parameters())


@pytest.mark.parametrize(
    ("name", "core"),
    [
        *((name, False) for name in NETWORKS),
        *((name, True) for name in ("mlp", "vgg", "resnet-projection", "resnet-pad")),
    ],
)
def test_every_kind_of_coupling_is_found_again(tmp_path, networks, name, core):
    one = networks(name)
    program = opened(tmp_path, one.model, tuple(one.example.shape[1:]), core=core)
    torch.testing.assert_close(program(one.images), one.logits, rtol=1e-5, atol=1e-5 * float(one.logits.abs().max()))
    found = {group.name: group for group in itf.find_groups(program, one.example)}
    for group in one.groups:
        again = found[group.name]
        assert again.size == group.size
        assert (again.reason is None) == (group.reason is None)
    keys = set(one.model.state_dict())
    assert set(program.state_dict()) == {key for key in keys if not key.startswith("head.") or "head.weight" in keys}


def test_a_transformers_hidden_channels_are_found_again(tmp_path):
    model = VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3).eval()
    program = opened(tmp_path, model, (3, 8, 8))
    found = {group.name: group.reason for group in itf.find_groups(program, torch.zeros(1, 3, 8, 8))}
    assert {name for name, reason in found.items() if reason is None} == {
        "encoder.layers.encoder_layer_0.mlp.0", "encoder.layers.encoder_layer_1.mlp.0",
    }  # fmt: skip
    attention = found["encoder.layers.encoder_layer_0.self_attention"]
    assert "encoder.layers.encoder_layer_0.self_attention.out_proj reads a part of its channels" in attention


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_each_family_opens(tmp_path, random_weights, name):
    model = random_weights(FAMILIES[name]().eval())
    program = opened(tmp_path, model, (3, 32, 32))
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-4 * float(model(images).abs().max()))


def test_a_batch_of_one_size_is_enough_where_the_network_does_not_write_it_out(tmp_path):
    model = itf.load_model("digits-vgg")
    program = opened(tmp_path, model, (1, 8, 8), dynamic=False)
    images = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(program(images), model(images))


@pytest.fixture
def kept(tmp_path):
    """The embedded ResNet, kept as a program."""
    path = files.export(itf.load_model("digits-resnet"), tmp_path / "resnet.pt2")
    return take_program(path, "mine", "digits")


def test_a_kept_program_is_a_model_like_any_other(kept):
    dense = itf.load_model("digits-resnet")
    model = itf.load_model(kept)
    card = model.card
    assert (card.name, card.dataset, card.classes, card.input_size) == ("kept/mine", "digits", 10, (1, 8, 8))
    assert (card.mean, card.std) == (dense.card.mean, dense.card.std)
    assert kept in hub.model_names()
    assert hub.is_local(kept)
    assert hub.dataset_of(kept) == "digits"
    assert hub.architecture_of(kept) == kept
    assert "program" in hub.describe(kept)["summary"]
    data = itf.load_data("digits")
    for merge in ("drop", "fusion"):
        ours, theirs = (
            itf.evaluate(itf.prune(one, card.example(), 0.3, merge=merge), data, limit=None).accuracy for one in (model, dense)
        )
        assert ours == theirs
    assert torch.equal(itf.evaluate(copy.deepcopy(model), data).correct, itf.evaluate(dense, data).correct)


def test_what_makes_studies_fast_works_on_programs(kept):
    model, dense = itf.load_model(kept), itf.load_model("digits-resnet")
    cuts = trace(model, model.card.example())
    assert cuts is not None
    assert cuts.layers() == trace(dense, model.card.example()).layers()


def test_another_graph_of_the_same_weights_is_another_network(tmp_path, kept):
    def of(path: Any) -> str:
        model = read_program(path)[0]
        model.card = itf.ModelCard("x", (0.0,), (1.0,), (1, 8, 8), 3, "own")
        return of_model(model)

    path = files.export(files.network(), tmp_path / "p.pt2")

    def change(about: dict[str, Any]) -> None:
        next(n for n in about["graph_module"]["graph"]["nodes"] if ".relu." in n["target"])["target"] = (
            "torch.ops.aten.sigmoid.default"
        )

    other = files.with_graph(path, tmp_path / "q.pt2", change)
    assert of(path) == of(path) != of(other)


def test_random_weights_are_others(kept):
    first, second = itf.load_model(kept), itf.load_model(kept, weights="random")
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    assert second.card.source == "random initialisation"


def test_pruned_programs_can_be_kept_and_weights_given_to_them(tmp_path, kept):
    model = itf.load_model(kept)
    small = itf.prune(model, model.card.example(), 0.5)
    small.card = model.card
    name = hub.keep(small, "half")
    again = itf.load_model(name)
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(again(images), small(images))
    assert hub.architecture_of(name) == kept
    state = {key: value * 0 for key, value in model.state_dict().items() if value.is_floating_point()}
    path = files.save_state(tmp_path / "zeros.safetensors", state)
    assert take_weights(path, kept, "zeros") == "kept/zeros"
    assert not itf.load_model("kept/zeros")(images).any()


def test_a_name_is_taken_once_and_free_again_when_removed(tmp_path, kept):
    path = files.export(files.network(), tmp_path / "p.pt2")
    with pytest.raises(itf.IntrafusionError, match="kept/mine already exists"):
        take_program(path, "mine")
    with pytest.raises(itf.IntrafusionError, match="choose another name"):
        hub.keep(itf.load_model("digits-mlp"), "mine")
    remove("models", "kept/mine")
    assert kept not in hub.model_names()
    assert take_program(path, "mine") == "kept/mine"
    with pytest.raises(itf.IntrafusionError, match="kept/other does not exist"):
        remove("models", "other")


@pytest.mark.parametrize(("options", "match"), [
    ({"dataset": "mnist"}, "unknown dataset 'mnist'"),
    ({"mean": (0.5, 0.5)}, "one number for each channel"),
    ({"std": (0.0,)}, "std positive"),
    ({"mean": (float("nan"),)}, "finite"),
])  # fmt: skip
def test_a_card_that_makes_no_sense_is_one_line(tmp_path, options, match):
    path = files.export(files.network(), tmp_path / "p.pt2")
    with pytest.raises(itf.IntrafusionError, match=match):
        take_program(path, "mine", **options)
    assert hub.kept_names() == []


def test_the_reader_never_unpickles(tmp_path, monkeypatch):
    path = files.export(files.network(), tmp_path / "p.pt2")

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("something was unpickled")

    for module, name in (
        ("pickle", "loads"),
        ("pickle", "load"),
        ("pickle", "Unpickler"),
        ("torch", "load"),
        ("torch.export", "load"),
    ):
        monkeypatch.setattr(f"{module}.{name}", never)
    assert read_program(path)[2] == 3
