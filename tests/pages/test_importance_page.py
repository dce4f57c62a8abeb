import contextlib
import io
import json
import re
import time
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from opening import open_page, text
from streamlit.testing.v1 import AppTest

import intrafusion as itf
from intrafusion.evaluation.attribution import METHODS, activations_of_channels, top_images
from intrafusion.pruning.agreement import compare_criteria
from intrafusion.studies.session import Session, open_session
from pages.panels.importance import FORMULAS, PASSES, default_criteria, duration

CRITERIA = itf.registry("criterion")


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session("digits-resnet")


def group_of(session: Session, name: str = "layer2.0.conv1"):
    return next(group for group in session.groups if group.name == name)


def open_importance(**query) -> AppTest:
    app = open_page("importance", **query)
    assert not app.exception
    return app


def figures(app: AppTest) -> dict[str, dict]:
    """The page's pictures by title."""
    specs = [json.loads(element.proto.spec) for element in app.get("plotly_chart")]
    return {spec["layout"]["title"]["text"]: spec for spec in specs}


def picture(app: AppTest, says: str) -> dict:
    return next(spec for title, spec in figures(app).items() if says in title)


def matrix(app: AppTest) -> dict:
    return picture(app, "by chance")


@pytest.mark.parametrize("model", ["digits-mlp", "digits-vgg", "digits-resnet"])
def test_everything_is_there_on_every_embedded_digits_model(model):
    app = open_importance(model=model)
    assert not app.error
    assert not app.info
    assert [element.value for element in app.subheader][:2] == ["Criteria side by side", "Agreement between criteria"]
    titles = " | ".join(figures(app))
    for words in ("are kept", "criteria keep", "agree least", "with the highest activation", "activation"):
        assert words in titles
    assert app.dataframe[0].value["criterion"][0] == "l1"
    assert "taylor, relative: scored on 512 training images" in text(app)
    assert ("bn_scale** cannot score this group" in text(app)) == (model == "digits-mlp")


def test_the_matrix_shows_what_the_library_computes(session):
    app = open_importance(criterion="taylor", compare=["l1", "chip", "random"], sparsity="40")
    group, data = group_of(session), itf.load_calibration("digits")
    scores = {
        name: itf.score(session.model, group, name, None if CRITERIA[name].needs == "nothing" else data)
        for name in ("taylor", "l1", "chip", "random")
    }
    made = compare_criteria(scores, group, 0.4)
    upper, lower = matrix(app)["data"]
    for a in range(4):
        for b in range(a + 1, 4):
            assert upper["text"][a][b] == f"{made.spearman[a, b]:.2f}".replace("-", "−")
            assert lower["text"][b][a] == f"{made.overlap[a, b]:.0%}"
    rows = app.dataframe[0].value
    assert list(rows["criterion"]) == list(scores)
    assert list(rows["kept in common with taylor"]) == [
        f"{made.shared(0, i)} of {made.k}, {made.overlap[0, i]:.0%}" for i in range(4)
    ]


def test_the_channel_box_changes_the_story_the_images_and_the_attribution(session):
    app = open_importance(channel="3")
    group, data = group_of(session), itf.load_calibration("digits")
    values = np.concatenate(list(activations_of_channels(session.model, group, data)))
    for channel in (3, 21):
        app.number_input(key="channel").set_value(channel).run()
        assert f"Channel {channel} ranks" in text(app)
        top = top_images(torch.from_numpy(values[:, channel]), 8)
        captions = [note["text"] for note in picture(app, "with the highest activation")["layout"]["annotations"]]
        assert captions == [f"{data.classes[data.labels[i]]}<br>{values[i, channel]:#.3g}" for i in top]
        assert picture(app, f"Channel {channel} on “{data.classes[data.labels[top[0]]]}”")


@pytest.mark.parametrize("method", METHODS)
def test_every_attribution_says_what_it_means(method):
    app = open_importance(attribution=method, image="2")
    assert f"**{method}** shows {METHODS[method].summary}" in text(app)
    spec = picture(app, "on “")
    assert method in [note["text"] for note in spec["layout"]["annotations"]]
    assert spec["data"][-1]["zmax"] > 0


def test_ranks_and_scores_are_two_views():
    app = open_importance()
    before = picture(app, "criteria keep")["data"][0]
    app.segmented_control(key="cells").set_value("scores").run()
    assert picture(app, "criteria keep")["data"][0] != before


def test_nothing_pruned_is_said():
    app = open_importance(sparsity="0")
    assert not app.error
    assert any("Nothing is pruned at this sparsity, so every criterion" in title for title in figures(app))


@pytest.mark.parametrize(
    "query",
    [
        {"compare": "nonsense"},
        {"compare": ["l2", "nonsense"]},
        {"cells": "nonsense"},
        {"image": "99"},
        {"image": "-1"},
        {"image": "a"},
        {"attribution": "nonsense"},
        {"order": "index"},
        {"channel": "9999"},
    ],
)
def test_a_bad_link_falls_back(query):
    app = open_importance(**query)
    assert not app.error
    assert "With fusion" in text(app)
    assert matrix(app)


