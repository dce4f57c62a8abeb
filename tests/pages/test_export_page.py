"""The Export page: nothing unasked, the network of the controls, and files that are what they say."""

import io
import json
import re
import shlex
import zipfile
from urllib.parse import parse_qsl, urlsplit

import pytest
from opening import finished, open_page, press, text
from streamlit.testing.v1 import AppTest

import intrafusion as itf
from intrafusion.cli import main
from intrafusion.reporting import FORMATS, archive
from intrafusion.runtime.jobs import Jobs
from pages.panels import export

pytestmark = pytest.mark.usefixtures("jobs")
QUICK = {"model": "digits-mlp", "export_limit": "500"}


def open_export(**query) -> AppTest:
    app = open_page("export", **(QUICK | query))
    assert not app.exception
    return app


def made(app: AppTest, jobs: Jobs) -> AppTest:
    return finished(press(app, "Prune network"), jobs)


def rows(app: AppTest, which: int) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in app.dataframe[which].value.astype(str).to_numpy().tolist()}


def test_nothing_is_computed_before_it_is_asked(jobs):
    app = open_export()
    assert jobs.queue() == []
    assert text(app).count("Available when the network is pruned") == 2
    assert "Share and reproduce" in text(app)
    assert {b.label for b in app.main.button if b.disabled} == {"Measure speed", "Write and verify"}


def test_the_network_is_that_of_the_controls(jobs):
    app = made(open_export(sparsity="50", round_to="8", export_merge="drop"), jobs)
    model = itf.load_model("digits-mlp")
    small = itf.prune(model, model.card.example(), 0.5, merge="drop", round_to=8)
    shown = rows(app, 0)
    accuracy = itf.evaluate(small, itf.load_data("digits"), limit=500).accuracy
    assert shown["accuracy"][1].startswith(f"{accuracy:.1%} ± ")
    assert shown["parameters"][1] == f"{sum(p.numel() for p in small.parameters()):,}"
    assert "--round-to 8" in next(code.value for code in app.code if code.value.startswith("python -m"))


def test_files_are_verified_and_offered_and_speed_is_told(jobs, capsys):
    app = finished(press(made(open_export(), jobs), "Compute remaining"), jobs)
    shown = rows(app, 2)
    assert list(shown) == list(FORMATS)
    assert all(float(cells[2]) <= 1e-4 for cells in shown.values())
    labels = [button.label for button in app.main.get("download_button")]
    files = [file for kind in FORMATS.values() for file in kind.files]
    assert labels == ["Download all (ZIP)", *files, "report.html", "Data as CSV"]
    told = [one.value for one in (*app.warning, *app.success)]
    assert len(told) == 1
    assert re.search(r"at batch 1; .* at batch (64|128)\.$", told[0])
    assert ("Smaller but not faster" in told[0]) == bool(app.warning)
    line = next(code.value for code in app.code if code.value.startswith("python -m intrafusion prune"))
    assert line.endswith("--out digits-mlp-fusion-30 --speed")
    again = open_export()
    assert rows(again, 2) == shown
    assert jobs.queue() == []


def test_the_shelf_goes_with_what_holds_it(jobs, tmp_path):
    (made,) = _making()
    *_, found = export.shelved(made, ["safetensors"])
    folder = found.result.shelf.path
    report = export.Report(made, found.result.files)
    packed = zipfile.ZipFile(io.BytesIO(archive(report, folder)))
    (tmp_path / "model.safetensors").write_bytes(packed.read("model.safetensors"))
    (tmp_path / "model.json").write_bytes(packed.read("model.json"))
    assert itf.load_model("digits-mlp", weights=tmp_path / "model.safetensors").card.accuracy == made.result.accuracy
    assert folder.exists()
    del found, report, _
    assert not folder.exists()


def _making():
    from intrafusion.reporting import making
    from intrafusion.studies.session import open_session

    spec = itf.PruneSpec(model="digits-mlp", limit=50)
    return (told.result for told in making(spec, open_session(spec)) if told.result)


def test_a_network_can_be_kept(jobs):
    app = made(open_export(), jobs)
    next(field for field in app.text_input if field.label.startswith("Save")).set_value("slim")
    next(button for button in app.button if button.label == "Save").click().run()
    assert "kept/slim" in app.success[0].value
    assert itf.load_model("kept/slim").card.dataset == "digits"


def test_the_command_line_makes_the_same(jobs, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = made(open_export(sparsity="40"), jobs)
    line = next(code.value for code in app.code if code.value.startswith("python -m intrafusion prune"))
    assert main.main([*shlex.split(line)[3:], "--formats", "safetensors", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert rows(app, 0)["accuracy"][1].startswith(f"{row['accuracy']:.1%} ± ")


def test_a_link_from_the_sensitivity_page_carries_sparsities():
    spec = itf.PruneSpec(model="digits-mlp", groups=("1", "3"), sparsities=(0.25, 0.5), merge="drop")
    with_sidebar = QUICK | {k: v for k, v in export.query(spec).items() if k != "model"}
    app = open_page("export", **with_sidebar)
    assert not app.exception
    line = next(code.value for code in app.code if code.value.startswith("python -m"))
    assert "--groups 1 3" in line
    assert "--sparsities 0.25 0.5" in line
    link = next(code.value for code in app.code if code.value.startswith("http"))
    again = open_page("export", **dict(parse_qsl(urlsplit(link).query)))
    assert again.text_input(key="export_sparsities").value == "1=0.25 3=0.5"


@pytest.mark.parametrize(
    ("query", "words"),
    [("export_sparsities=1:0.5", "write conv1=0.1"), ("export_sparsities=1=2", "at least 0 and less than 1"),
     ("export_sparsities=nowhere=0.5", "'nowhere'"), ("export_sparsities=1=nan", "at least 0 and less than 1")],
)  # fmt: skip
def test_sparsities_that_make_no_sense_are_one_line(query, words):
    name, _, value = query.partition("=")
    app = open_export(**{name: value})
    assert [words in one.value for one in app.warning] == [True]


@pytest.mark.parametrize("query", ["sparsity=900", "round_to=3", "export_merge=melt", "formats=tflite", "export_limit=0"])
def test_a_link_with_nonsense_opens(query):
    name, _, value = query.partition("=")
    assert "Export" in text(open_export(**{name: value}))


def test_without_images_the_network_can_be_made(jobs):
    app = open_page("export", model="cifar10-resnet20", weights="random", export_merge="drop")
    assert not app.exception
    assert "its accuracy is not measured" in text(app)
    app = made(app, jobs)
    assert "accuracy" not in rows(app, 0)
