"""Programs that a stranger with bad intent would write: each is refused in one line, before any number is computed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_files as files
import pytest
import torch
from torch import Tensor, nn

import intrafusion as itf
from intrafusion.models import exported_program as programs
from intrafusion.models.exported_program import built, describe_program, read_program, tensors_of
from intrafusion.runtime.paths import home
from intrafusion.studies.uploads import take_program

Call = tuple[str, dict[str, Any], str]  # an operator, its arguments, and what it gives


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return files.export(files.network(), tmp_path_factory.mktemp("program") / "net.pt2")


def tensor(name: str) -> dict[str, Any]:
    return {"as_tensor": {"name": name}}


def whole_number(number: int) -> dict[str, Any]:
    return {"as_int": number}


def node(call: Call) -> dict[str, Any]:
    target, given, gives = call
    kind = "as_sym_int" if target.startswith("_operator") or target == "sym_size.int" else "as_tensor"
    name = {"as_name": gives} if kind == "as_sym_int" else {"name": gives}
    return {
        "target": target if target.startswith("_operator") else f"torch.ops.aten.{target}", "metadata": {},
        "inputs": [{"name": key, "arg": value, "kind": 1} for key, value in given.items()], "outputs": [{kind: name}],
        "is_hop_single_tensor_return": None,
    }  # fmt: skip


def with_calls(*calls: Call) -> Callable[[dict[str, Any]], None]:
    """A change of a graph: more calls after its own, the last of which gives the logits, if it gives a tensor."""

    def change(about: dict[str, Any]) -> None:
        module = about["graph_module"]
        module["graph"]["nodes"] += map(node, calls)
        if not calls[-1][0].startswith("_operator"):
            module["signature"]["output_specs"][0]["user_output"]["arg"]["as_tensor"]["name"] = calls[-1][2]

    return change


def views(count: int) -> list[Call]:
    """So many values alive at once, each of 2^21 numbers an image, of which the last sums up."""
    large = [("expand.default", {"self": tensor("col"), "size": {"as_ints": [-1, 1 << 21]}}, "wide")]
    made = [("relu.default", {"self": tensor("wide")}, f"r{number}") for number in range(count)]
    joined = (
        "cat.default",
        {"tensors": {"as_tensors": [{"name": one[2]} for one in made]}, "dim": whole_number(1)},
        "all",
    )
    return [
        ("select.int", {"self": tensor("linear"), "dim": whole_number(1), "index": whole_number(0)}, "first"),
        ("unsqueeze.default", {"self": tensor("first"), "dim": whole_number(1)}, "col"), *large, *made, joined,
        ("amax.default", {"self": tensor("all"), "dim": {"as_ints": [1]}, "keepdim": {"as_bool": True}}, "made"),
    ]  # fmt: skip


def wide(side: int) -> list[Call]:
    """A square of so many numbers a side, of each image."""
    column = [one for one in views(0) if one[2] in ("first", "col")]
    sizes = {"as_ints": [-1, side, side]}
    return [
        *column, ("unsqueeze.default", {"self": tensor("col"), "dim": whole_number(2)}, "cube"),
        ("expand.default", {"self": tensor("cube"), "size": sizes}, "square"),
    ]  # fmt: skip


def last(name: str) -> list[Call]:
    """From a square to logits."""
    return [("amax.default", {"self": tensor(name), "dim": {"as_ints": [1]}, "keepdim": {"as_bool": False}}, "made")]


def squares(count: int) -> list[Call]:
    """A size that is squared again and again."""
    start = ("sym_size.int", {"self": tensor("linear"), "dim": whole_number(1)}, "n0")
    given = [{"a": {"as_sym_int": {"as_name": f"n{i}"}}, "b": {"as_sym_int": {"as_name": f"n{i}"}}} for i in range(count)]
    return [start, *(("_operator.mul", given[i], f"n{i + 1}") for i in range(count))]


def _products() -> list[Call]:
    made = [("matmul.default", {"self": tensor("square"), "other": tensor("square")}, "p0")]
    made += [("matmul.default", {"self": tensor(f"p{i}"), "other": tensor("square")}, f"p{i + 1}") for i in range(25)]
    return [*wide(2500), *made, *last("p25")]


def _slow() -> list[Call]:
    chain = [("exp.default", {"self": tensor(f"e{i}" if i else "square")}, f"e{i + 1}") for i in range(700)]
    return [*wide(2500), *chain, *last("e700")]


STATS = {one: {"as_tensor": {"name": "NORM"}} for one in ("running_mean", "running_var")}
HALF = {"as_float": 0.1}
CASES: dict[str, tuple[list[Call], str]] = {
    "raw batch norm that reads past a bias": (
        [("_native_batch_norm_legit_no_training.default", {
            "input": tensor("relu"), "weight": {"as_none": True}, "bias": tensor("linear"), "running_mean": tensor("relu"),
            "running_var": tensor("relu"), "momentum": HALF, "eps": HALF,
        }, "made")], "not all stored in the file",
    ),
    "raw batch norm in training": (
        [("native_batch_norm.default", {"input": tensor("relu"), "training": {"as_bool": True}}, "made")], "is not supported",
    ),
    "batch norm in training": (
        [("batch_norm.default", {
            "input": tensor("relu"), "weight": {"as_none": True}, "bias": {"as_none": True}, "running_mean": {"as_none": True},
            "running_var": {"as_none": True}, "training": {"as_bool": True}, "momentum": HALF, "eps": HALF,
            "cudnn_enabled": {"as_bool": False},
        }, "made")], "model.eval()",
    ),
    "instance norm that changes buffers": (
        [("instance_norm.default", {
            "input": tensor("conv2d"), "weight": {"as_none": True}, "bias": {"as_none": True}, **STATS,
            "use_input_stats": {"as_bool": True}, "momentum": HALF, "eps": HALF, "cudnn_enabled": {"as_bool": False},
        }, "made")], "running statistics",
    ),
    "integer division": (
        [("div.Tensor_mode", {
            "self": tensor("linear"), "other": tensor("linear"), "rounding_mode": {"as_string": "trunc"},
        }, "made")], "is not supported",
    ),
    "floor division of tensors": (
        [("floor_divide.default", {"self": tensor("linear"), "other": tensor("linear")}, "made")], "is not supported",
    ),
    "a number without end": (squares(60), r"beyond 2\^40"),
    "a division by zero": ([("_operator.mod", {"a": whole_number(5), "b": whole_number(0)}, "n")], "divides 5 by 0"),
    "a modulo of the batch": (
        [("sym_size.int", {"self": tensor("linear"), "dim": whole_number(0)}, "n"),
         ("_operator.mod", {"a": {"as_sym_int": {"as_name": "n"}}, "b": whole_number(7)}, "m")], "divides batch by 7",
    ),
    "a string of two billion characters": (
        [("_operator.mod", {"a": {"as_string": "%2000000000d"}, "b": whole_number(1)}, "n")], "instead of an integer",
    ),
    "a word that is no choice": (
        [("gelu.default", {"self": tensor("linear"), "approximate": {"as_string": "x" * 30}}, "made")],
        "form of gelu must not be",
    ),
    "many values at once": (views(64), "MiB of memory"),
    "products of matrices": (_products(), "multiply-accumulates"),
    "slow steps": (_slow(), "reads and writes more than"),
    "many steps": ([("add_.Scalar", {"self": tensor("linear"), "other": whole_number(1)},
        f"a{i}") for i in range(9000)], "steps"),
    "many steps of few": (
        [("repeat.default", {"self": tensor("relu"), "repeats": {"as_ints": [1, 1, 1, 50]}}, "s0"),
         *(("slice.Tensor", {"self": tensor(f"s{i}"), "dim": whole_number(3), "start": whole_number(1),
            "end": whole_number(400 - i), "step": whole_number(1)}, f"s{i + 1}") for i in range(300)),
         *(("add_.Scalar", {"self": tensor(f"s{300 + i}"), "other": whole_number(1)}, f"s{301 + i}") for i in range(40))],
        "has more than 8,000 steps",
    ),
    "a view of the wrong type": (
        [("view.dtype", {"self": tensor("linear"), "dtype": {"as_scalar_type": 1}}, "made")], "is not supported",
    ),
    "memory by its strides": (
        [("as_strided.default", {
            "self": tensor("linear"), "size": {"as_ints": [9]}, "stride": {"as_ints": [1]},
        }, "made")], "is not supported",
    ),
    "indices that the images choose": (
        [("index_select.default", {"self": tensor("linear"), "dim": whole_number(1), "index": tensor("linear")}, "made")],
        "integers stored in the file",
    ),
    "a batch that is squared": (
        [("sym_size.int", {"self": tensor("linear"), "dim": whole_number(0)}, "n"),
         ("_operator.mul", {"a": {"as_sym_int": {"as_name": "n"}}, "b": {"as_sym_int": {"as_name": "n"}}}, "m")],
        "multiplies the number of images by itself",
    ),
    "work on weights in place": (
        [("relu_.default", {"self": tensor("WEIGHT")}, "made")], "changes its own weights in place",
    ),
}  # fmt: skip


def _named(about: dict[str, Any]) -> None:
    """Put names of the file for WEIGHT and NORM."""
    specs = about["graph_module"]["signature"]["input_specs"]
    names = {kind: told["arg"]["name"] for spec in specs for kind, told in spec.items() if kind in ("parameter", "buffer")}
    text = json.dumps(about).replace('"WEIGHT"', f'"{names["parameter"]}"').replace('"NORM"', f'"{names["buffer"]}"')
    about.clear()
    about.update(json.loads(text))


@pytest.mark.parametrize("kind", CASES)
def test_a_hostile_program_is_one_line_and_nothing_is_computed(tmp_path, whole, monkeypatch, kind):
    calls, expected = CASES[kind]

    def change(about: dict[str, Any]) -> None:
        with_calls(*calls)(about)
        _named(about)

    path = files.with_graph(whole, tmp_path / "p.pt2", change)
    monkeypatch.setattr(programs.Program, "forward", lambda *_: pytest.fail("it was run"))
    with pytest.raises(itf.IntrafusionError, match=expected) as caught:
        read_program(path)
    assert str(caught.value).isprintable()


def test_names_of_one_file_count_each(tmp_path, whole):
    def repeat(found: dict[str, bytes]) -> None:
        listed = next(name for name in found if name.endswith("model_weights_config.json"))
        about = json.loads(found[listed])
        first = next(iter(about["config"].values()))
        found[listed.replace("model_weights_config.json", first["path_name"])] = bytes(4 << 20)
        first["tensor_meta"] |= {"sizes": [{"as_int": 1 << 20}], "strides": [{"as_int": 1}]}
        about["config"] |= {f"again{number}": first for number in range(300)}
        found[listed] = json.dumps(about).encode()

    with pytest.raises(itf.IntrafusionError, match="larger than 512 MiB"):
        read_program(files.rewritten(whole, tmp_path / "p.pt2", repeat))


@pytest.mark.parametrize(("change", "expected"), [
    (lambda about: about["tensor_meta"].update(sizes=[{"as_int": 1}] * 100_000, strides=[{"as_int": 1}] * 100_000),
        "dimensions"),
    (lambda about: about["tensor_meta"].update(dtype=8), "export the network in float32"),
])  # fmt: skip
def test_tensors_that_are_none_are_one_line(tmp_path, whole, change, expected):
    path = files.with_weights(whole, tmp_path / "p.pt2", lambda about: change(next(iter(about.values()))))
    with pytest.raises(itf.IntrafusionError, match=expected):
        read_program(path)


# -- programs as data


@pytest.fixture
def program(whole):
    return read_program(whole)[0]


def test_a_program_is_what_its_description_says(program):
    again = built(json.loads(json.dumps(describe_program(program))), tensors_of(program))
    images = torch.randn(5, 1, 8, 8)
    assert torch.equal(again(images), program(images))
    assert again.extra_repr() == program.extra_repr()
    assert set(again.state_dict()) == set(program.state_dict())


def _drop(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda about: about.pop(key)


def _at(about: dict[str, Any], name: str) -> list[Any]:
    return next(step for step in about["steps"] if step[0] == name)


@pytest.mark.parametrize("change", [
    *map(_drop, ("format", "image", "given", "answer", "layers", "learned", "steps")), lambda about: about.update(format=2),
    lambda about: about.update(image=[1, 8]), lambda about: about.update(image=[1, 8, 2**50]),
    lambda about: about.update(answer="nothing"), lambda about: about.update(answer=["x"]),
    lambda about: about["steps"].append(7),
    lambda about: about["steps"].insert(0, about["steps"][0]), lambda about: about.update(steps=about["steps"] * 5000),
    lambda about: about["layers"]["0"].update(groups=0), lambda about: about["layers"]["0"].update(stride=[1.5, 1]),
    lambda about: about["layers"]["0"].update(kernel_size=[2**30, 2**30]),
    lambda about: about["layers"]["0"].update(kind="LSTM"),
    lambda about: about["layers"]["1"].update(num_features=3), lambda about: about["layers"]["1"].update(eps=float("nan")),
    lambda about: about["layers"].update({"0": None}), lambda about: about["layers"].pop("8"),
    lambda about: _at(about, "flatten")[1].append(1), lambda about: _at(about, "flatten")[1].clear(),
    lambda about: _at(about, "relu")[1].__setitem__(0, {"weight": "../0"}),
    lambda about: _at(about, "relu")[1].__setitem__(0, {"code": "x"}),
    lambda about: _at(about, "relu")[1].__setitem__(0, {"value": []}),
    lambda about: _at(about, "relu").__setitem__(0, "os.system"),
    lambda about: _at(about, "relu").__setitem__(0, {"layer": "steps"}), lambda about: _at(about, "relu")[2].append("y"),
])  # fmt: skip
def test_a_description_that_makes_no_sense_is_one_line(program, change):
    about = json.loads(json.dumps(describe_program(program)))
    change(about)
    with pytest.raises(itf.IntrafusionError) as caught:
        built(about, tensors_of(program))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("change", [
    lambda tensors: tensors.pop("0.weight"), lambda tensors: tensors.update({"0.weight": torch.zeros(4, 1, 3)}),
    lambda tensors: tensors.update({"1.running_mean": torch.zeros(3)}),
        lambda tensors: tensors.update({"1.bias": torch.zeros(4, 1)}),
    lambda tensors: tensors.update({"8.weight": tensors["8.weight"].double()}),
])  # fmt: skip
def test_tensors_of_another_program_are_one_line(program, change):
    tensors = tensors_of(program)
    change(tensors)
    with pytest.raises(itf.IntrafusionError, match="must be float32 of shape"):
        built(describe_program(program), tensors)


def test_what_is_kept_is_data(whole):
    name = take_program(whole, "mine")
    assert [file.name for file in (home() / "models").iterdir()] == ["mine.safetensors"]
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(itf.load_model(name)(images), read_program(whole)[0](images))


def test_what_an_older_version_kept_still_opens(whole):
    take_program(whole, "mine")
    card = itf.load_model("kept/mine").card
    folder: Path = home() / "models"
    (folder / "old.pt2").write_bytes(whole.read_bytes())
    (folder / "old.json").write_text(json.dumps(card.to_dict()))
    assert itf.load_model("kept/old").card.classes == 3


class _InPlace(nn.Module):
    """Work in place that other names of the same tensor see, and a table that is read by constant indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(5, 3))
        self.register_buffer("places", torch.tensor([[4, 0], [2, 2]]))

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        z = y.relu_()
        z += 1
        y *= 2
        y[:, 1:, 2:4] = 3
        z[:, :2].mul_(0.5)
        return (y + z).mean((2, 3)) + self.table[self.places.view(-1)].sum(0)


