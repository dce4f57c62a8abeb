"""Broken and hostile files: each gets its one line, runs nothing, and leaves nothing behind."""

import contextlib
import functools
import json
import os
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import own_files as files
import pytest
import torch
from hostile_data import MORE_DATA, TAKEN
from hostile_weights import MORE_WEIGHTS
from own_files import Touch

import intrafusion as itf
from intrafusion.data import upload
from intrafusion.data.arrays import Reading
from intrafusion.runtime import safe_zip
from intrafusion.runtime.paths import home
from intrafusion.runtime.staging import free_path, remove
from intrafusion.studies.uploads import take_data, take_program, take_weights


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """A whole program, to break."""
    return files.export(files.network(), tmp_path_factory.mktemp("program") / "net.pt2")


def weights(folder: Path, sentinel: Path, program: Path, kind: str) -> Path:
    state: dict[str, Any] = files.mlp_state()
    first = next(name for name in state if name.endswith("weight"))
    if kind == "nan":
        state[first] = state[first] * float("nan")
    if kind == "infinite":
        state[first][0, 0] = float("inf")
    if kind == "lacking":
        state.pop(first)
    if kind == "extra":
        state["more.weight"] = torch.zeros(3)
    if kind == "misshapen":
        state[first] = state[first][:, :5].contiguous()
    if kind == "code":
        state[first] = Touch(sentinel)
    if kind == "vast":
        state[first] = torch.zeros(1).expand(10**11)
    if kind == "sparse":
        state[first] = state[first].to_sparse()
    if kind == "meta":
        state[first] = torch.empty(10**13, device="meta")
    if kind == "list":
        return files.save_state(folder / "w.pt", [1, 2])
    if kind == "raw pickle":
        return files.pickled(folder / "w.pth", sentinel)
    if kind == "bomb":
        return files.bomb(folder / "w.pt", "archive/data.pkl")
    if kind in ("text", "empty", "header"):
        content = {"text": b"no weights", "empty": b"", "header": (10**15).to_bytes(8, "little") + b"{}"}[kind]
        (folder / "w.safetensors").write_bytes(content)
        return folder / "w.safetensors"
    if kind == "half":
        whole = files.save_state(folder / "w.safetensors", state)
        whole.write_bytes(whole.read_bytes()[:-100])
        return whole
    return files.save_state(folder / ("w.pt" if kind in ("code", "vast", "sparse", "meta") else "w.safetensors"), state)


WEIGHTS = {
    "nan": "NaN or infinite values",
    "infinite": "NaN or infinite values",
    "lacking": "does not fit digits-mlp: it has no",
    "extra": "unknown key more.weight",
    "misshapen": "not (128, 64)",
    "code": "cannot load",
    "raw pickle": "cannot load",
    "vast": "not a plain CPU tensor",
    "sparse": "not a plain CPU tensor",
    "meta": "not a plain CPU tensor",
    "list": "has no state dict",
    "bomb": "the limit is 200 times",
    "text": "cannot read weights",
    "empty": "is empty",
    "header": "cannot read weights",
    "half": "cannot read weights",
}


def graph(change: Any) -> Any:
    return lambda folder, sentinel, program: files.with_graph(program, folder / "p.pt2", lambda about: change(about, sentinel))


def listed(change: Any) -> Any:
    return lambda folder, sentinel, program: files.with_weights(
        program, folder / "p.pt2", lambda about: change(about, sentinel)
    )


def inside(change: Any) -> Any:
    return lambda folder, sentinel, program: files.rewritten(program, folder / "p.pt2", lambda found: change(found, sentinel))


def _nodes(about: dict[str, Any]) -> list[dict[str, Any]]:
    return about["graph_module"]["graph"]["nodes"]


def _call(about: dict[str, Any], target: str) -> None:
    _nodes(about)[0]["target"] = target


def _argument(about: dict[str, Any], **meaning: Any) -> None:
    _nodes(about)[0]["inputs"][0]["arg"] = meaning


def _graph_text(text: bytes) -> Any:
    return inside(lambda found, sentinel: found.update({n: text for n in found if n.endswith("model.json")}))