def test_a_permalink_restores_the_page():
    app = open_importance()
    app.multiselect(key="compare").set_value(["hrank", "fpgm"])
    app.segmented_control(key="cells").set_value("scores")
    app.segmented_control(key="attribution").set_value("gradient")
    app.segmented_control(key="image").set_value(5)
    app.number_input(key="channel").set_value(3).run()
    link = next(code.value for code in app.code if code.value.startswith("http"))
    again = open_importance(**parse_qs(urlsplit(link).query))
    assert figures(again) == figures(app)
    assert [m.value for m in again.markdown] == [m.value for m in app.markdown]


def test_without_its_images_cifar_shows_what_weights_say(monkeypatch, tmp_path):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
    app = open_importance(model="cifar10-resnet20")
    assert not app.error
    assert matrix(app)
    assert "Scored on weights only" in text(app)
    assert "not on this machine yet" in app.info[0].value  # only for the channel's images, below the criteria
    assert [button.label for button in app.button] == ["Download CIFAR-10 (170 MB)"]


def test_a_criterion_that_needs_missing_images_waits_for_them_and_the_others_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
    app = open_importance(model="cifar10-resnet20", criterion="taylor", compare=["l1", "fpgm"])
    assert "not on this machine yet" in app.info[0].value
    assert "no taylor scores: needs images, which are not available. The figures show **l1**" in app.info[1].value
    assert [button.label for button in app.button] == ["Download CIFAR-10 (170 MB)"]
    assert matrix(app)
    assert "needs images" in json.dumps(picture(app, "criteria keep")["layout"])


def test_a_criterion_that_cannot_score_says_so_and_the_others_stay():
    app = open_importance(model="digits-mlp", criterion="bn_scale", compare="bn_scale")
    assert "needs a BatchNorm" in app.info[0].value
    assert "show **l1** instead" in app.info[0].value
    assert "l1 keeps" in " ".join(figures(app))


def test_dear_criteria_wait_to_be_asked_and_arrive_by_a_job(monkeypatch):
    monkeypatch.setattr("pages.shared.job_panel.CHEAP", 1e9)
    app = open_importance(model="digits-vgg", group="features.14", compare=["l2", "hrank", "relative"])
    assert list(app.dataframe[0].value["criterion"]) == ["l1", "l2"]
    (button,) = [button for button in app.button if button.label.endswith("more criteria")]
    assert button.label == "Compute 2 more criteria"
    assert "Not computed yet: hrank, relative" in text(app)
    button.click().run()
    deadline = time.monotonic() + 240
    while len(app.dataframe[0].value) < 4 and time.monotonic() < deadline:
        time.sleep(0.3)
        app.run()
    assert not app.exception
    assert list(app.dataframe[0].value["criterion"]) == ["l1", "l2", "hrank", "relative"]
    assert not [button for button in app.button if button.label.endswith("more criteria")]


def test_showing_many_images_to_a_large_network_waits_to_be_asked(monkeypatch):
    monkeypatch.setattr("pages.shared.job_panel.CHEAP", 1e6)
    app = open_importance(model="digits-vgg", group="features.17", compare="l1")
    labels = [button.label for button in app.button]
    assert labels == ["Compute activations"]
    app.button[0].click().run()
    deadline = time.monotonic() + 240
    while "Compute integrated-gradients" not in [b.label for b in app.button] and time.monotonic() < deadline:
        time.sleep(0.3)
        app.run()
    assert any("with the highest activation" in title for title in figures(app))
    next(button for button in app.button if button.label == "Compute integrated-gradients").click().run()
    while not any("on “" in title for title in figures(app)) and time.monotonic() < deadline:
        time.sleep(0.3)
        app.run()
    assert picture(app, "on “")


def test_the_snippet_on_the_page_runs_and_prints_its_scores():
    app = open_importance(compare=["hrank"])
    snippet = next(code.value for code in app.code if code.value.startswith("import intrafusion"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet, {})
    assert re.findall(r"^(\w+) tensor", printed.getvalue(), re.M) == ["l1", "hrank"]
    assert any(code.value.startswith("python -m intrafusion scores") for code in app.code)


def test_every_criterion_has_its_formula_and_its_cost():
    assert set(FORMULAS) == set(CRITERIA)
    assert set(PASSES) == {name for name, entry in CRITERIA.items() if entry.needs != "nothing"}
    assert set(default_criteria("digits")) <= set(CRITERIA)
    assert all(CRITERIA[name].needs == "nothing" for name in default_criteria("cifar10"))


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0002, "under 1 ms"), (0.02, "20 ms"), (3.21, "3.2 s"), (89.9, "89.9 s"), (300, "5.0 min")]
)
def test_times_are_in_human_units(seconds, words):
    assert duration(seconds) == words
