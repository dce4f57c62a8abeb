import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from complaints import complaint
from safetensors.torch import save_file
from torch import nn

import intrafusion as itf
from intrafusion.models import hub
from intrafusion.models.architectures import ResNet
from intrafusion.models.card import read_card
from intrafusion.models.hub import ARCHITECTURES
from intrafusion.models.sources import torchvision
from intrafusion.models.state_dict import read_state
from intrafusion.runtime.paths import ASSETS

EMBEDDED = sorted(path.stem for path in ASSETS.glob("*.safetensors"))
DIGITS = [name for name in EMBEDDED if name.startswith("digits-")]


def refused(match: str | None, call: Callable[..., object], *arguments: object, **options: object) -> str:
    with pytest.raises(itf.IntrafusionError, match=match) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def state_of(name: str = "digits-mlp") -> dict[str, torch.Tensor]:
    return read_state(ASSETS / f"{name}.safetensors")


class TestEmbedded:
    def test_the_three_digits_models_are_there(self):
        assert {"digits-mlp", "digits-vgg", "digits-resnet"} <= set(EMBEDDED)
        assert set(hub.model_names(imagenet=False)[: len(EMBEDDED)]) == set(EMBEDDED)

    @pytest.mark.parametrize("name", EMBEDDED)
    def test_model_is_ready_to_use(self, name):
        model = itf.load_model(name)
        assert not any(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert model(model.card.example()).shape == (1, 10)
        assert model.card.name == name
        assert hub.is_local(name)

    @pytest.mark.parametrize("name", EMBEDDED)
    def test_files_are_small_and_their_card_says_how_they_were_made(self, name):
        assert (ASSETS / f"{name}.safetensors").stat().st_size < 2 << 20
        card = itf.load_model(name).card
        assert card.details["command"].startswith(f"python -m intrafusion train {name}")
        assert isinstance(card.details["seed"], int)
        assert {"python", "torch"} <= set(card.details["versions"])
        assert card.details["parameters"] == sum(p.numel() for p in itf.load_model(name).parameters())
        assert card.licence
        low, high = card.details["interval"]
        assert low < card.accuracy < high

    @pytest.mark.parametrize("name", EMBEDDED)
    def test_card_survives_its_json(self, name, tmp_path):
        card = itf.load_model(name).card
        (tmp_path / "card.json").write_text(json.dumps(card.to_dict()))
        assert read_card(tmp_path / "card.json", ARCHITECTURES[name].card) == card

    @pytest.mark.parametrize("name", DIGITS)
    def test_accuracy_of_the_card_is_measured_again(self, name):
        model = itf.load_model(name)
        measured = itf.evaluate(model, itf.load_data("digits"), limit=None)
        assert measured.accuracy == pytest.approx(model.card.accuracy, abs=1e-9)
        assert measured.count == model.card.details["test_images"]
        assert measured.accuracy >= 0.985

    def test_models_do_not_share_weights(self):
        first, second = itf.load_model("digits-mlp"), itf.load_model("digits-mlp")
        next(first.parameters()).data.zero_()
        assert next(second.parameters()).abs().sum() > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_builds_without_weights(name):
    model = itf.load_model(name, weights="random")
    card = model.card
    assert not model.training
    assert model(card.example()).shape == (1, card.classes)
    assert card.source == "random initialisation"
    assert card.accuracy is None
    assert card.dataset == hub.dataset_of(name) == name.partition("-")[0]
    described = hub.describe(name)
    assert described["name"] == name
    assert described["weights"] in ("embedded", "download", "local file")


def write_plain(path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def write_nested(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({"state_dict": state, "best_prec1": 91.7, "epoch": 3}, path)


def write_parallel(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({"net": {f"module.{key}": value for key, value in state.items()}, "acc": 91.7}, path)


def write_old_format(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_half(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({key: value.half() if value.is_floating_point() else value for key, value in state.items()}, path)


class TestLocalFile:
    @pytest.mark.parametrize(("file", "write"), [
        ("w.safetensors", write_plain), ("w.pt", write_plain), ("w.pth", write_plain), ("w.th", write_plain),
        ("w.th", write_nested), ("w.pt", write_parallel), ("w.pth", write_old_format), ("w.pt", write_half),
    ])  # fmt: skip
    def test_every_form_gives_the_same_network(self, tmp_path, file, write):
        write(tmp_path / file, state_of("digits-resnet"))
        model = itf.load_model("digits-resnet", weights=tmp_path / file)
        images = torch.randn(3, 1, 8, 8)
        expected = itf.load_model("digits-resnet")(images)
        torch.testing.assert_close(model(images), expected, rtol=0.02, atol=0.02 if write is write_half else 1e-6)
        assert not model.training
        assert next(model.parameters()).dtype == torch.float32

    def test_card_beside_the_file_is_laid_over_the_architectures(self, tmp_path):
        write_plain(tmp_path / "w.pt", state_of())
        assert itf.load_model("digits-mlp", str(tmp_path / "w.pt")).card.mean == (0.3054,)
        assert str(tmp_path / "w.pt") in itf.load_model("digits-mlp", tmp_path / "w.pt").card.source
        (tmp_path / "w.json").write_text(json.dumps({"mean": [0.5], "accuracy": 0.7, "origin": "x", "name": "other"}))
        card = itf.load_model("digits-mlp", tmp_path / "w.pt").card
        assert (card.mean, card.std, card.accuracy, card.name) == ((0.5,), (0.3758,), 0.7, "digits-mlp")

    def test_weights_decide_the_shortcut_of_cifar_resnets(self, tmp_path):
        for shortcut in ("pad", "projection"):
            torch.save(ResNet(3, (16, 32, 64), 10, shortcut=shortcut).state_dict(), tmp_path / "w.pt")
            model = itf.load_model("cifar10-resnet20", tmp_path / "w.pt")
            assert isinstance(model.layer2[0].shortcut, nn.Sequential) == (shortcut == "projection")

    def test_imagenet_architecture_reads_a_local_file(self, tmp_path):
        torch.manual_seed(0)
        state = itf.load_model("imagenet/squeezenet1_1", weights="random").state_dict()
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.pth")
        model = itf.load_model("imagenet/squeezenet1_1", tmp_path / "w.pth")
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        assert model.card.accuracy is None
        assert str(tmp_path / "w.pth") in model.card.source


class Runs:
    """A pickle that would write a file when it is read the unsafe way."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.sentinel, "it ran")


class TestRefused:
    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
    @pytest.mark.parametrize("bare", [True, False], ids=["bare pickle", "torch file"])
    def test_pickle_that_would_run_code_does_not(self, tmp_path, suffix, bare):
        sentinel, path = tmp_path / "sentinel", tmp_path / f"w{suffix}"
        content = {"state_dict": state_of(), "extra": Runs(sentinel)}
        path.write_bytes(pickle.dumps(content, protocol=2)) if bare else torch.save(content, path)
        assert str(path) in refused(None, itf.load_model, "digits-mlp", path)
        assert not sentinel.exists()
        torch.load(path, weights_only=False) if not bare else pickle.loads(path.read_bytes())
        assert sentinel.exists()  # the file was as dangerous as it claims

    CONTENTS = {  # noqa: RUF012
        "a list": lambda: [torch.zeros(2)],
        "a tensor": lambda: torch.zeros(2),
        "an empty dict": dict,
        "an empty state dict": lambda: {"state_dict": {}},
        "a dict of numbers": lambda: {"a": 1, "b": 2.0},
        "a whole model": lambda: itf.load_model("digits-mlp"),
        "another architecture": lambda: state_of("digits-vgg"),
        "a misshapen layer": lambda: state_of() | {"3.weight": torch.zeros(96, 127)},
        "a missing layer": lambda: {key: value for key, value in state_of().items() if key != "3.weight"},
        "a layer too many": lambda: state_of() | {"7.weight": torch.zeros(3)},
        "NaN": lambda: state_of() | {"3.bias": torch.full((96,), torch.nan)},
        "infinity": lambda: state_of() | {"3.bias": torch.full((96,), -torch.inf)},
        "a text for a tensor": lambda: state_of() | {"3.bias": "zeros"},
        "nested too deep": lambda: {"checkpoint": {"weights": state_of()}},
        "numbered layers": lambda: dict(enumerate(state_of().values())),
    }

    @pytest.mark.parametrize("make", CONTENTS.values(), ids=CONTENTS)
    def test_content_that_does_not_fit_is_one_line(self, tmp_path, make):
        torch.save(make(), tmp_path / "w.pt")
        assert "w.pt" in refused(None, itf.load_model, "digits-mlp", tmp_path / "w.pt")

    def test_what_does_not_fit_is_named(self, tmp_path):
        for change, words in {"3.weight": "3.weight has shape .*127.*128", "9.weight": "unknown key 9.weight"}.items():
            torch.save(state_of() | {change: torch.zeros(96, 127)}, tmp_path / "w.pt")
            refused(words, itf.load_model, "digits-mlp", tmp_path / "w.pt")
        torch.save(state_of() | {"5.bias": torch.tensor([torch.nan] * 10)}, tmp_path / "w.pt")
        refused("5.bias .*NaN", itf.load_model, "digits-mlp", tmp_path / "w.pt")

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".th"])
    def test_damaged_files_are_one_line(self, tmp_path, suffix):
        path, complaints = tmp_path / f"w{suffix}", {}
        write_plain(path, state_of())
        whole = path.read_bytes()
        damaged = {f"first {length} bytes": whole[:length] for length in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1)}
        damaged |= {f"byte {value}": bytes([value]) for value in range(256)}
        damaged |= {"text": b"no weights\n", "zeros": bytes(1000), "zip": b"PK\x03\x04" + bytes(100)}
        for name, content in damaged.items():
            path.write_bytes(content)
            complaints[name] = complaint(path, lambda: itf.load_model("digits-mlp", path))
        assert {name: words for name, words in complaints.items() if words} == {}

    def test_wrong_paths_are_one_line(self, tmp_path):
        (tmp_path / "w.onnx").write_bytes(b"")
        refused("no file at .*nowhere.pt", itf.load_model, "digits-mlp", tmp_path / "nowhere.pt")
        refused("must end in", itf.load_model, "digits-mlp", tmp_path / "w.onnx")
        refused("no file at", itf.load_model, "digits-mlp", tmp_path)
        refused("no file at", itf.load_model, "imagenet/squeezenet1_1", "IMAGENET1K_V9")

    @pytest.mark.parametrize("path", ["x" * 300 + ".pt", "~nobody-of-this-name/w.pt"], ids=["too long", "no user"])
    def test_impossible_paths_are_one_line(self, path):
        refused(None, itf.load_model, "digits-mlp", path)

    CARDS = {  # noqa: RUF012
        "not JSON": "{'mean': 1}",
        "empty": "",
        "a list": "[1, 2]",
        "a number": "7",
        "mean a number": '{"mean": 0.5}',
        "mean of words": '{"mean": ["half"]}',
        "mean of two channels": '{"mean": [0.5, 0.5]}',
        "std of zero": '{"std": [0]}',
        "std null": '{"std": null}',
        "input size of two": '{"input_size": [8, 8]}',
        "classes a word": '{"classes": "ten"}',
        "accuracy a word": '{"accuracy": "good"}',
        "accuracy in percent": '{"accuracy": 91.7}',
    }

    @pytest.mark.parametrize("text", CARDS.values(), ids=CARDS)
    def test_broken_card_is_one_line(self, tmp_path, text):
        torch.save(state_of(), tmp_path / "w.pt")
        (tmp_path / "w.json").write_text(text)
        assert "w.json" in refused(None, itf.load_model, "digits-mlp", tmp_path / "w.pt")

    def test_card_in_another_encoding_is_one_line(self, tmp_path):
        (tmp_path / "w.json").write_bytes('{"licence": "©"}'.encode("utf-16"))
        refused("w.json", read_card, tmp_path / "w.json", ARCHITECTURES["digits-mlp"].card)

    NAMES = {  # noqa: RUF012
        "unknown": (("digits-lenet",), "digits-resnet"),
        "empty": (("",), "unknown model"),
        "unknown torchvision": (("imagenet/resnet19",), "resnet19"),
        "bare torchvision": (("resnet18",), "imagenet/<torchvision name>"),
        "a detector": (("imagenet/fasterrcnn_resnet50_fpn",), "fasterrcnn"),
        "never published": (("cifar10-resnet18",), "no published weights"),
        "no such device": (("digits-mlp", None, "cuda:99"), "cuda:99"),
        "no device": (("digits-mlp", None, "banana"), "banana"),
    }

    @pytest.mark.parametrize(("arguments", "match"), NAMES.values(), ids=NAMES)
    def test_wrong_names_are_one_line(self, tmp_path, monkeypatch, arguments, match):
        monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
        refused(match, itf.load_model, *arguments)

    @pytest.mark.parametrize("name", ["digits-lenet", "imagenet/resnet19", "cifar10-resnet18"])
    def test_whether_an_unknown_name_is_local_is_one_line(self, name):
        refused(None, hub.is_local, name)


class TestImagenet:
    def test_random_weights_have_the_card_of_the_published_ones(self):
        from torchvision.models import SqueezeNet1_1_Weights

        preset = SqueezeNet1_1_Weights.DEFAULT.transforms()
        model = itf.load_model("imagenet/squeezenet1_1", weights="random")
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
        assert (list(model.card.mean), list(model.card.std)) == (preset.mean, preset.std)
        assert model.card.input_size == (3, preset.crop_size[0], preset.crop_size[0])
        assert model.card.accuracy is None
        assert model.card.source == "random initialisation"

    def test_card_follows_the_chosen_weights(self):
        for name, size in {"imagenet/inception_v3": 299, "imagenet/efficientnet_b1": 240}.items():
            card = torchvision.card(name, torchvision.member(name, None))
            assert card.input_size == (3, size, size)
            assert 0.5 < card.accuracy < 1

    @pytest.mark.slow
    def test_a_vision_transformer_is_for_images_of_its_weights_size(self, tmp_path):
        from torchvision.models import vit_b_32

        side = 96
        with torch.device("meta"):
            shapes = vit_b_32(image_size=side).state_dict()
        torch.save({name: torch.zeros(value.shape) for name, value in shapes.items()}, tmp_path / "w.pth")
        model = itf.load_model("imagenet/vit_b_32", tmp_path / "w.pth")
        assert model.card.input_size == (3, side, side)
        assert model(model.card.example()).shape == (1, 1000)

    def test_a_drawn_vision_transformer_is_for_images_of_the_default_weights_size(self):
        with torch.device("meta"):
            model, card = torchvision.blank("imagenet/vit_h_14", {})
        assert card.input_size == (3, 518, 518)
        assert model.image_size == 518

    def test_list_has_them(self):
        names = hub.model_names()
        assert {"imagenet/resnet18", "imagenet/squeezenet1_1", "imagenet/googlenet"} <= set(names)
        assert len(names) == len(set(names))
        assert hub.describe("imagenet/resnet18")["weights"] == "download"

    def test_weights_on_disk_count_as_local(self, tmp_path, monkeypatch):
        monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
        assert not hub.is_local("imagenet/squeezenet1_1")
        file = torchvision.published("imagenet/squeezenet1_1")[1]
        file.parent.mkdir(parents=True)
        torch.save(itf.load_model("imagenet/squeezenet1_1", weights="random").state_dict(), file)
        assert hub.is_local("imagenet/squeezenet1_1")
        card = itf.load_model("imagenet/squeezenet1_1").card
        assert card.accuracy == pytest.approx(0.58178)
        assert "torchvision" in card.source

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "side"), [("googlenet", 224), ("inception_v3", 299)])
    def test_auxiliary_heads_are_off(self, name, side):
        model = itf.load_model(f"imagenet/{name}", weights="random")
        assert model(torch.zeros(1, 3, side, side)).shape == (1, 1000)
        assert not [key for key in model.state_dict() if key.lower().startswith("aux")]
        assert model.train()(torch.zeros(2, 3, side, side)).shape == (2, 1000)


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_embedded_weights_are_small_and_say_how_they_were_made(path):
    assert path.stat().st_size < 2_000_000
    card = itf.load_model(path.stem).card
    assert card.details["command"].startswith(f"python -m intrafusion train {path.stem}")


@pytest.mark.reference
class TestReference:
    @pytest.mark.parametrize("depth", [20, 32, 56])
    def test_published_resnets_load_with_the_normalisation_of_their_card(self, reference, depth):
        path = reference(f"weights/cifar10_resnet{depth}.th")
        theirs = json.loads(path.with_suffix(".json").read_text())
        card = itf.load_model(f"cifar10-resnet{depth}", path).card
        assert (list(card.mean), list(card.std)) == (theirs["mean"], theirs["std"])

    def test_resnet20_beats_chance_on_a_few_images(self, reference):
        model = itf.load_model("cifar10-resnet20", reference("weights/cifar10_resnet20.th"))
        images = itf.load_data("cifar10", path=reference("data/cifar10_test.npz"))
        assert itf.evaluate(model, images, limit=100).accuracy > 0.8

    def test_the_embedded_vgg_has_its_cards_accuracy(self, reference):
        model = itf.load_model("cifar10-vgg-slim")
        low, high = model.card.details["interval"]
        assert low > 0.9
        images = itf.load_data("cifar10", path=reference("data/cifar10_test.npz"))
        assert low - 0.02 < itf.evaluate(model, images, limit=2000).accuracy < high + 0.02

    @pytest.mark.slow
    def test_resnet20_has_its_published_accuracy(self, reference):
        model = itf.load_model("cifar10-resnet20", reference("weights/cifar10_resnet20.th"))
        images = itf.load_data("cifar10", path=reference("data/cifar10_test.npz"))
        measured = itf.evaluate(model, images, limit=None)
        assert measured.count == 10_000
        assert measured.accuracy == pytest.approx(0.9173, abs=0.001)

    @pytest.mark.slow
    def test_squeezenet_has_its_accuracy_on_the_samples(self, reference):
        model = itf.load_model("imagenet/squeezenet1_0", reference("weights/imagenet_squeezenet1_0.pt"))
        images = itf.load_data("imagenet", path=reference("data/imagenet_samples"))
        assert len(images) == 1000
        measured = itf.evaluate(model, images, limit=150)
        assert measured.accuracy == pytest.approx(81 / 150, abs=0.01)  # 0.600 on all of them
        assert measured.interval[0] < 0.58092 < measured.interval[1]  # as published, on all of ImageNet