def test_work_in_place_is_seen_under_every_name(tmp_path):
    model = _InPlace().eval()
    program, _, _ = read_program(files.export(model, tmp_path / "p.pt2", (3, 4, 4)))
    images = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(program(images), model(images))


class _Stale(nn.Module):
    """A view, what it shows changed in place, and the view read again."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.scale = kind, nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        part = y[:, 1:]
        if self.kind == "base":
            y += 1
        if self.kind == "neighbour":
            y[:, :2] += 1
        if self.kind == "view":
            y.flatten(1).add_(1)
        return part.sum((2, 3))[:, :1] + y.mean((2, 3)) * self.scale


@pytest.mark.parametrize("kind", ["base", "neighbour", "view"])
def test_views_of_what_changes_in_place_are_refused(tmp_path, kind):
    path = files.export(_Stale(kind).eval(), tmp_path / "p.pt2", (3, 4, 4))
    with pytest.raises(itf.IntrafusionError, match="in place"):
        read_program(path)


def test_weights_cannot_change_indices(tmp_path):
    program, _, _ = read_program(files.export(_InPlace().eval(), tmp_path / "p.pt2", (3, 4, 4)))
    state = program.state_dict()
    program.load_state_dict(state)
    with pytest.raises(itf.IntrafusionError, match="holds indices"):
        program.load_state_dict(state | {"places": state["places"] + 100})


def test_a_network_that_takes_minutes_is_refused_before_it_runs():
    """A hundred convolutions of 64 channels on 256 x 256 pixels."""
    numbers = {"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "whole": False}
    layers, tensors = {}, {}
    for name in range(100):
        inputs = 64 if name else 1
        layers[f"c{name}"] = {"kind": "Conv2d", "in_channels": inputs, "out_channels": 64, **numbers}
        tensors[f"c{name}.weight"] = torch.zeros(64, inputs, 3, 3)
    steps: list[Any] = [[{"layer": f"c{name}"}, [{"value": f"v{name}"}], [f"v{name + 1}"]] for name in range(100)]
    steps.append(["mean", [{"value": "v100"}, [2, 3], False], ["logits"]])
    description = {
        "format": 1, "image": [1, 256, 256], "given": "v0", "answer": "logits", "layers": layers, "learned": {}, "steps": steps,
    }  # fmt: skip
    with pytest.raises(itf.IntrafusionError, match="multiply-accumulates per image"):
        built(description, tensors)
    description |= {"steps": [*steps[:20], ["mean", [{"value": "v20"}, [2, 3], False], ["logits"]]]}
    assert built(description, tensors).plan.classes == 64
