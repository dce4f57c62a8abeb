"""A person's own network and images: code, files, and what is kept of them, from file to curve."""

import json
from dataclasses import replace

import numpy as np
import own_files as files
import pytest
import torch
from damage import DAMAGES, card_in, set_card
from PIL import Image

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.data.datasets import kept_data
from intrafusion.models import hub
from intrafusion.models.exported_program import describe_program, read_program, tensors_of
from intrafusion.models.fingerprint import of_model
from intrafusion.models.serialization import save_state
from intrafusion.models.sources.user import is_safe
from intrafusion.runtime import sandbox
from intrafusion.runtime.paths import home
from intrafusion.studies.uploads import remove, take_data, take_program, take_weights

CODE = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
"""


NET = """
from collections import namedtuple
from types import SimpleNamespace
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
    def forward(self, x):
        y = self.head(x.flatten(1))
        return {gives}
make = Net
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the current directory; its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        name = f"own_{abs(hash((text, str(tmp_path))))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


class TestFactory:
    def test_a_bare_network_opens_with_guesses_that_are_said(self, module, caplog):
        name = f"{module(CODE)}:make"
        model = itf.load_model(name)
        card = model.card
        assert (card.name, card.input_size, card.classes, card.dataset) == (name, (1, 28, 28), 3, "own")
        assert (card.mean, card.std) == ((0.0,), (1.0,))
        assert "guessed: images 1x28x28" in caplog.text
        assert not model.training
        assert hub.dataset_of(name) == "own"

    def test_the_module_says_what_is_not_to_be_guessed(self, module, caplog):
        told = "CARD = {'input_size': [1, 8, 8], 'mean': [0.5], 'std': [0.25], 'dataset': 'digits', 'accuracy': 0.5}"
        card = itf.load_model(f"{module(CODE + told)}:make").card
        assert (card.input_size, card.mean, card.std, card.dataset, card.accuracy) == (
            (1, 8, 8),
            (0.5,),
            (0.25,),
            "digits",
            0.5,
        )
        assert caplog.text == ""

    def test_a_card_of_the_network_is_its_card(self, module):
        text = "import intrafusion as itf\ndef make():\n    return itf.load_model('digits-mlp')\n"
        name = f"{module(text)}:make"
        card = itf.load_model(name).card
        assert (card.name, card.dataset) == (name, "digits")
        assert card.accuracy == itf.load_model("digits-mlp").card.accuracy

    def test_weights_of_a_file(self, module, tmp_path):
        name = f"{module(CODE)}:make"
        state = {key: torch.zeros_like(value) for key, value in itf.load_model(name).state_dict().items()}
        path = files.save_state(tmp_path / "zero.safetensors", state)
        assert not itf.load_model(name, path)(torch.ones(1, 1, 28, 28)).any()

    def test_nan_weights_are_refused_with_their_layers_name(self, module):
        text = CODE + "def broken():\n    model = make()\n    model[2].weight.data[0] = float('nan')\n    return model\n"
        with pytest.raises(itf.IntrafusionError, match="weight of 2 has NaN"):
            itf.load_model(f"{module(text)}:broken")

    def test_changed_code_is_another_network(self, module):
        found = set()
        for comment in ("", "", "# another"):
            torch.manual_seed(0)
            found.add(of_model(itf.load_model(f"{module(CODE + comment)}:make")))
        assert len(found) == 2

    BAD = {  # noqa: RUF012
        "no such module": (None, "nowhere_at_all:make", "cannot import .*: ModuleNotFoundError"),
        "no such function": (CODE, ":other", "cannot import .*: AttributeError"),
        "no name": (CODE, ":", "cannot import"),
        "broken code": ("def make(:", ":make", "cannot import .*: SyntaxError"),
        "code that fails": ("def make():\n    raise OSError('no\\nway')", ":make", "failed: OSError: no"),
        "wants arguments": ("def make(x): pass", ":make", "failed: TypeError"),
        "no network": ("def make():\n    return 3", ":make", "must return an nn.Module, not int"),
        "no classifier": (
            "from torch import nn\ndef make():\n    return nn.Conv2d(3, 3, 3)",
            ":make",
            "none of the image sizes tried",
        ),
        "an unknown field": (CODE + "CARD = {'size': 3}", ":make", "CARD of .* has an unknown field 'size'"),
        "a size of words": (CODE + "CARD = {'input_size': 'big'}", ":make", "input_size of .* must be"),
        "a size of another network": (CODE + "CARD = {'input_size': (3, 8, 8)}", ":make", "none of the image sizes tried"),
        "a size of another network, on its card": (
            CODE + "CARD = {'input_size': (3, 8, 8)}",
            ":make",
            "3x8x8.*correct input_size in CARD",
        ),
        "one mean too many": (CODE + "CARD = {'mean': (0, 0)}", ":make", "is invalid"),
    }

    @pytest.mark.parametrize(("text", "name", "match"), BAD.values(), ids=BAD)
    def test_what_does_not_work_is_one_line(self, module, text, name, match):
        whole = name if text is None else module(text) + name
        with pytest.raises(itf.IntrafusionError, match=match) as caught:
            itf.load_model(whole)
        assert "\n" not in str(caught.value)

    GIVES: dict[str, tuple[str, str]] = {  # noqa: RUF012 (what a forward makes of logits y, what to return)
        "a table": ("{'loss': y.sum(), 'logits': y}", "a dict .* returns out\\['logits'\\]$"),
        "a table without the word": ("{'features': y.sum(), 'scores': y}", "returns out\\['scores'\\]$"),
        "an output of auxiliary heads": ("(y, y)", r"a tuple .* returns out\[0\]$"),
        "a list": ("[y.sum(), y]", r"a list .* returns out\[1\]$"),
        "a named tuple": ("namedtuple('Outputs', 'logits aux')(y, None)", r"an? Outputs .* returns out\.logits$"),
        "an object": ("SimpleNamespace(hidden=y, logits=y)", r"returns out\.logits$"),
        "nothing": ("None", "a NoneType .* returns its logits$"),
    }

    @pytest.mark.parametrize("card", ["", "CARD = {'input_size': (1, 8, 8)}", "Net.card = BENCH.card"])
    @pytest.mark.parametrize(("gives", "match"), GIVES.values(), ids=GIVES)
    def test_outputs_that_are_no_tensor_say_what_to_return(self, module, gives, match, card):
        code = NET.format(gives=gives) + card.replace("BENCH", "__import__('intrafusion').load_model('digits-mlp')")
        with pytest.raises(itf.IntrafusionError, match=match) as caught:
            itf.load_model(f"{module(code)}:make")
        assert "input_size" not in str(caught.value)

    def test_a_map_for_each_image_is_no_row_of_logits(self, module):
        code = NET.format(gives="y[:, :, None, None]") + "CARD = {'input_size': (1, 8, 8)}"
        with pytest.raises(itf.IntrafusionError, match=r"\(2, 10, 1, 1\), not logits"):
            itf.load_model(f"{module(code)}:make")

    @pytest.mark.parametrize("kind", ["half", "bfloat16", "double"])
    def test_another_precision_is_converted_and_told(self, module, caplog, kind):
        code = NET.format(gives="y") + "CARD = {'input_size': (1, 8, 8), 'mean': (0.0,), 'std': (1.0,)}\n"
        name = f"{module(code + f'def other(): return make().{kind}()')}:other"
        model = itf.load_model(name)
        assert {part.dtype for part in model.parameters()} == {torch.float32}
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
        kind = {"half": "float16", "double": "float64"}.get(kind, kind)
        assert [record.getMessage() for record in caplog.records] == [f"{name} is in {kind}; converting to float32"]

    def test_a_compiled_network_is_the_network(self, module):
        code = NET.format(gives="y") + "def other(): return torch.compile(make())"
        assert type(itf.load_model(f"{module(code)}:other")).__name__ == "Net"

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    @pytest.mark.parametrize("how", ["script(make())", "trace(make(), torch.zeros(1, 1, 8, 8))"])
    def test_a_scripted_network_is_one_line(self, module, how):
        code = NET.format(gives="y") + f"def other(): return torch.jit.{how}"
        with pytest.raises(itf.IntrafusionError, match="returned a scripted network"):
            itf.load_model(f"{module(code)}:other")

    def test_its_networks_are_not_kept_by_name(self, module):
        model = itf.load_model(f"{module(CODE)}:make")
        with pytest.raises(itf.IntrafusionError, match="export it"):
            hub.keep(model, "mine")