def _without_labels(folder: Path, sentinel: Path, program: Path) -> Path:
    return files.rewritten(files.npz(folder / "x.npz"), folder / "d.npz", lambda found: found.pop("labels.npy"))


def _expression(about: dict[str, Any], sentinel: Path) -> None:
    """What torch.export.load would hand to sympy, which evaluates it."""
    evil = f"__import__('os').mkdir({str(sentinel)!r})"
    text = json.dumps(about).replace("Symbol('", f"[{evil}, Symbol('x')][1] + Symbol('".replace('"', '\\"'))
    about.clear()
    about.update(json.loads(text))


def _pickled_weight(found: dict[str, bytes], sentinel: Path) -> None:
    root = next(iter(found)).partition("/")[0]
    name = f"{root}/data/weights/model_weights_config.json"
    about = json.loads(found[name])
    next(iter(about["config"].values()))["use_pickle"] = True
    found[name] = json.dumps(about).encode()
    found[f"{root}/data/weights/weight_0"] = pickle.dumps(Touch(sentinel))


def _object(found: dict[str, bytes], sentinel: Path) -> None:
    root = next(iter(found)).partition("/")[0]
    constants = {"config": {"x": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}
    found[f"{root}/data/constants/model_constants_config.json"] = json.dumps(constants).encode()
    found[f"{root}/data/constants/opaque_obj_0"] = pickle.dumps(Touch(sentinel))


def _custom(found: dict[str, bytes], sentinel: Path) -> None:
    _object(found, sentinel)
    root = next(iter(found)).partition("/")[0]
    found[f"{root}/data/constants/tensor_0"] = found.pop(f"{root}/data/constants/opaque_obj_0")
    config = f"{root}/data/constants/model_constants_config.json"
    found[config] = found[config].replace(b"opaque_obj_0", b"tensor_0")


def _add(name: str) -> Any:
    return inside(lambda found, sentinel: found.update({f"{next(iter(found)).partition('/')[0]}/{name}": b"x"}))


def _weight(about: dict[str, Any], **changes: Any) -> None:
    next(iter(about.values()))["tensor_meta"].update(changes)


def _rename(about: dict[str, Any], name: str) -> None:
    first = next(iter(about))
    about[name] = about.pop(first)


def _nan(found: dict[str, bytes], sentinel: Path) -> None:
    name = next(name for name in found if name.endswith("weights/weight_0"))
    found[name] = b"\xff" * len(found[name])


def _repeat(about: dict[str, Any], times: int) -> None:
    """Make an image so many times as high and as wide."""
    node = _nodes(about)[2]
    node["target"] = "torch.ops.aten.repeat.default"
    node["inputs"] = [node["inputs"][0], {"name": "repeats", "arg": {"as_ints": [1, 1, times, times]}, "kind": 1}]


def _training(folder: Path, sentinel: Path, program: Path) -> Path:
    return files.export(files.network().train(), folder / "p.pt2")


def _fixed(folder: Path, sentinel: Path, program: Path) -> Path:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.reshape(1, 2, 64)[0])

    return files.export(Fixed(), folder / "p.pt2", dynamic=False)


