"""What is handed out answers as the network that was made, in every format, or is not there; and says where it comes from."""

import errno
import io
import json
import re
import shlex
import zipfile
from dataclasses import replace

import pytest
import torch

import intrafusion as itf
from intrafusion import reporting as package
from intrafusion.cli.main import main
from intrafusion.models.hub import keep
from intrafusion.reporting import FORMATS, TOLERANCE, Made, Report, archive, export, making, write, writing
from intrafusion.reporting.snippets import prune_line, prune_snippet
from intrafusion.runtime import atomic_write
from intrafusion.studies.session import open_session

SPEC = itf.PruneSpec(model="digits-mlp", sparsity=0.5, limit=50)
_made: dict[str, Made] = {}


def make(name: str) -> Made:
    """A pruned network, made once for all tests."""
    if name not in _made:
        spec = SPEC.but(model=name)
        *_, last = making(spec, open_session(spec))
        assert last.result is not None
        _made[name] = last.result
    return _made[name]


@pytest.fixture(params=["digits-mlp", "digits-vgg", "digits-resnet"])
def made(request) -> Made:
    return make(request.param)


def test_what_is_made_is_the_pruned_network_and_stands_alone(made):
    model, data = itf.load_model(made.spec.model), itf.load_data("digits")
    small = itf.prune(model, made.example, 0.5)
    images = torch.randn(3, *made.example.shape[1:])
    torch.testing.assert_close(made.network(images), small(images), rtol=0, atol=1e-6)
    assert made.result.accuracy == itf.evaluate(small, data, limit=50).accuracy == made.card.accuracy
    assert made.after.params == sum(p.numel() for p in small.parameters()) < made.before.params
    theirs = {id(p) for p in made.dense.parameters()}
    assert not theirs & {id(p) for p in made.network.parameters()}
    groups = [g for g in itf.find_groups(model, made.example) if g.reason is None]
    assert [(w.group, w.before, w.after) for w in made.widths] == [(g.name, g.size, g.size // 2) for g in groups]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_opens_again_and_answers_the_same(made, name, tmp_path):
    found = write(made, tmp_path, name)
    assert found.reason is None
    assert found.difference <= TOLERANCE
    assert found.any_batch
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(found.files)
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    images = torch.randn(5, *made.example.shape[1:], generator=torch.Generator().manual_seed(1))
    path = tmp_path / found.files[0]
    if name == "safetensors":
        answers = itf.load_model(made.spec.model, weights=path)(images)
    elif name == "torch.export":
        answers = torch.export.load(path).module()(images)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        answers = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        expected = made.network(images)
    assert float((answers - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def test_safetensors_open_as_a_kept_network_and_can_be_pruned_again(tmp_path):
    made = make("digits-resnet")
    write(made, tmp_path, "safetensors")
    model = itf.load_model("digits-resnet", weights=tmp_path / "model.safetensors")
    assert model.card.details["spec"] == made.spec.to_dict()
    again = itf.load_model(keep(model, "mine"))
    assert torch.equal(again(made.example), made.network(made.example))
    assert itf.prune(again, made.example, 0.5)(made.example).shape == (1, 10)
    with pytest.raises(itf.IntrafusionError):
        itf.load_model("digits-mlp", weights=tmp_path / "model.safetensors")


class Off(torch.nn.Module):
    def __init__(self, network, by):
        super().__init__()
        self.network, self.by, self.card = network, by, network.card

    def forward(self, x):
        return self.network(x) * self.by


@pytest.mark.parametrize(("by", "kept"), [(1 + 1e-5, True), (1 + 1e-3, False), (float("nan"), False)])
def test_a_file_that_answers_otherwise_is_not_left_there(monkeypatch, tmp_path, by, kept):
    made, honest = make("digits-mlp"), FORMATS["torch.export"]
    liar = replace(honest, write=lambda m, folder: honest.write(replace(m, network=Off(m.network, by)), folder))
    monkeypatch.setitem(FORMATS, "torch.export", liar)
    found = write(made, tmp_path, "torch.export")
    assert (found.reason is None) == kept == any(tmp_path.iterdir())
    assert kept or "differ by" in found.reason


def test_a_network_of_one_batch_size_is_exported_for_one_image(tmp_path):
    class Fixed(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            if x.shape[0] == 1:  # a branch on the shape cannot be traced for any
                return self.network(x)
            return torch.cat([self.network(one) for one in x.split(1)])

    made = make("digits-mlp")
    fixed = Fixed(made.network)
    fixed.card = made.card
    found = write(replace(made, network=fixed), tmp_path, "torch.export")
    assert (found.reason, found.any_batch) == (None, False)


def test_an_exporter_that_fails_is_one_line_and_the_others_go_on(monkeypatch, tmp_path):
    def fail(made, folder):
        (folder / "model.onnx").write_text("half")
        raise TypeError("no such operator\nand a long story")

    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=fail))
    *_, last = export(SPEC, open_session(SPEC), tmp_path / "out", ["onnx", "safetensors"])
    assert [one.reason for one in last.result.files] == ["TypeError: no such operator", None]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "model.json", "model.safetensors", "report.html", "report.md", "spec.json",
    ]  # fmt: skip
    assert "not written: TypeError: no such operator" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(itf.IntrafusionError, match="nothing was written: onnx failed: TypeError: no such operator"):
        list(export(SPEC, open_session(SPEC), tmp_path / "other", ["onnx"]))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line_and_leaves_nothing(monkeypatch, tmp_path):
    def fail(made, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(FORMATS, "torch.export", replace(FORMATS["torch.export"], write=fail))
    with pytest.raises(itf.IntrafusionError, match="is full; free some space") as caught:
        list(export(SPEC, open_session(SPEC), tmp_path / "out", ["safetensors", "torch.export"]))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_that_a_library_tells_in_its_own_words_is_known(monkeypatch, tmp_path):
    def fail(made, folder):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    usage = atomic_write.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic_write.shutil, "disk_usage", lambda path: usage._replace(free=100))
    monkeypatch.setitem(FORMATS, "torch.export", replace(FORMATS["torch.export"], write=fail))
    with pytest.raises(itf.IntrafusionError, match="is full"):
        write(make("digits-mlp"), tmp_path, "torch.export")


def test_an_export_that_is_stopped_leaves_nothing(tmp_path):
    steps = export(SPEC, open_session(SPEC), tmp_path / "out")
    while "writing" not in next(steps).doing:
        pass
    steps.close()
    assert list(tmp_path.iterdir()) == []


def test_the_spec_and_the_card_say_how_to_make_it_again(tmp_path):
    folder = tmp_path / "deep" / "out"
    spec = SPEC.but(round_to=8, merge="drop")
    *_, last = export(spec, open_session(spec), folder, ["safetensors"])
    raw = json.loads((folder / "spec.json").read_text())
    assert itf.PruneSpec.from_dict(raw) == spec
    again = itf.load_model("digits-mlp", weights=folder / "model.safetensors")
    *_, made = making(itf.PruneSpec.from_dict(raw), open_session(spec))
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), made.result.network.state_dict().values(), strict=True)
    )
    assert all(w.after % 8 == 0 for w in last.result.made.widths)


