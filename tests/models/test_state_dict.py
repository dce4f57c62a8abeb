"""Weights files as training scripts leave them: each opens with the same numbers, or is refused in one line that helps."""

import argparse
import datetime
import sys
import types
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_weights import Call
from own_files import mlp_state, save_state
from torch import Tensor, nn

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.data.datasets import load_data
from intrafusion.evaluation.accuracy import evaluate
from intrafusion.models import hub
from intrafusion.models.card import card_of
from intrafusion.models.sources.nearest import nearest
from intrafusion.models.state_dict import located
from intrafusion.studies.uploads import take_weights

MODEL = "digits-resnet"  # convolutions, norms, a head
State = dict[str, Any]


@pytest.fixture(scope="module")
def dense() -> State:
    return {name: value.clone() for name, value in itf.load_model(MODEL).state_dict().items()}


def begun(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def other(state: State) -> State:
    """Another network's weights, as an average's are."""
    return {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    found = {}
    for name, value in state.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = value
    return found


def viewed(value: Tensor) -> Tensor:
    """The same numbers within a storage of more."""
    room = torch.full((value.numel() + 7,), 9, dtype=value.dtype)
    room[3 : value.numel() + 3] = value.flatten()
    return room[3 : value.numel() + 3].view(value.shape)


def masked(state: State) -> State:
    """conv1 as torch.nn.utils.prune leaves it."""
    weight, mask = state["conv1.weight"], torch.ones_like(state["conv1.weight"])
    return {k: v for k, v in state.items() if k != "conv1.weight"} | {
        "conv1.weight_orig": weight,
        "conv1.weight_mask": mask,
    }


def normed(state: State, how: Callable[[nn.Module], nn.Module]) -> State:
    """conv1 as weight_norm leaves it."""
    layer = nn.Conv2d(*state["conv1.weight"].shape[1::-1], 3, bias=False)
    layer.load_state_dict({"weight": state["conv1.weight"]})
    return {k: v for k, v in state.items() if k != "conv1.weight"} | begun("conv1.", how(layer).state_dict())


PRETENDED: set[str] = set()


def pretended(module: str, name: str, base: type = object) -> type:
    """A class that pickles as one of a package that is not there when the file is read."""
    made = type(name, (base,), {"__module__": module, "__qualname__": name})
    parts = module.split(".")
    for end in range(len(parts)):
        PRETENDED.add(whole := ".".join(parts[: end + 1]))
        sys.modules.setdefault(whole, types.ModuleType(parts[end]))
    setattr(sys.modules[module], name, made)
    return made


class Built:
    """A table as a file may build it: with attributes of its own in place of its methods."""

    def __init__(self, made: type, table: State, **attributes: Any):
        self.parts = made, (), attributes, None, iter(table.items())

    def __reduce__(self) -> tuple:
        return self.parts


def kept(made: Any, **attributes: Any) -> Any:
    vars(made).update(attributes)
    return made


def optimizers() -> State:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    return {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "whole": optimizer}


WHOLE: dict[str, Callable[[State], Any]] = {  # what holds the weights
    "an epoch beside them": lambda w: {"epoch": 3, "model_state_dict": w, "loss": 0.3},
    "two wrappers": lambda w: {"model": {"state_dict": w, "epoch": 3}},
    "a wrapper that is empty": lambda w: {"state_dict": {}, "net": w},
    "an average alone": lambda w: {"ema_state_dict": w},
    "weights": lambda w: {"weights": OrderedDict(w)},
    "params": lambda w: {"params": defaultdict(list, w)},
    "module.": lambda w: begun("module.", w),
    "model. of Lightning": lambda w: {"state_dict": begun("model.", w), "pytorch-lightning_version": "2.1"},
    "net.module._orig_mod.": lambda w: begun("net.module._orig_mod.", w),
    "_orig_mod.model.": lambda w: begun("_orig_mod.model.", w),
    "backbone.": lambda w: {"teacher": begun("module.backbone.", w)},
    "a prefix for some": lambda w: {f"module.{k}" if "layer" in k else k: v for k, v in w.items()},
    "a compiled part": lambda w: renamed(w, ("layer2.", "layer2._orig_mod.")),
    "other spellings behind a prefix": lambda w: begun(
        "module.", renamed(w, ("linear.", "fc."), (".shortcut.", ".downsample."))
    ),
    "no counters of norms": lambda w: {k: v for k, v in w.items() if not k.endswith("num_batches_tracked")},
    "bytes for names": lambda w: {k.encode(): v for k, v in w.items()},
    "parameters": lambda w: {k: nn.Parameter(v, requires_grad=v.is_floating_point()) for k, v in w.items()},
    "views": lambda w: {k: viewed(v) for k, v in w.items()},
}
TOLD: dict[str, tuple[Callable[[State], Any], str]] = {  # what is said of those that hold more than that
    "n_averaged": (lambda w: {**begun("module.", w), "n_averaged": torch.tensor(5)}, "not weights: n_averaged"),
    "total_ops": (lambda w: w | {"layer1.0.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}, "layer1.0.total_ops"),
    "counters too many": (lambda w: w | {"linear.num_batches_tracked": torch.tensor(3)}, "linear.num_batches_tracked"),
    "an epoch among weights": (lambda w: w | {"epoch": 3}, "not weights: epoch"),
    "an average beside them": (lambda w: {"state_dict_ema": other(w), "state_dict": w}, "state_dict_ema would"),
    "student and teacher": (lambda w: {"teacher": other(w), "student": w}, "under student; teacher would"),
    "two networks' keys": (lambda w: begun("net.", other(w)) | begun("model.", w), "under model; net would"),
    "a loss beside them": (
        lambda w: {"state_dict": begun("model.", w) | {"criterion.weight": torch.ones(10)}}, "under model: criterion.weight",
    ),
    "an average's keys beside others": (lambda w: w | begun("model_ema.module.", other(w)), "key) model_ema chooses them"),
    "an average's keys, as Lightning has them": (
        lambda w: {"state_dict": begun("net.", w) | begun("ema_model.", other(w))}, "key) ema_model chooses them",
    ),
    "an average's keys": (
        lambda w: begun("ema_model.", w) | {"initted": torch.tensor(True), "step": torch.tensor(9)}, "under ema_model: initted",
    ),
    "masks": (lambda w: masked(w), ": conv1.weight"),
    "weight_norm": (lambda w: normed(w, torch.nn.utils.weight_norm), ": conv1.weight"),
    "weight_norm, as parametrizations": (lambda w: normed(w, torch.nn.utils.parametrizations.weight_norm), ": conv1.weight"),
    "float64": (lambda w: {k: v.double() if v.is_floating_point() else v for k, v in w.items()}, "converting its float64"),
}  # fmt: skip
BESIDE: dict[str, Callable[[], Any]] = {  # what does not stop a safe load
    "a number of NumPy's": lambda: np.float64(0.9),
    "arrays": lambda: [np.arange(4), np.ones((2, 3), np.float32), np.array(["a"]), np.random.default_rng(0).random(3)],
    "an array of tables": lambda: np.array([{"a": 1}], dtype=object),
    "a generator's state": np.random.get_state,
    "a namespace": lambda: argparse.Namespace(lr=0.1, path=Path("runs"), more=argparse.Namespace()),
    "containers": lambda: [defaultdict(list, {"a": [1]}), deque([1, 2], maxlen=4), OrderedDict(a=1), {1, 2}, frozenset((3,))],
    "dates and types": lambda: [datetime.datetime(2024, 1, 1), datetime.timedelta(1), torch.float16, torch.Size([1]), dict],
    "PyTorch's version": lambda: torch.__version__,
    "states of training": optimizers,
    "yacs": lambda: kept(pretended("yacs.config", "CfgNode", dict)(lr=0.1), frozen=True),
    "omegaconf": lambda: kept(pretended("omegaconf.dictconfig", "DictConfig")(), content={"a": int}),
    "a callback as a key": lambda: {pretended("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): {"best": 1}},
}  # fmt: skip


def same(found: nn.Module, expected: State, within: float = 0.0) -> bool:
    """Whether a network has these weights; the counters of norms count for nothing."""
    state = found.state_dict()
    assert state.keys() == expected.keys()
    expected = {k: v for k, v in expected.items() if not k.endswith("num_batches_tracked")}
    return all(torch.allclose(state[k], v, rtol=0, atol=within) for k, v in expected.items())


class TestOpens:
    @pytest.mark.parametrize("file", [
        "w.pt", "checkpoint.pth.tar", "last.ckpt", "pytorch_model.bin", "W.PTH", "w.Th", "w.tar", "W.SafeTensors",
    ])  # fmt: skip
    def test_suffixes_in_any_case(self, tmp_path, dense, file):
        path = save_state(tmp_path / "w.safetensors" if "Safe" in file else tmp_path / "w.pt", dense)
        assert same(itf.load_model(MODEL, path.rename(tmp_path / file)), dense)

    @pytest.mark.parametrize("form", [True, False], ids=["zip", "older format"])
    @pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
    def test_wrappers_and_prefixes(self, tmp_path, dense, caplog, make, form):
        torch.save(make(dense), tmp_path / "w.pt", _use_new_zipfile_serialization=form)
        model = itf.load_model(MODEL, tmp_path / "w.pt")
        assert same(model, dense)
        assert caplog.text == ""
        assert "told" not in card_of(model).details

    @pytest.mark.parametrize(("make", "words"), TOLD.values(), ids=TOLD)
    def test_what_is_chosen_or_left_out_is_told_in_one_line(self, tmp_path, dense, caplog, make, words):
        torch.save(make(dense), tmp_path / "w.pt")
        model = itf.load_model(MODEL, tmp_path / "w.pt")
        assert same(model, dense, 1e-6)
        (line,) = card_of(model).details["told"]
        assert words in line
        assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'w.pt'}: {line}"]

    @pytest.mark.parametrize("form", [True, False], ids=["zip", "older format"])
    @pytest.mark.parametrize("make", BESIDE.values(), ids=BESIDE)
    def test_what_stands_beside_them_is_passed_over(self, tmp_path, dense, monkeypatch, make, form):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save({"model": dense, "beside": make()}, tmp_path / "w.pt", _use_new_zipfile_serialization=form)
        for name in PRETENDED & sys.modules.keys():
            monkeypatch.delitem(sys.modules, name)  # nothing of a package is imported
        assert same(itf.load_model(MODEL, tmp_path / "w.pt"), dense)
        assert not any(isinstance(one, tuple) for one in torch.serialization.get_safe_globals())

    def test_own_keys_may_begin_like_a_prefix(self, tmp_path, monkeypatch):
        code = (
            "from torch import nn\n"
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.model, self.net, self.flat = nn.Linear(64, 8), nn.Linear(8, 3), nn.Flatten()\n"
            "    def forward(self, x): return self.net(self.model(self.flat(x)))\n"
            "CARD = {'input_size': (1, 8, 8), 'mean': (0.0,), 'std': (1.0,)}\n"
            "make = Net\n"
        )
        (tmp_path / "prefixed_net.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        state = itf.load_model("prefixed_net:make").state_dict()
        for number, prefix in enumerate(("", "module.", "model.")):
            path = save_state(tmp_path / f"{number}.pt", begun(prefix, state))
            assert same(itf.load_model("prefixed_net:make", path), state), prefix

    def test_shared_tensors_are_not_overlap(self, tmp_path, dense):
        tied = dense | {"bn1.bias": dense["bn1.weight"], "bn1.running_mean": dense["bn1.weight"]}
        torch.save(tied, tmp_path / "w.pt")
        assert same(itf.load_model(MODEL, tmp_path / "w.pt"), tied)


class TestKey:
    CONTENT: dict[str, Callable[[State, State], Any]] = {  # noqa: RUF012
        "ema": lambda w, v: {"model": w, "ema": v},
        "model.state_dict": lambda w, v: {"state_dict": w, "model": {"state_dict": v}},
        "model": lambda w, v: {"state_dict": w, "model": {"state_dict": v}},
        "state_dict.model_ema": lambda w, v: {"state_dict": begun("model.", w) | begun("model_ema.module.", v)},
        "generators.b": lambda w, v: {"state_dict": w, "generators": {"a": w, "b": v}},
    }

    @pytest.mark.parametrize(("key", "make"), CONTENT.items(), ids=CONTENT)
    def test_it_chooses(self, tmp_path, dense, caplog, key, make):
        torch.save(make(dense, other(dense)), tmp_path / "w.pt")
        for model in (
            itf.load_model(MODEL, tmp_path / "w.pt", weights_key=key),
            itf.load_model(MODEL, f"{tmp_path / 'w.pt'}#{key}"),
        ):
            assert same(model, other(dense))
        assert caplog.text == ""

    def test_a_key_that_is_not_there_names_those_that_are(self, tmp_path, dense):
        torch.save({"model": dense, "ema": dense}, tmp_path / "w.pt")
        with pytest.raises(itf.IntrafusionError, match="under 'average'; choose one of model, ema"):
            itf.load_model(MODEL, tmp_path / "w.pt", weights_key="average")
        with pytest.raises(itf.IntrafusionError, match="needs a file"):
            itf.load_model(MODEL, weights_key="ema")

    def test_a_file_of_the_whole_name_goes_first(self, tmp_path, dense):
        path = save_state(tmp_path / "run#2.pt", {"model": dense, "ema": other(dense)})
        assert located(path) == (path, None)
        assert located(f"{path}#ema") == (path, "ema")
        assert same(itf.load_model(MODEL, f"{path}#ema"), other(dense))

    @pytest.mark.parametrize("command", ["groups", "curve", "sweep", "own"])
    def test_commands_take_it(self, tmp_path, capsys, command):
        path = save_state(tmp_path / "w.ckpt", {"model": {"x": torch.ones(2)}, "ema": mlp_state()})
        words = {
            "groups": ["groups"],
            "curve": ["curve", "--sparsity", "0.5", "--merge", "drop", "--limit", "20"],
            "sweep": [
                "sweep",
                "--sparsity",
                "0.5",
                "--merge",
                "drop",
                "--limit",
                "20",
                "--groups",
                "all",
                "--name",
                "s",
            ],
            "own": ["own", "weights", str(path), "--name", "mine"],
        }[command]
        given = [] if command == "own" else ["--weights", str(path)]
        words += ["--model", "digits-mlp", *given, "--weights-key"]
        assert main([*words, "emo"]) == 2
        assert "choose one of model, ema" in capsys.readouterr().err
        assert main([*words, "ema"]) == 0

    def test_a_key_without_a_file_is_one_line(self, capsys):
        assert main(["groups", "--weights-key", "ema"]) == 2
        assert "needs a file" in capsys.readouterr().err


def headed(state: State, classes: int) -> State:
    torch.manual_seed(0)
    return state | {"linear.weight": torch.randn(classes, 64), "linear.bias": torch.randn(classes)}


class TestHeads:
    @pytest.mark.parametrize("classes", [2, 7, 100])
    def test_a_head_of_another_width_opens_with_the_files_classes(self, tmp_path, dense, classes):
        state = headed(dense, classes)
        torch.save({"state_dict": begun("module.", state)}, tmp_path / "w.pt")
        model = itf.load_model(MODEL, tmp_path / "w.pt")
        card = card_of(model)
        assert same(model, state)
        assert model(torch.randn(3, 1, 8, 8)).shape == (3, classes)
        assert (card.classes, card.dataset, card.accuracy) == (classes, f"{classes} classes", None)
        assert f"head has {classes} classes, not 10" in card.details["told"][0]

    def test_it_is_not_measured_on_images_of_other_classes(self, tmp_path, dense):
        torch.save(headed(dense, 100), tmp_path / "w.pt")
        with pytest.raises(itf.IntrafusionError, match=r"needs 100 classes .* trained on"):
            evaluate(itf.load_model(MODEL, tmp_path / "w.pt"), load_data("digits"), limit=10)

    def test_a_card_beside_it_says_what_they_are(self, tmp_path, dense):
        torch.save(headed(dense, 7), tmp_path / "w.pt")
        (tmp_path / "w.json").write_text('{"classes": 7, "dataset": "own", "accuracy": 0.5}')
        card = card_of(itf.load_model(MODEL, tmp_path / "w.pt"))
        assert (card.classes, card.dataset, card.accuracy) == (7, "own", 0.5)

    def test_it_is_pruned_without_images_of_its_classes(self, tmp_path, dense, capsys):
        torch.save(headed(dense, 7), tmp_path / "w.pt")
        words = [
            "--model",
            MODEL,
            "--weights",
            str(tmp_path / "w.pt"),
            "--out",
            str(tmp_path / "out"),
            "--sparsity",
            "0.5",
        ]
        assert main(["prune", *words, "--data", "digits"]) == 2
        assert main(["prune", *words, "--formats", "safetensors"]) == 0
        assert "accuracy was not measured: digits-resnet needs 7 classes" in capsys.readouterr().err
        small = itf.load_model(MODEL, tmp_path / "out" / "model.safetensors")
        assert small(card_of(small).example()).shape == (1, 7)

    def test_it_can_be_kept_and_pruned(self, tmp_path, dense):
        torch.save(headed(dense, 7), tmp_path / "w.pt")
        model = itf.load_model(take_weights(tmp_path / "w.pt", MODEL, "seven"))
        assert same(model, headed(dense, 7))
        assert hub.kept_told("kept/seven") == card_of(model).details["told"]
        assert card_of(model).classes == 7
        small = itf.prune(model, card_of(model).example(), 0.5)
        assert small(card_of(model).example()).shape == (1, 7)

    @pytest.mark.parametrize(
        "name", ["imagenet/squeezenet1_1", "imagenet/mobilenet_v3_small", "cifar100-resnet20", "digits-mlp"]
    )
    def test_heads_of_every_source(self, tmp_path, name):
        model = itf.load_model(name, "random")
        classes, state = card_of(model).classes, model.state_dict()
        cut = {k: v[:5].clone() if v.shape[:1] == (classes,) else v for k, v in state.items()}
        torch.save(cut, tmp_path / "w.pt")
        opened = itf.load_model(name, tmp_path / "w.pt")
        images = torch.randn(2, *card_of(model).input_size)
        with torch.inference_mode():
            torch.testing.assert_close(opened(images), model(images)[:, :5], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("change", [
        lambda w: headed(w, 1),  # no choice between classes
        lambda w: headed(w, 7) | {"linear.bias": torch.zeros(6)},
        lambda w: headed(w, 7) | {"conv1.weight": torch.zeros(16, 3, 3, 3)},
        lambda w: w | {"linear.weight": torch.zeros(7, 65), "linear.bias": torch.zeros(7)},
    ])  # fmt: skip
    def test_what_is_no_other_head_is_misshapen(self, tmp_path, dense, change):
        torch.save(change(dense), tmp_path / "w.pt")
        with pytest.raises(itf.IntrafusionError, match=r"0 missing, 0 unknown, [12345] of the wrong shape"):
            itf.load_model(MODEL, tmp_path / "w.pt")


class TestNearest:
    @pytest.mark.parametrize("name", ["digits-vgg", "cifar10-resnet56", "cifar100-resnet20", "cifar10-conv2"])
    def test_an_architecture_of_ours_is_named(self, tmp_path, name):
        torch.save({"model": begun("module.", itf.load_model(name, "random").state_dict())}, tmp_path / "w.pt")
        with pytest.raises(itf.IntrafusionError, match=f"its keys match {name}$"):
            itf.load_model("digits-mlp", tmp_path / "w.pt")

    @pytest.mark.parametrize("classes", [1000, 10])
    def test_one_of_torchvision_is(self, classes):
        from torchvision.models import squeezenet1_0

        with torch.device("meta"):
            state = begun("module.", squeezenet1_0(num_classes=classes).state_dict())
        assert nearest(state, "digits-mlp") == "; its keys match imagenet/squeezenet1_0"

    def test_one_that_is_near_is_named_as_near(self, dense):
        near = {k: v for k, v in dense.items() if not k.startswith("bn1.")} | {"stem.weight": torch.zeros(3)}
        assert nearest(near, "digits-mlp") == f"; its keys are most similar to {MODEL}"
        assert nearest(near, MODEL) == ""

    def test_a_stranger_is_not(self):
        assert nearest({"encoder.weight": torch.zeros(3), "encoder.bias": torch.zeros(3)}, "digits-mlp") == ""


class Meter:
    """An object of a training script's own."""


REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "an own class beside them": (lambda w: {"model": w, "meter": Meter()}, "would run test_state_dict.Meter.*state_dict"),
    "a function beside them": (lambda w: {"model": w, "f": print}, "would run print"),
    "a whole network": (lambda w: nn.Sequential(nn.Linear(3, 2)), "whole pickled network.*torch.nn.modules"),
    "a whole network in a wrapper": (lambda w: {"model": nn.Linear(3, 2), "epoch": 3}, "whole pickled network"),
    "a network in parallel": (lambda w: nn.DataParallel(nn.Linear(3, 2)), "whole pickled network"),
    "arrays as weights": (lambda w: {"model": {k: v.numpy() for k, v in w.items()}}, "has no state dict.*NumPy arrays"),
    "an array among weights": (lambda w: w | {"linear.bias": w["linear.bias"].numpy()}, "linear.bias is a NumPy array"),
    "a number among weights": (lambda w: w | {"linear.bias": 3.0}, "is a float, not a tensor"),
    "nothing known": (lambda w: {"hyper": {"lr": 1}, "epoch": 3}, "has no state dict .*only hyper, epoch"),
    "NaN, though an average is whole": (
        lambda w: {"model": w | {"linear.bias": torch.full((10,), torch.nan)}, "ema": w}, "NaN or infinite values",
    ),
    "a layer too many": (
        lambda w: begun("module.", w) | {"module.more.weight": torch.zeros(3)}, "unknown key module.more.weight"
    ),
    "a layer missing": (lambda w: {k: v for k, v in begun("net.", w).items() if "conv1" not in k}, r"\(7 missing"),
}  # fmt: skip


INERT: dict[str, Callable[[], Any]] = {  # objects of types that are passed over, with what they would do if they were made
    "a class that is changed": lambda: Built(argparse.Namespace, {}, __class__=dict, __setstate__=3, keys=3),
    "a table that hides its own": lambda: Built(OrderedDict, {"a": 1}, items=3, get=4, values=5, __class__=6),
    "an array of 10^15 numbers": lambda: Call(np.zeros(1).__reduce__()[0], np.ndarray, (10**15,), b"b"),
    "a type of 10^9 bytes": lambda: Call(np.dtype, f"V{10**9}", False, True),
    "a list of 10^15": lambda: Call(deque, (), 10**15),
    "ranges": lambda: [range(10**15), slice(0, 10**15)],
}


class TestInert:
    @pytest.mark.parametrize("make", INERT.values(), ids=INERT)
    def test_nothing_comes_of_what_stands_beside(self, tmp_path, dense, make):
        torch.save({"model": dense, "beside": make()}, tmp_path / "w.pt")
        assert same(itf.load_model(MODEL, tmp_path / "w.pt"), dense)

    def test_a_table_of_weights_cannot_hide_them(self, tmp_path, dense):
        torch.save({"model": Built(OrderedDict, dense, items=3, get=4, values=5, keys=6)}, tmp_path / "w.pt")
        assert same(itf.load_model(MODEL, tmp_path / "w.pt"), dense)


class TestRefused:
    @pytest.mark.parametrize("form", [True, False], ids=["zip", "older format"])
    @pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
    def test_in_one_line_that_names_the_cause(self, tmp_path, dense, make, words, form):
        torch.save(make(dense), tmp_path / "w.pt", _use_new_zipfile_serialization=form)
        with pytest.raises(itf.IntrafusionError, match=words) as caught:
            itf.load_model(MODEL, tmp_path / "w.pt")
        assert str(caught.value).isprintable()

    def test_a_scripted_network(self, tmp_path):
        torch.jit.script(nn.Linear(3, 2)).save(tmp_path / "w.pt")
        with pytest.raises(itf.IntrafusionError, match=r"scripted network; .*torch\.jit\.load"):
            itf.load_model(MODEL, tmp_path / "w.pt")

    def test_suffixes_of_others(self, tmp_path, dense):
        for suffix in (".h5", ".onnx", ".npz", ""):
            path = save_state(tmp_path / "w.pt", dense).rename(tmp_path / f"w{suffix}")
            with pytest.raises(itf.IntrafusionError, match=r"must end in \.safetensors, \.pt"):
                itf.load_model(MODEL, path)
