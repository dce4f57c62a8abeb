import contextlib
import io
import json
import re
import shlex
import time
from urllib.parse import parse_qsl, urlsplit

import pytest
from opening import PATIENCE, finished, open_page, press, text
from streamlit.testing.v1 import AppTest

import intrafusion as itf
from intrafusion.cli import main
from intrafusion.studies.weight_space import MERGED

pytestmark = pytest.mark.usefixtures("jobs")

QUICK = {
    "model": "digits-mlp",
    "landscape_limit": "100",
    "landscape_size": "9",
    "path_training": "1000",
    "path_epochs": "1",
}


def open_landscape(**query) -> AppTest:
    app = open_page("landscape", **(QUICK | query))
    assert not app.exception
    return app


def titles(app: AppTest) -> list[str]:
    """The titles of the charts, from top to bottom."""
    return [json.loads(chart.proto.spec)["layout"]["title"]["text"] for chart in app.main.get("plotly_chart")]


def test_nothing_is_computed_before_it_is_asked(jobs):
    app = open_landscape()
    assert jobs.queue() == []
    assert text(app).count("Not computed yet.") == 4
    assert len(titles(app)) == 5  # the pictures' places are kept
    assert "Share and reproduce" in text(app)


def test_all_four_are_computed_and_a_second_reader_finds_them(jobs):
    app = finished(press(open_landscape(), "Compute all"), jobs)
    found = titles(app)
    model, data = itf.load_model("digits-mlp"), itf.load_data("digits")
    measured = {"dense": itf.evaluate(model, data, limit=100).accuracy} | {
        name: itf.evaluate(itf.prune(model, model.card.example(), 0.3, merge=MERGED[name]), data, limit=100).accuracy
        for name in ("dropped", "fused")
    }
    shown = dict(zip(("fused", "dropped", "dense"), re.findall(r"[\d.]+%", found[0]), strict=True))
    assert shown == {name: f"{accuracy:.1%}" for name, accuracy in measured.items()}
    table = app.dataframe[0].value.set_index("network")
    assert [cell.split()[0] for cell in table["accuracy"]] == [f"{measured[name]:.1%}" for name in table.index]
    assert "move" in found[1]
    assert "on average along a trained path" in found[-2]
    assert found[-1].startswith("Share in the 10 sharpest directions: dropping")
    assert "BatchNorm is folded or absent" in text(app)
    assert "100% of the grid" in text(app)
    labels = [button.label for button in app.main.get("download_button")]
    assert labels == ["Data as CSV", "Path as CSV", "Directions as CSV", "Outputs as CSV"]
    assert next(b for b in app.main.button if b.label == "All computed").disabled
    again = open_landscape()
    assert titles(again) == found
    assert jobs.queue() == []


def test_changed_images_are_counted_and_shown_by_kind(jobs):
    app = open_landscape(model="digits-resnet", landscape_limit="100")
    finished(press(app, "Compare outputs"), jobs)
    model, data = itf.load_model("digits-resnet"), itf.load_data("digits")
    right = [itf.evaluate(model, data, limit=100).correct] + [
        itf.evaluate(itf.prune(model, model.card.example(), 0.3, merge=merge), data, limit=100).correct
        for merge in ("drop", "fusion")
    ]
    kinds = next(c for c in app.segmented_control if c.key == "changed")
    saved = int((right[0] & ~right[1] & right[2]).sum())
    assert f"fusion keeps: {saved}" in text(app)
    assert any(one.startswith(f"{saved} of ") for one in titles(app))
    other = next(one for one in ("both lose", "only fusion loses") if any(o.startswith(one) for o in kinds.options))
    kinds.set_value(other).run()
    assert not app.exception
    assert not any(one.startswith(f"{saved} of ") for one in titles(app))


def test_only_what_a_setting_touches_is_computed_again(jobs):
    app = finished(press(open_landscape(), "Compute all"), jobs)
    app.selectbox(key="path_to").set_value("refit").run()
    labels = ("Compute plane", "Compare outputs", "Train path", "Find directions")
    assert [b.label for b in app.main.button if b.label in labels and not b.disabled] == ["Train path"]
    before = titles(app)[0]
    app = finished(press(app, "Compute remaining"), jobs)
    assert titles(app)[0] == before
    assert titles(app)[-2].startswith("From dense to refit: ")


def test_a_cancelled_plane_keeps_its_marks_and_can_be_asked_again(jobs):
    app = press(open_landscape(model="digits-resnet", landscape_limit="all", landscape_size="33"), "Compute plane")
    deadline = time.monotonic() + PATIENCE
    while not jobs.queue()[0].results and time.monotonic() < deadline:
        time.sleep(0.1)
    jobs.queue()[0].cancel()
    app = finished(app, jobs)
    assert titles(app)[0].startswith("Fused ")
    assert [b.label for b in app.main.button if b.label.endswith("again")] == ["Compute plane again"]


def test_a_path_to_itself_is_one_line(jobs):
    app = finished(press(open_landscape(path_to="dense"), "Train path"), jobs)
    assert ["same network" in one.value for one in app.warning] == [True]


def test_a_single_group_and_the_loss(jobs):
    app = finished(press(open_landscape(landscape_scope="this group", group="1", shown="loss"), "Compute plane"), jobs)
    spec = json.loads(app.main.get("plotly_chart")[0].proto.spec)
    contour = next(trace for trace in spec["data"] if trace["type"] == "contour")
    assert contour["colorbar"]["title"]["text"] == "loss, nats"
    assert "--groups 1" in next(code.value for code in app.code if code.value.startswith("python -m"))


def test_the_command_line_and_the_snippet_say_what_the_page_says(jobs, capsys):
    app = finished(press(open_landscape(sparsity="50"), "Compute plane"), jobs)
    shown = re.findall(r"[\d.]+%", titles(app)[0])
    line = next(code.value for code in app.code if code.value.startswith("python -m intrafusion landscape"))
    main.main([*shlex.split(line)[3:], "--json"])
    marks = [json.loads(row) for row in capsys.readouterr().out.splitlines()][:3]
    assert [f"{marks[place]['accuracy']:.1%}" for place in (2, 1, 0)] == shown
    snippet = next(code.value for code in app.code if code.value.startswith("import intrafusion"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet, {})
    assert [f"{float(row.split()[1]):.1%}" for row in printed.getvalue().splitlines()[-3:]][::-1] == shown


def test_a_permalink_restores_the_page():
    app = open_landscape(sparsity="45", path_from="fused", path_to="calibrated", shown="loss", source="importance")
    link = next(code.value for code in app.code if code.value.startswith("http"))
    again = open_page("landscape", **dict(parse_qsl(urlsplit(link).query)))
    assert again.slider(key="sparsity").value == 45
    assert (again.selectbox(key="path_from").value, again.selectbox(key="path_to").value) == ("fused", "calibrated")
    assert again.selectbox(key="source").value == "importance"
    assert [m.value for m in again.markdown] == [m.value for m in app.markdown]


@pytest.mark.parametrize(
    "key",
    ["sparsity=900", "landscape_limit=0", "landscape_size=-1", "shown=colour", "path_to=nowhere", "path_rate=nan", "changed=1"],
)  # fmt: skip
def test_a_link_with_nonsense_opens(key):
    name, _, value = key.partition("=")
    assert "Landscape" in text(open_landscape(**{name: value}))


def test_missing_images_offer_a_download(monkeypatch, tmp_path):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
    app = open_page("landscape", model="cifar10-resnet20", weights="random")
    assert not app.exception
    assert "not on this machine yet" in app.info[0].value