class TestOnlyPythonAndTheCommandLineRunCode:
    @pytest.fixture
    def trap(self, tmp_path, monkeypatch):
        """A module that leaves a mark when it is imported; its name, and whether it was."""
        (tmp_path / "own_trap.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\n" + CODE)
        monkeypatch.syspath_prepend(tmp_path)
        return "own_trap:make", (tmp_path / "mark").exists

    def test_the_trap_works(self, trap):
        itf.load_model(trap[0])
        assert trap[1]()

    def test_a_file_may_not_ask_for_it(self, trap):
        assert not is_safe(trap[0])
        assert not trap[1]()

    def test_a_kept_networks_card_may_not(self, trap, tmp_path):
        kept = hub.keep(itf.load_model("digits-mlp"), "mine")
        path = home() / "models" / "mine.safetensors"
        card = card_in(path)
        card["details"]["architecture"] = trap[0]
        set_card(path, json.dumps(card))
        for call in (itf.load_model, hub.architecture_of, hub.dataset_of):
            with pytest.raises(itf.IntrafusionError, match="names an unknown architecture"):
                call(kept)
        assert "names an unknown architecture" in hub.describe(kept)["summary"]
        assert not trap[1]()

    def test_a_card_beside_uploaded_weights_may_not(self, trap, tmp_path):
        path = files.save_state(tmp_path / "w.safetensors", files.mlp_state())
        card = {
            "name": trap[0],
            "dataset": trap[0],
            "details": {"architecture": trap[0], "layers": {"0": {"kind": trap[0]}}},
        }
        (tmp_path / "w.json").write_text(json.dumps(card))
        with pytest.raises(itf.IntrafusionError):
            take_weights(path, "digits-mlp", "mine")
        assert not trap[1]()

    def test_a_programs_card_may_not(self, trap, tmp_path):
        kept = take_program(files.export(files.network(), tmp_path / "p.pt2"), "mine")
        path = home() / "models" / "mine.safetensors"
        card = card_in(path)
        card |= {"dataset": trap[0], "details": card["details"] | {"architecture": trap[0]}}
        set_card(path, json.dumps(card))
        itf.load_model(kept)
        assert hub.architecture_of(kept) == kept
        assert not trap[1]()