def test_without_images_nothing_is_said_of_accuracy(tmp_path):
    spec = itf.PruneSpec(model="cifar10-resnet20", dataset="cifar10", merge="drop")
    *_, last = export(spec, open_session("cifar10-resnet20", weights="random"), tmp_path / "out", ["safetensors"])
    assert last.result.to_row()["accuracy"] is None
    assert last.result.made.card.accuracy is None
    assert "Accuracy was not measured" in (tmp_path / "out" / "report.md").read_text()


class TestReport:
    @pytest.fixture
    def report(self, tmp_path) -> Report:
        made = make("digits-mlp")
        *_, wrote = writing(made, tmp_path, ["safetensors"])
        *_, compared = package.comparing(made, open_session("digits-mlp"), batch=2)
        return Report(made, wrote.result, compared)

    def test_numbers_and_commands_are_in_both(self, report):
        accuracy = f"{report.made.result.accuracy:.1%}"
        for text in (report.markdown(), report.html()):
            for told in (accuracy, "50 digits test images", f"{report.made.after.params:,}", "model.safetensors"):
                assert told in text
            assert "--sparsity 0.5" in text
            assert report.speed.sentence() in text
        assert prune_line(SPEC, "FOLDER", (), True) in report.markdown()

    def test_the_page_asks_no_network(self, report):
        page = report.html()
        markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
        assert not re.search(r"""(src|href|url\()\s*=?\s*["']?(https?:)?//""", markup)
        assert not re.search(r"<script[^>]+src", page)
        assert page.count("plotly-graph-div") >= 2

    def test_names_cannot_be_markup(self, report):
        evil = replace(report.made, widths=tuple(replace(w, group="<script>alert(1)</script>|") for w in report.made.widths))
        page = re.sub(r'<script type="text/javascript">.*?</script>', "", replace(report, made=evil).html(), flags=re.DOTALL)
        assert "<script>alert" not in page
        assert "<script>" not in replace(report, made=evil).markdown()

    def test_the_archive_holds_everything(self, report, tmp_path):
        packed = zipfile.ZipFile(io.BytesIO(archive(report, tmp_path)))
        assert sorted(packed.namelist()) == ["model.json", "model.safetensors", "report.html", "report.md", "spec.json"]
        assert packed.read("model.safetensors") == (tmp_path / "model.safetensors").read_bytes()