def _whole(name: str, content: bytes) -> Any:
    def write(folder: Path, sentinel: Path, program: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _half(folder: Path, sentinel: Path, program: Path) -> Path:
    (folder / "p.pt2").write_bytes(program.read_bytes()[: program.stat().st_size // 2])
    return folder / "p.pt2"


_LOAD, _DUNDER = "torch.ops.aten.from_file.default", "torch.ops.aten.__class__.__init__"
PROGRAMS: dict[str, tuple[Any, str]] = {
    "a weight that is a pickle": (inside(_pickled_weight), "could run code"),
    "an object that is a pickle": (inside(_object), "which torch.export.save does not write"),
    "a custom object as a tensor": (inside(_custom), "could run code"),
    "compiled code": (_add("data/aotinductor/model/x.so"), "compiled code"),
    "a file of another kind": (_add("run.py"), "which torch.export.save does not write"),
    "two roots": (inside(lambda found, s: found.update({"other/version": b"1"})), "has no models/model.json"),
    "a path out of it": (inside(lambda found, s: found.update({"p/../../evil": b"x"})), "outside its folder"),
    "a bomb": (lambda folder, s, p: files.bomb(folder / "p.pt2", "p/models/model.json"), "limit is 200 times"),
    "an operator that reads files": (graph(lambda about, s: _call(about, _LOAD)), "is not supported"),
    "a Python function": (graph(lambda about, s: _call(about, "os.system")), "is not supported"),
    "a builtin by way of torch": (graph(lambda about, s: _call(about, _DUNDER)), "is not supported"),
    "another library's operator": (graph(lambda about, s: _call(about, "torch.ops.mylib.run.default")), "is not supported"),
    "a loop": (graph(lambda about, s: _call(about, "torch.ops.higher_order.while_loop")), "is not supported"),
    "an operator of no overload": (graph(lambda about, s: _call(about, "torch.ops.aten.relu.nothing")), "is not supported"),
    "an output argument": (graph(lambda about, s: _call(about, "torch.ops.aten.conv2d.out")), "is not supported"),
    "an argument of code": (
        graph(lambda about, s: _argument(about, as_operator="os.system")), "argument of kind",
    ),
    "a value from nowhere": (
        graph(lambda about, s: _argument(about, as_tensor={"name": "z"})), "before it is defined",
    ),
    "a step that makes too much": (graph(lambda about, s: _repeat(about, 10**3)), "more than"),
    "a step that makes far too much": (graph(lambda about, s: _repeat(about, 10**5)), "beyond 2^40"),
    "no graph": (graph(lambda about, s: about.pop("graph_module")), "in its description"),
    "a list for a graph": (graph(lambda about, s: about.update(graph_module=[])), "in its description"),
    "another format": (graph(lambda about, s: about["schema_version"].update(major=99)), "has format 99"),
    "no JSON": (_graph_text(b"{"), "is not JSON"),
    "deep JSON": (_graph_text(b"[" * 10**5), "is not JSON"),
    "NaN weights": (inside(_nan), "NaN or infinite"),
    "a weight past its bytes": (listed(lambda about, s: _weight(about, storage_offset={"as_int": 7})), "extends past"),
    "a weight of vast shape": (listed(lambda about, s: _weight(about, sizes=[{"as_int": 10**11}] * 4)), "larger than 512 MiB"),
    "a negative shape": (listed(lambda about, s: _weight(about, sizes=[{"as_int": -1}] * 4)), "invalid shape"),
    "half precision": (listed(lambda about, s: _weight(about, dtype=6)), "export the network in float32"),
    "a weight named as code": (listed(lambda about, s: _rename(about, "x');import os#")), "letters, digits, _, - and dots"),
    "a weight that is not there": (listed(lambda about, s: about.pop(next(iter(about)))), "it has no weights"),
    "a network in training": (_training, "model.eval()"),
    "a batch of one size": (_fixed, "export it with dynamic_shapes"),
    "half a file": (_half, "not a readable archive"),
    "text": (_whole("p.pt2", b"no program"), "not a readable archive"),
    "a scripted module": (
        lambda folder, s, p: Path(torch.jit.script(files.network()).save(folder / "p.pt2") or folder / "p.pt2"),
        "has no models/model.json",
    ),
}  # fmt: skip


def pack(contents: Any) -> Any:
    return lambda folder, sentinel, program: files.pictures(
        folder / "d.zip", contents(sentinel) if callable(contents) else contents
    )


def two_lists(of_class: str) -> dict[str, bytes]:
    """Two splits, each with a list of labels: the class of the second alone is odd."""
    lists = {"train": "cat", "test": of_class}
    return {f"{split}/a.png": files.picture() for split in lists} | {
        f"{split}/labels.csv": f'a.png,"{name}"\n'.encode() for split, name in lists.items()
    }


def arrays(**changes: Any) -> Any:
    return lambda folder, sentinel, program: files.npz(folder / "d.npz", **changes)


def _objects(folder: Path, sentinel: Path, program: Path) -> Path:
    return files.npz(folder / "d.npz", labels=np.array([Touch(sentinel)] * 6, dtype=object))


def _encrypted(folder: Path, sentinel: Path, program: Path) -> Path:
    path = files.pictures(folder / "d.zip")
    raw = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = raw.find(mark)
        while start >= 0:
            raw[start + place] |= 1
            start = raw.find(mark, start + 4)
    path.write_bytes(raw)
    return path


DATA: dict[str, tuple[Any, str]] = {
    "a path out of the zip": (pack({"../evil.png": files.picture()}), "outside its folder"),
    "an absolute path": (pack({"/tmp/evil/x.png": files.picture()}), "outside its folder"),
    "a drive": (pack({"C:/x.png": files.picture()}), "outside its folder"),
    "a backslash": (pack({"..\\evil\\x.png": files.picture()}), "outside its folder"),
    "a link": (lambda folder, s, p: files.link(folder / "d.zip"), "a link or device"),
    "a bomb of pictures": (lambda folder, s, p: files.bomb(folder / "d.zip"), "limit is 200 times"),
    "a bomb of numbers": (lambda folder, s, p: files.bomb(folder / "d.npz", "images.npy"), "limit is 200 times"),
    "a password": (_encrypted, "without a password"),
    "a picture of 1.6 billion pixels": (pack({"cat/x.png": files.wide_picture()}), "not a readable image"),
    "PostScript": (pack(lambda s: {"cat/x.png": files.postscript(s)}), "not a readable image"),
    "half a picture": (pack({"cat/x.png": files.picture(size=(99, 99))[:-40]}), "not a readable image"),
    "a program among pictures": (pack({"cat/x.png": files.picture(), "cat/run.py": b"1"}), "which is not an image"),
    "no class folders": (pack({"x.png": files.picture()}), "no class folders"),
    "folders too deep": (pack({"a/" * 99 + "x.png": files.picture(), "d/x.png": files.picture()}), "nested more than"),
    "folders of a deep name": (pack({"a/" * 30_000 + "x.png": files.picture()}), "more than 64 folders"),
    "a list of labels that are paths": (
        pack({"x.png": files.picture(), "labels.csv": b"x.png,../../evil\n"}), "has a class folder with an invalid name",
    ),
    **{
        f"a class of the second split that is a path, {kind}": (
            pack(lambda sentinel, of_class=of_class: two_lists(of_class(sentinel))), "has a class folder with an invalid name",
        )
        for kind, of_class in {
            "absolute": lambda sentinel: "/tmp/evil",
            "out of the home": lambda sentinel: "../../../../evil",
            "of other images": lambda sentinel: "../../../images/victim/test/dog",
            "of Windows": lambda sentinel: "..\\evil",
            "of nothing": lambda sentinel: "a\0b",
            "of its own folder": lambda sentinel: ".",
        }.items()
    },
    "a class that is a folder around classes": (
        pack({"x.png": files.picture(), "labels.csv": b"x.png,images\n"}), "cannot be folder names; rename images",
    ),
    "a list of labels that is no text": (pack({"x.png": files.picture(), "labels.csv": b"\xff\xfe"}), "not a list of labels"),
    "a list of labels that is deep": (pack({"x.png": files.picture(), "labels.json": b"[" * 10**5}), "is not JSON"),
    "pickled batches": (
        pack(lambda s: {f"cifar-10-batches-py/{n}": pickle.dumps(Touch(s)) for n in ("test_batch", "batches.meta")}),
        "which is not an image",
    ),
    "nothing": (pack({}), "has no images"),
    "training images alone": (pack({"train/cat/x.png": files.picture()}), "no test images"),
    "a zip that is none": (_whole("d.zip", b"PK nothing"), "not a readable archive"),
    "labels with code": (_objects, "a pickle"),
    "a header of a million million images": (lambda folder, s, p: files.huge_header(folder / "d.npz"), "not match its shape"),
    "images of an unknown range": (arrays(images=files.PIXELS / 99), "images must be uint8"),
    "rows that are no pictures": (arrays(images=files.PIXELS[:, 0, :5, 0]), "images must be uint8"),
    "rows without end": (arrays(images=np.zeros((6, 2**20 + 1), np.uint8)), "at most 1024 pixels"),
    "images too large": (arrays(images=np.zeros((6, 2000, 1, 1), np.uint8)), "at most 1024 pixels"),
    "more labels than images": (arrays(labels=np.arange(7)), "labels must be integers"),
    "a negative label": (arrays(labels=files.LABELS - 1), "labels range from -1"),
    "labels of no class": (arrays(classes=np.array(["a", "b"])), "has 2 classes"),
    "classes that are numbers": (arrays(classes=np.arange(3)), "classes must be"),
    "another array": (arrays(more=np.zeros(3)), "'more.npy'"),
    "no labels": (_without_labels, "has no labels"),
    "no images": (arrays(images=files.PIXELS[:0], labels=files.LABELS[:0]), "no images"),
    "text": (_whole("d.npz", b"no images"), "not a readable archive"),
    "another suffix": (_whole("d.tar", b"no images"), "give one .npz"),
}  # fmt: skip


def _apart(make: Any) -> Any:
    """Without the program, which it does not need."""
    return lambda folder, sentinel, program: make(folder, sentinel)


def refused(tmp_path: Path, path: Path, call: Any, expected: str) -> None:
    """The call fails in one line without the place of the file; it ran nothing, and left nothing in home()."""
    before = sorted(str(file) for file in home().rglob("*"))
    with pytest.raises(itf.IntrafusionError) as caught:
        call()
    said = str(caught.value)
    assert expected in said
    assert said.isprintable()
    assert str(tmp_path) not in said
    assert str(home()) not in said
    assert len(said) < 500
    assert "object at 0x" not in said
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not (tmp_path / "sentinel").exists()
    assert sorted(str(file) for file in home().rglob("*")) == before
    assert not (tmp_path / "evil").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "files"


FILES: dict[str, tuple[Any, Any, str]] = {  # make(folder, sentinel, program) -> file; who takes it; what it says of it
    **{f"weights: {kind}": (functools.partial(weights, kind=kind), "weights", said) for kind, said in WEIGHTS.items()},
    **{f"weights: {kind}": (_apart(make), "weights", said) for kind, (make, said) in MORE_WEIGHTS.items()},
    **{f"program: {kind}": (make, "program", said) for kind, (make, said) in PROGRAMS.items()},
    **{f"images: {kind}": (make, "images", said) for kind, (make, said) in DATA.items()},
    **{f"images: {kind}": (_apart(make), "images", said) for kind, (make, said) in MORE_DATA.items()},
}
TAKE: dict[str, Any] = {
    "weights": lambda path: take_weights(path, "digits-mlp", "mine"), "program": lambda path: take_program(path, "mine"),
    "images": lambda path: take_data([path], "mine"),
}  # fmt: skip


def test_no_kind_is_in_the_table_twice():
    assert len(FILES) == sum(map(len, (WEIGHTS, MORE_WEIGHTS, PROGRAMS, DATA, MORE_DATA))) > 40


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", FILES)
def test_a_hostile_file_is_one_line(tmp_path, folder, program, kind):
    make, who, expected = FILES[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of those who make it
        path = make(folder, tmp_path / "sentinel", program)
    refused(tmp_path, path, lambda: TAKE[who](path), expected)


def test_a_picture_is_checked_before_it_is_written(tmp_path, folder):
    path = files.pictures(folder / "d.zip", {"cat/x.png": b"#!/bin/sh", "dog/y.png": files.picture()})
    with pytest.raises(itf.IntrafusionError, match="not a readable image"):
        upload.read(tmp_path / "made", [path], lambda *step: None, Reading())
    assert [*(tmp_path / "made").rglob("*")] == []


def test_an_expression_is_not_even_looked_at(tmp_path, folder, program):
    path = graph(_expression)(folder, tmp_path / "sentinel", program)
    assert b"__import__" in path.read_bytes()
    assert take_program(path, "mine") == "kept/mine"
    assert itf.load_model("kept/mine")(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    assert not (tmp_path / "sentinel").exists()


def test_the_same_expression_would_run(tmp_path, folder, program):
    """The gadget works: PyTorch's own loader runs it, which is why that is not used."""
    path = graph(_expression)(folder, tmp_path / "sentinel", program)
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("name", ["", "../evil", "a/b", ".hidden", "x" * 65, "a b", "kept/x"])
def test_bad_names(tmp_path, folder, program, name):
    state = files.save_state(folder / "w.safetensors", files.mlp_state())
    images = files.npz(folder / "d.npz")
    for path, call in (
        (state, lambda: take_weights(state, "digits-mlp", name)), (program, lambda: take_program(program, name)),
        (upload, lambda: take_data([images], name)),
    ):  # fmt: skip
        refused(tmp_path, path, call, "invalid name")


@pytest.mark.parametrize(("model", "expected"), [
    ("own_code:make", "unknown architecture"),
    ("os:getcwd", "unknown architecture"),
    ("kept/nobody", "unknown architecture"),
    ("digits-nothing", "unknown architecture"),
    ("imagenet/nothing", "unknown torchvision classification model 'nothing'"),
])  # fmt: skip
def test_bad_architectures(tmp_path, folder, model, expected, monkeypatch):
    (tmp_path / "own_code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sentinel')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = files.save_state(folder / "w.safetensors", files.mlp_state())
    refused(tmp_path, path, lambda: take_weights(path, model, "mine"), expected)


@pytest.mark.parametrize(("kind", "end"), [("models", ".safetensors"), ("models", ".pt2"), ("images", "")])
def test_a_link_to_nowhere_takes_its_name_and_can_be_removed(folder, kind, end):
    (home() / kind).mkdir()
    (home() / kind / f"mine{end}").symlink_to(folder / "nowhere")
    with pytest.raises(itf.IntrafusionError, match="kept/mine already exists"):
        free_path(kind, "mine")
    remove(kind, "mine")
    assert [*(home() / kind).iterdir()] == []
    with pytest.raises(itf.IntrafusionError, match="kept/mine does not exist"):
        remove(kind, "mine")


def test_too_large_a_file_is_refused_unread(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(safe_zip, "FILE", 1000)
    for name, call in (
        ("w.safetensors", lambda path: take_weights(path, "digits-mlp", "mine")),
        ("p.pt2", lambda path: take_program(path, "mine")),
        ("d.npz", lambda path: take_data([path], "mine")),
    ):  # fmt: skip
        (folder / name).write_bytes(os.urandom(1001))
        refused(tmp_path, folder / name, lambda: call(folder / name), "the limit is 0 MiB")  # noqa: B023


def test_too_many_files_and_too_much_in_all(tmp_path, folder, monkeypatch):
    path = files.pictures(folder / "d.zip")
    for bound, value in (("MEMBERS", 3), ("UNPACKED", 10)):
        with monkeypatch.context() as within:
            within.setattr(safe_zip, bound, value)
            refused(tmp_path, path, lambda: take_data([path], "mine"), "the limit is")


def test_pixels_of_all_pictures_are_counted_before_they_are_decoded(tmp_path, folder, monkeypatch):
    path, decoded = files.pictures(folder / "d.zip"), []
    decode = upload.pixels_of
    monkeypatch.setattr(upload, "pixels_of", lambda *about: decoded.append(about) or decode(*about))
    monkeypatch.setattr(upload, "PIXELS", 3 * 64 - 1)  # four pictures of 8x8
    refused(tmp_path, path, lambda: take_data([path], "mine"), "more than 191 pixels in total")
    assert len(decoded) == 2
    monkeypatch.setattr(upload, "PIXELS", 4 * 64)
    assert len(itf.load_data(take_data([path], "mine"), input_size=(1, 8, 8))) == 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", TAKEN)
def test_pictures_of_odd_kinds_are_taken(folder, kind):
    """Of one class, and beside pictures of other sizes: pixels lie as they are stored, as torchvision reads them."""
    path = files.pictures(folder / "d.zip", {"cat/x.png": TAKEN[kind], "cat/y.png": files.picture(size=(40, 20))})
    data = itf.load_data(take_data([path], "mine"), input_size=(1, 8, 8))
    assert data.classes == ("cat",)
    assert abs(int(data.images[0].min()) - 200) <= 3
    assert abs(int(data.images[0].max()) - 200) <= 3


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_floats_of_other_sizes_come_as_float32(folder, kind, suffix):
    state = {name: value.to(kind) for name, value in files.mlp_state().items()}
    name = take_weights(files.save_state(folder / f"w{suffix}", state), "digits-mlp", "mine")
    kept = itf.load_model(name).state_dict()
    assert all(value.dtype == torch.float32 for value in kept.values())
    assert all(torch.equal(value, state[key].float()) for key, value in kept.items())


def _links(folder: Path) -> None:
    (folder / "cat").mkdir()
    (folder / "cat" / "x.png").symlink_to("/etc/passwd")


def _dangling(folder: Path) -> None:
    (folder / "cat").mkdir()
    (folder / "cat" / "x.png").symlink_to("nowhere")
    (folder / "cat" / "y").symlink_to("y")
    os.mkfifo(folder / "cat" / "z.png")


def _loop(folder: Path) -> None:
    folder.rmdir()
    folder.symlink_to(folder)


def _half_archive(folder: Path) -> None:
    folder.rmdir()
    folder.write_bytes(files.npz(folder.parent / "x.npz").read_bytes()[:-40])


def _one_array(folder: Path) -> None:
    folder.rmdir()
    with folder.open("wb") as opened:
        np.save(opened, files.PIXELS)


def _half_a_name(folder: Path) -> None:
    (folder / "\udcff").mkdir()
    (folder / "\udcff" / "x.png").write_bytes(files.picture())


def _one_name(folder: Path) -> None:
    folder.rmdir()
    files.npz(folder.parent / "x.npz", classes=np.array("a")).rename(folder)


PLACES: dict[str, tuple[Any, str]] = {  # what a path on this machine may hold, which is read where it lies
    "a link to another file": (_links, "not a readable image"),
    "links to nowhere, and a pipe": (_dangling, "without images"),
    "a link to itself": (_loop, "no file at"),
    "nothing": (lambda folder: None, "no class folders"),
    "a pipe": (lambda folder: (folder.rmdir(), os.mkfifo(folder)), "neither a file nor a folder"),
    "text": (lambda folder: (folder.rmdir(), folder.write_text("x")), "not a readable .npz"),
    "a picture": (lambda folder: (folder.rmdir(), folder.write_bytes(files.picture())), "not a readable .npz"),
    "a pickle": (lambda folder: (folder.rmdir(), files.pickled(folder, folder.parent / "sentinel")), "not a readable .npz"),
    "one array": (_one_array, "a single array"),
    "a header of a million million images": (lambda folder: (folder.rmdir(), files.huge_header(folder)), "not a readable .npz"),
    "half an archive": (_half_archive, "not a readable"),
    "a folder whose name is no text": (_half_a_name, "not valid Unicode"),
    "an array for its names": (_one_name, "not a readable"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_a_hostile_path_of_images_is_one_line(tmp_path, kind):
    make, expected = PLACES[kind]
    (tmp_path / "d").mkdir()
    make(tmp_path / "d")
    with pytest.raises(itf.IntrafusionError, match=expected) as caught:
        itf.load_data("own", path=tmp_path / "d")
    assert str(caught.value).isprintable()
    assert "root:" not in str(caught.value)
    assert not (tmp_path / "sentinel").exists()


def test_grey_images_are_not_for_a_network_of_colours_nor_the_other_way_round(folder):
    data = itf.load_data(take_data([files.npz(folder / "d.npz")], "mine"))
    model = itf.load_model("cifar10-resnet20", weights="random")
    with pytest.raises(itf.IntrafusionError, match="choose the data the model was trained on"):
        itf.evaluate(model, data)
    colour = itf.load_data(take_data([files.npz(folder / "e.npz", images=files.PIXELS.repeat(3, 3))], "colour"))
    with pytest.raises(itf.IntrafusionError, match="choose the data the model was trained on"):
        itf.evaluate(itf.load_model("digits-mlp"), colour)