class TestImages:
    def test_one_npz_is_the_test_split(self, tmp_path):
        name = take_data([files.npz(tmp_path / "x.npz", classes=np.array(["a", "b", "c"]))], "mine")
        data = itf.load_data(name)
        assert (name, data.name, data.split) == ("kept/mine", "kept/mine", "test")
        assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), files.PIXELS)
        assert data.labels.tolist() == files.LABELS.tolist()
        assert data.classes == ("a", "b", "c")
        assert itf.load_calibration(name).split == "test"

    def test_two_are_both_splits(self, tmp_path):
        train = files.npz(tmp_path / "x_train.npz", images=files.PIXELS // 2)
        take_data([files.npz(tmp_path / "x_test.npz"), train], "mine")
        assert torch.equal(itf.load_data("kept/mine", "train").images, itf.load_data("kept/mine").images // 2)
        seen = itf.load_calibration("kept/mine")
        assert (seen.name, seen.split) == ("kept/mine", "train")

    @pytest.mark.parametrize(("names", "match"), [
        (("a.npz", "b.npz"), "x_train.npz and x_test.npz"), (("a.npz", "b.zip"), "give one .npz"), ((), "no file given"),
    ])  # fmt: skip
    def test_other_pairs_are_refused(self, tmp_path, names, match):
        paths = [files.npz(tmp_path / name) if name.endswith("npz") else files.pictures(tmp_path / name) for name in names]
        with pytest.raises(itf.IntrafusionError, match=match):
            take_data(paths, "mine")

    def test_splits_of_two_sizes_are_refused(self, tmp_path):
        train = files.npz(tmp_path / "x_train.npz", images=np.zeros((6, 9, 9, 1), np.uint8))
        with pytest.raises(itf.IntrafusionError, match="training images are"):
            take_data([files.npz(tmp_path / "x_test.npz"), train], "mine")

    @pytest.mark.parametrize("root", ["", "set/", "a/set/"])
    def test_a_zip_of_class_folders(self, tmp_path, root):
        whole = {f"{root}{c}/{n}.png": files.picture(n) for c in ("dog", "cat") for n in range(2)}
        whole |= {"__MACOSX/cat/._0.png": b"x", f"{root}cat/.DS_Store": b"x"}
        told = []
        take_data([files.pictures(tmp_path / "x.zip", whole)], "mine", lambda *progress: told.append(progress))
        data = itf.load_data("kept/mine", input_size=(3, 8, 8))
        assert data.classes == ("cat", "dog")
        assert data.labels.tolist() == [0, 0, 1, 1]
        assert data.images[:, :, 0, 0].tolist() == [[0, 7, 9], [1, 7, 9]] * 2  # pictures of the right size are not touched
        assert told[-1] == (4, 4)
        assert itf.load_data("kept/mine", input_size=(1, 16, 12)).images.shape == (4, 1, 16, 12)

    def test_splits_of_a_zip_share_their_labels(self, tmp_path):
        whole = {
            "s/train/ape/0.png": files.picture(),
            "s/train/cat/0.png": files.picture(),
            "s/val/cat/0.png": files.picture(),
        }
        take_data([files.pictures(tmp_path / "x.zip", whole)], "mine")
        assert itf.load_data("kept/mine", "train", input_size=8).labels.tolist() == [0, 1]
        assert itf.load_data("kept/mine", "test", input_size=8).labels.tolist() == [1]

    def test_so_do_those_of_a_folder(self, tmp_path):
        for place in ("train/ape", "train/cat", "test/cat"):
            (tmp_path / place).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / place / "x.png")
        assert itf.load_data("own", "test", tmp_path, input_size=(1, 8, 8)).labels.tolist() == [1]

    def test_names_are_free_again_when_removed(self, tmp_path):
        path = files.npz(tmp_path / "x.npz")
        take_data([path], "mine")
        with pytest.raises(itf.IntrafusionError, match="already"):
            take_data([path], "mine")
        remove("images", "kept/mine")
        with pytest.raises(itf.IntrafusionError, match=r"unknown saved images 'kept/mine'; choose one of \(none yet\)"):
            itf.load_data("kept/mine")
        assert take_data([path], "mine") == "kept/mine"

    def _emptied(folder):
        for file in folder.iterdir():
            file.unlink()

    def _a_file(folder):
        TestImages._emptied(folder)
        folder.rmdir()
        folder.write_bytes(b"x")

    DAMAGES = {  # noqa: RUF012
        "a file": _a_file,
        "empty": _emptied,
        "truncated": lambda folder: DAMAGES["truncated"](folder / "own_test.npz"),
        "an empty file": lambda folder: DAMAGES["empty"](folder / "own_test.npz"),
        "garbage": lambda folder: DAMAGES["garbage"](folder / "own_test.npz"),
    }

    @pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
    def test_damaged_ones_are_listed_as_such_and_hinder_no_others(self, tmp_path, capsys, damage):
        for name in ("mine", "whole"):
            take_data([files.npz(tmp_path / "x.npz")], name)
        damage(home() / "images" / "mine")
        assert kept_data() == ["kept/mine", "kept/whole"]
        assert main(["own", "list", "--json"]) == 0
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["about"].startswith("damaged: ") for row in told] == [True, False]
        with pytest.raises(itf.IntrafusionError) as caught:
            itf.load_data("kept/mine")
        assert "\n" not in str(caught.value)
        assert len(itf.load_data("kept/whole")) == 6
        remove("images", "mine")
        assert kept_data() == ["kept/whole"]

    def test_paths_and_names_do_not_mix(self, tmp_path):
        take_data([files.npz(tmp_path / "x.npz")], "mine")
        for call in (itf.load_data, itf.load_calibration):
            with pytest.raises(itf.IntrafusionError, match="takes no path"):
                call("kept/mine", path=tmp_path)
        with pytest.raises(itf.IntrafusionError, match="dataset own needs"):
            itf.load_data("own")
        with pytest.raises(itf.IntrafusionError, match=r"unknown dataset 'mnist'.*kept/mine"):
            itf.load_data("mnist")

    def test_a_stop_leaves_nothing(self, tmp_path):
        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            take_data([files.pictures(tmp_path / "x.zip")], "mine", stop)
        assert [*home().iterdir()] == []