class TestCommand:
    def call(self, capsys, *words) -> dict:
        assert main(["prune", *words, "--json"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        return json.loads(line)

    def test_the_quoted_line_writes_the_folder_and_prints_one_row(self, capsys, tmp_path):
        line = prune_line(SPEC.but(round_to=8), str(tmp_path / "out"), ["safetensors", "onnx"], True)
        program, *words = shlex.split(line)
        assert (program, words[:3]) == ("python", ["-m", "intrafusion", "prune"])
        row = self.call(capsys, *words[3:], "--batch", "2")
        assert (row["model"], row["data"], row["sparsity"], row["round_to"]) == ("digits-mlp", "digits", 0.5, 8)
        assert row["params"] < row["params_before"]
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert [one["format"] for one in row["files"]] == ["safetensors", "onnx"]
        assert all(one["difference"] <= TOLERANCE and one["reason"] is None for one in row["files"])
        assert [one["batch"] for one in row["speed"]["latency"]] == [1, 2]
        assert (tmp_path / "out" / "model.onnx").stat().st_size == row["files"][1]["bytes"]
        model = itf.load_model("digits-mlp", weights=tmp_path / "out" / "model.safetensors")
        assert itf.evaluate(model, itf.load_data("digits"), limit=50).accuracy == row["accuracy"]

    def test_the_snippet_runs(self, capsys, tmp_path):
        exec(prune_snippet(SPEC, str(tmp_path / "out"), ["safetensors"]), {})
        assert re.search(r"^safetensors \S+ None$", capsys.readouterr().out, re.MULTILINE)

    def test_the_table_is_for_people(self, capsys, tmp_path):
        out = str(tmp_path / "out")
        assert main(["prune", "--model", "digits-mlp", "--out", out, "--formats", "safetensors", "--limit", "20"]) == 0
        told = capsys.readouterr().out
        assert "accuracy" in told
        assert "largest difference" in told

    def test_without_images_it_goes_on_and_says_so(self, capsys, tmp_path):
        words = (
            "--model",
            "cifar10-resnet20",
            "--weights",
            "random",
            "--merge",
            "drop",
            "--out",
            str(tmp_path / "out"),
        )
        assert main(["prune", *words, "--formats", "safetensors", "--json"]) == 0
        told = capsys.readouterr()
        assert json.loads(told.out)["accuracy"] is None
        assert told.err.startswith("accuracy was not measured: no usable cifar10")
        assert main(["prune", *words[:-1], str(tmp_path / "other"), "--data", "cifar10"]) == 2

    @pytest.mark.parametrize(("words", "match"), [
        ("--formats tflite", "unknown format 'tflite'; choose one of safetensors, torch.export, onnx"),
        ("--sparsity 0.1 0.2", "one value of --sparsity, not 2"),
        ("--merge drop fusion", "one value of --merge"),
        ("--round-to 0", "round_to must be a whole number"),
        ("--criterion luck", "luck"),
        ("--groups nowhere", "no group 'nowhere'"),
        ("--recovery hope", "hope"),
        ("--speed --batch 1", "at least 2 images"),
        ("--device banana", "banana"),
    ])  # fmt: skip
    def test_bad_input_is_two_and_one_line(self, capsys, tmp_path, words, match):
        out = ["--out", str(tmp_path / "out")]
        assert main(["prune", "--model", "digits-mlp", "--limit", "20", *words.split(), *out]) == 2
        told = capsys.readouterr()
        assert (told.out, told.err.count("\n")) == ("", 1)
        assert match in told.err
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_will_not_do_is_one_line(self, capsys, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.txt").write_text("mine")
        for out, match in ((tmp_path / "full", "not an empty folder"), (tmp_path / "full" / "mine.txt", "not an empty folder"),
                           (tmp_path / "full" / "mine.txt" / "deep", "cannot create")):  # fmt: skip
            assert main(["prune", "--model", "digits-mlp", "--out", str(out)]) == 2
            told = capsys.readouterr().err
            assert match in told
            assert told.count("\n") == 1
        assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
        assert main(["prune", "--model", "digits-mlp"]) == 2
        assert "--out" in capsys.readouterr().err
