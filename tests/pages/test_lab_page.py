"""The Training lab: nothing unasked, a run to its end, stopping and going on, keeping, and what a bad setting says."""

import contextlib
import io
import json
import shlex
import time

import pytest
from opening import open_page, text
from streamlit.testing.v1 import AppTest

import intrafusion as itf
from intrafusion._registry import TRAINERS
from intrafusion.cli import main
from intrafusion.training.methods.runs import runs
from pages.panels import training_lab

pytestmark = pytest.mark.usefixtures("jobs")

QUICK = {"model": "digits-mlp", "method": "sgd", "lab_training": "1000", "lab_epochs": "2"}
PATIENCE = 240


def open_lab(**query) -> AppTest:
    app = open_page("training_lab", **(QUICK | query))
    assert not app.exception
    return app


def press(app: AppTest, label: str) -> None:
    next(button for button in app.main.button if button.label == label).click().run()


def trained(app: AppTest) -> AppTest:
    press(app, "Train" if any(b.label == "Train" for b in app.main.button) else "Continue")
    deadline = time.monotonic() + PATIENCE
    while not any("trained in" in bar.proto.text for bar in app.main.get("progress")):
        assert time.monotonic() < deadline, text(app)
        time.sleep(0.2)
        app.run()
    assert not app.exception
    return app


@pytest.mark.parametrize("method", list(TRAINERS))
def test_every_method_shows_its_knobs_and_trains_nothing_unasked(method, jobs):
    app = open_lab(method=method)
    assert jobs.queue() == []
    assert "Press *Train*" in text(app)
    keys = {element.key for kind in (app.main.number_input, app.main.selectbox) for element in kind}
    entry = TRAINERS[method]
    assert {f"lab_{knob}" for knob in entry.knobs} <= keys
    assert entry.told in text(app)
    assert entry.differs in text(app)
    assert f"- **{method}**: {entry.told}" in app.main.selectbox(key="method").help


def test_missing_images_can_be_fetched():
    app = open_lab(model="cifar10-conv2")
    assert [b.label for b in app.main.button] == ["Download CIFAR-10 (170 MB)"]
    assert not app.error


def test_a_run_to_its_end_is_found_again_and_can_be_kept():
    app = trained(open_lab())
    assert app.metric[0].label == "Top-1 accuracy"
    assert app.metric[0].value.startswith(f"{runs()[0].outcome.accuracy:.1%}")
    assert not app.exception
    again = open_lab()
    assert next(button for button in again.main.button if button.label == "Train").disabled
    again.main.text_input[-1].set_value("no name!")
    press(again, "Save")
    assert "invalid name" in text(again)
    again.main.text_input[-1].set_value("mine")
    press(again, "Save")
    assert not again.error
    assert itf.load_model("kept/mine").card.dataset == "digits"
    overview = open_page("overview", model="kept/mine")
    assert not overview.exception
    assert not overview.error


def test_a_stopped_run_goes_on(jobs):
    app = open_lab(lab_epochs="60")
    press(app, "Train")
    deadline = time.monotonic() + PATIENCE
    while not any(job.results for job in jobs.queue()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    jobs.queue()[0].cancel()
    while jobs.queue():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    app.run()
    assert any("stopped" in bar.proto.text for bar in app.main.get("progress"))
    assert any(button.label == "Continue" for button in app.main.button)
    before = next(job for job in jobs._jobs.values()).results
    trained(app)
    assert [step.moment.loss for step in runs()[0].steps[: len(before)]] == [step.moment.loss for step in before]


def test_the_command_line_makes_the_same_run():
    app = trained(open_lab(method="edge-popup", lab_epochs="1"))
    line = next(code.value for code in app.code if "intrafusion lab" in code.value)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main.main([*shlex.split(line)[3:], "--json"]) == 0
    assert json.loads(out.getvalue().splitlines()[-1])["accuracy"] == runs()[0].outcome.accuracy
    assert len(runs()) == 1


def test_missing_images_are_said():
    app = open_lab(model="cifar10-resnet20", data_path="/nowhere/cifar10_test.npz")
    assert "/nowhere" in text(app)


def test_runs_are_named_by_what_sets_them_apart():
    from intrafusion.training.methods.spec import TrainSpec

    specs = [TrainSpec(method="sdprun"), TrainSpec(method="sdprun", reach=2.0), TrainSpec(method="sgd")]
    assert training_lab.names_of(specs) == ["sdprun (reach 1.4)", "sdprun (reach 2.0)", "sgd"]