def _link(made):
    (made / "test" / "cat").mkdir(parents=True)
    (made / "test" / "cat" / "000001.png").symlink_to("/etc/passwd")


def _file(place, content=b"x"):
    def make(made):
        (made / place).parent.mkdir(parents=True, exist_ok=True)
        (made / place).write_bytes(content)

    return make


def _state(change=lambda weight: weight):
    def make(made):
        made.mkdir()
        state = files.mlp_state()
        first = next(name for name in state if name.endswith("weight"))
        files.save_state(made / "weights.safetensors", state | {first: change(state[first])})

    return make


def _program(text=None, scale=1, **changes):
    def make(made):
        program, _, _ = read_program(files.export(files.network(), made.with_name("p.pt2")))
        made.mkdir()
        (made / "program.json").write_text(text or json.dumps(describe_program(program) | changes))
        tensors = {name: value * scale for name, value in tensors_of(program).items()}
        files.save_state(made / "program.safetensors", tensors)

    return make


class TestWhatAChildHandsBackIsCheckedAgain:
    """A file that has taken over the process that reads it gets no further."""

    LIES = {  # noqa: RUF012 (who takes it, what the child leaves, what it answers, what is said)
        "no program": ("program", lambda made: None, None, "no valid program.json"),
        "no tensors": ("program", _file("program.json", b"{}"), None, "no valid program.safetensors"),
        "no JSON": ("program", _program(text="{"), None, "not a supported program"),
        "deep JSON": ("program", _program(text="[" * 10**5), None, "not a supported program"),
        "another table": ("program", _program(text="[3]"), None, "is invalid"),
        "images of a vast size": ("program", _program(image=[10**12, 8, 8]), None, "its images must be"),
        "no steps": ("program", _program(steps=[]), None, "not a supported program"),
        "NaN tensors": ("program", _program(scale=torch.nan), None, "NaN or infinite"),
        "no weights": ("weights", lambda made: None, None, "no valid weights.safetensors"),
        "other weights": ("weights", _file("weights.safetensors"), None, "cannot read weights"),
        "NaN weights": ("weights", _state(lambda weight: weight * torch.nan), None, "NaN or infinite"),
        "weights of another shape": ("weights", _state(lambda weight: weight[:, :5].contiguous()), None, "does not fit"),
        "a link": ("data", _link, [], "not a regular file"),
        "a program": ("data", _file("test/cat/run.py"), [], "which is not one of them"),
        "a picture outside its class": ("data", _file("test/x.png"), [], "which is not one of them"),
        "another folder": ("data", _file("more/cat/x.png"), [], "which is not one of them"),
        "a folder too deep": ("data", _file("test/cat/dog/x.png"), [], "which is not one of them"),
        "no arrays": ("data", _file("own_test.npz"), [], "not a readable archive"),
        "arrays of another name": ("data", _file("own.npz"), [], "which is not one of them"),
        "nothing": ("data", lambda made: made.mkdir(), [], "no test images"),
    }  # fmt: skip

    @pytest.mark.parametrize("lie", LIES)
    def test_a_lie_is_one_line_and_nothing_is_kept(self, tmp_path, monkeypatch, lie):
        who, make, answer, expected = self.LIES[lie]

        def steps(task, folder, *_):
            make(folder / "made")
            yield 1, 1
            return answer

        monkeypatch.setattr(sandbox, "steps", steps)
        path = files.npz(tmp_path / "x.npz")
        take = {
            "program": lambda: take_program(path, "mine"), "data": lambda: take_data([path], "mine"),
            "weights": lambda: take_weights(path, "digits-mlp", "mine"),
        }  # fmt: skip
        with pytest.raises(itf.IntrafusionError, match=expected) as caught:
            take[who]()
        assert str(home()) not in str(caught.value)
        assert [path for path in home().rglob("*") if path.is_file()] == []

    def test_a_card_names_no_other_architecture(self, tmp_path, monkeypatch):
        def steps(task, folder, *_):
            model = itf.load_model("digits-mlp")
            card = replace(model.card, details={"architecture": "os:getcwd"})
            save_state(model.state_dict(), card, folder / "made" / "weights")
            yield 1, 1

        monkeypatch.setattr(sandbox, "steps", steps)
        name = take_weights(files.npz(tmp_path / "x.npz"), "digits-mlp", "mine")
        assert hub.architecture_of(name) == "digits-mlp"


def test_weights_for_an_architecture(tmp_path):
    path = files.save_state(tmp_path / "w.pt", {"state_dict": files.mlp_state()})
    name = take_weights(path, "digits-mlp", "mine")
    assert name == "kept/mine"
    model, dense = itf.load_model(name), itf.load_model("digits-mlp")
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(images), dense(images))
    assert hub.architecture_of(name) == "digits-mlp"


@pytest.fixture
def rows(capsys):
    def call(*words):
        assert main([*words, "--json"]) == 0, capsys.readouterr().err
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return call


class TestCommand:
    def test_from_files_to_a_curve(self, rows, tmp_path):
        program, images = files.export(files.network(), tmp_path / "net.pt2"), files.npz(tmp_path / "x.npz")
        (kept,) = rows("own", "program", str(program), "--name", "net", "--mean", "0.5", "--std", "0.5")
        assert (kept["kept"], kept["input"], kept["classes"], kept["prunable"]) == ("kept/net", [1, 8, 8], 3, 2)
        (pixels,) = rows("own", "data", str(images), "--name", "pixels")
        assert pixels == {"kept": "kept/pixels", "split": "test", "images": 6}
        points = rows("curve", "--model", "kept/net", "--data", "kept/pixels", "--sparsity", "0.5")
        assert [point["merge"] for point in points] == ["drop", "fusion"]
        dense = itf.evaluate(itf.load_model("kept/net"), itf.load_data("kept/pixels"))
        assert points[0]["dense_accuracy"] == dense.accuracy
        assert [row["kept"] for row in rows("own", "list")] == ["kept/net", "kept/pixels"]
        assert rows("own", "remove", "kept/net") == [{"removed": "kept/net"}]
        rows("own", "remove", "kept/pixels", "--images")
        assert rows("own", "list") == []

    def test_from_code_to_a_curve(self, rows, tmp_path, module):
        files.npz(tmp_path / "x.npz", images=np.zeros((6, 28, 28, 1), np.uint8))
        words = "curve", "--model", f"{module(CODE)}:make", "--data-path", str(tmp_path / "x.npz"), "--sparsity", "0.5"
        (point, _) = rows(*words)
        assert (point["data"], point["count"]) == ("own", 6)

    def test_weights(self, rows, tmp_path):
        path = files.save_state(tmp_path / "w.safetensors", files.mlp_state())
        (kept,) = rows("own", "weights", str(path), "--model", "digits-mlp", "--name", "mine")
        assert (kept["kept"], kept["data"]) == ("kept/mine", "digits")

    def test_criteria_that_look_at_images_look_at_kept_ones(self, rows, tmp_path):
        take_program(files.export(files.network(), tmp_path / "net.pt2"), "net")
        take_data([files.npz(tmp_path / "x_train.npz"), files.npz(tmp_path / "x_test.npz")], "pixels")
        words = "curve", "--model", "kept/net", "--data", "kept/pixels", "--sparsity", "0.5", "--merge", "refit"
        (point,) = rows(*words, "--criterion", "taylor")
        model, seen = itf.load_model("kept/net"), itf.load_calibration("kept/pixels")
        small = itf.prune(model, model.card.example(), 0.5, "taylor", "refit", data=seen)
        assert point["accuracy"] == itf.evaluate(small, itf.load_data("kept/pixels")).accuracy

    def test_pictures_of_a_zip_fit_the_network(self, rows, tmp_path):
        take_program(files.export(files.network(), tmp_path / "net.pt2"), "net")
        shapes = {f"{c}/{n}.png": files.picture(n, (30, 20)) for c in "abc" for n in range(2)}
        rows("own", "data", str(files.pictures(tmp_path / "x.zip", shapes)), "--name", "pictures")
        (point, _) = rows("curve", "--model", "kept/net", "--data", "kept/pictures", "--sparsity", "0.5", "--limit", "5")
        assert point["count"] == 5

    @pytest.mark.parametrize(("words", "match"), [
        ("weights nowhere.pt --model digits-mlp --name x", "no file at"),
        ("program nowhere.pt2 --name x", "no file at"),
        ("data nowhere.npz --name x", "no file at"),
        ("data nowhere.npz", "--name"),
        ("remove kept/nobody", "kept/nobody does not exist"),
        ("list", "nothing is saved yet"),
        ("", "WHAT"),
        ("banana", "banana"),
    ])  # fmt: skip
    def test_bad_input_is_two_and_one_line(self, capsys, words, match):
        assert main(["own", *words.split()]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert match in captured.err
