import time
from urllib.parse import parse_qsl, urlsplit

import pytest
from opening import finished, open_page, press, text

from pages.shared import background_jobs

PAGES = ["overview", "importance", "transport", "curves"]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("model", ["digits-mlp", "digits-vgg", "digits-resnet"])
def test_every_page_opens_on_every_embedded_digits_model(page, model):
    app = open_page(page, model=model)
    assert not app.exception
    assert not app.error
    assert app.title[0].value == page.capitalize()
    assert model in text(app)
    assert "Share and reproduce" in text(app)


@pytest.mark.parametrize("page", ["overview", "importance", "transport"])
def test_the_embedded_cifar_network_shows_without_any_download(page, monkeypatch, tmp_path):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
    app = open_page(page, model="cifar10-resnet20")
    assert not app.exception
    assert not app.error
    assert "Share and reproduce" in text(app)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [*PAGES, "sensitivity", "recovery", "landscape", "training_lab", "export"])
def test_every_page_opens_on_an_accelerator(page):
    app = finished(open_page(page, model="digits-vgg"), background_jobs.jobs())
    assert app.selectbox(key="device").value == "cuda:0"
    assert not app.error


@pytest.mark.gpu
def test_the_device_of_a_link_is_taken_and_another_falls_back_to_the_fastest():
    assert open_page("overview", device="cpu").selectbox(key="device").value == "cpu"
    assert open_page("overview", device="cuda:7").selectbox(key="device").value == "cuda:0"


def test_overview_says_what_is_coupled_and_what_cannot_be_pruned():
    table = open_page("overview").dataframe[0].value
    assert list(table["channels"]) == [16, 16, 16, 32, 32, 32, 64, 64, 64, 10]
    assert "summed" in table["why"][0]
    assert table["why"].iloc[-1] == "these channels are the network's outputs"


def test_overview_measures_the_dense_accuracy_that_the_card_claims():
    app = open_page("overview")
    claimed = app.metric[2].value
    app = finished(press(app, "Measure accuracy"), background_jobs.jobs())
    assert app.metric[4].value.split("%")[0] == claimed.split("%")[0]


def test_moving_the_sparsity_changes_what_goes():
    app = open_page("transport")
    before = text(app)
    app.slider(key="sparsity").set_value(60).run()
    assert "sparsity=0.6" in text(app)
    assert before != text(app)
    app.slider(key="sparsity").set_value(0).run()
    assert "It is kept unchanged" in text(app)


def test_curves_draw_themselves_for_the_embedded_default_and_finish():
    app = open_page("curves", sparsities="30")
    deadline = time.monotonic() + 240
    while not (app.dataframe and list(app.dataframe[0].value["count"]) == [597, 597]) and time.monotonic() < deadline:
        time.sleep(0.3)
        app.run()
    rows = app.dataframe[0].value
    assert set(rows["merge"]) == {"drop", "fusion"}
    accuracy = rows.set_index("merge")["accuracy"]
    assert accuracy["fusion"] > accuracy["drop"] + 0.1
    assert list(rows["count"]) == [597, 597]


def test_an_empty_choice_says_what_to_choose():
    app = open_page("curves")
    app.multiselect(key="merges").set_value([]).run()
    assert "Choose at least one merge" in app.info[0].value


def test_a_permalink_restores_the_page():
    app = open_page("transport")
    app.slider(key="sparsity").set_value(55)
    app.selectbox(key="group").set_value("layer3.1.conv1")
    app.selectbox(key="source").set_value("importance")
    app.run()
    app.number_input(key="channel").set_value(3).run()
    link = next(c.value for c in app.code if c.value.startswith("http"))
    again = open_page("transport", **dict(parse_qsl(urlsplit(link).query)))
    assert again.slider(key="sparsity").value == 55
    assert again.selectbox(key="group").value == "layer3.1.conv1"
    assert again.number_input(key="channel").value == 3
    assert [m.value for m in again.main.markdown] == [m.value for m in app.main.markdown]


@pytest.mark.parametrize(
    "query",
    [
        {"model": "nonsense"},
        {"group": "nonsense"},
        {"sparsity": "900"},
        {"sparsity": "abc"},
        {"channel": "9999"},
        {"channel": "-3"},
        {"criterion": "<script>"},
        {"view": "nonsense"},
        {"device": "cuda:7"},
        {"unknown": "1"},
    ],
)
def test_a_bad_link_falls_back_to_defaults(query):
    app = open_page("transport", **query)
    assert not app.exception
    assert not app.error
    assert "With fusion" in text(app)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"weights": "/nowhere/weights.pt"}, "no file at /nowhere/weights.pt"),
        ({"weights": "notes.txt"}, "no file at notes.txt"),
    ],
)
@pytest.mark.parametrize("page", PAGES)
def test_bad_weights_give_one_line(page, query, says):
    app = open_page(page, **query)
    assert not app.exception
    assert says in app.error[0].value
    assert "\n" not in app.error[0].value


def test_missing_cifar_images_offer_a_download_and_a_path(monkeypatch, tmp_path):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
    app = open_page("curves", model="cifar10-resnet20", weights="random")
    assert not app.exception
    assert "not on this machine yet" in app.info[0].value
    assert [b.label for b in app.button] == ["Download CIFAR-10 (170 MB)"]


def test_missing_weights_offer_a_download(monkeypatch, tmp_path):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
    app = open_page("overview", model="cifar10-resnet56")
    assert not app.exception
    assert "published weights" in text(app)
    assert [b.label for b in app.button] == ["Download weights of cifar10-resnet56"]


def test_curves_take_the_transport_knobs():
    app = open_page("curves", solver="sinkhorn", reg="0.1", distance="cosine", sparsities="30")
    assert not app.exception
    assert "--solver sinkhorn --reg 0.1" in text(app)
    assert "--distance cosine" in text(app)


@pytest.mark.parametrize(
    ("page", "key"),
    [("curves", "merges"), ("sensitivity", "study_merges"), ("recovery", "recovery_merge"), ("export", "export_merge")],
)
def test_what_folding_sees_of_norms_is_chosen_where_something_is_folded(page, key):
    folds, drops = (open_page(page, model="digits-mlp", fold_norms="columns", **{key: merge}) for merge in ("fold", "drop"))
    assert not folds.exception
    assert not drops.exception
    assert "--fold-norms columns" in text(folds)
    assert "fold-norms" not in text(drops)
    assert [box.label for box in folds.selectbox if box.key == "fold_norms"] == ["BatchNorm in folding"]
    assert not [box for box in drops.selectbox if box.key == "fold_norms"]


def test_curves_of_criteria_that_look_at_images_wait_to_be_asked():
    app = open_page("curves", criteria="taylor", sparsities="30")
    assert not app.exception
    assert "not computed yet" in app.get("progress")[0].proto.text
    assert "Press *Compute curves*" in text(app)
    app.button[0].click().run()
    deadline = time.monotonic() + 240
    while not (app.dataframe and len(app.dataframe[0].value) == 2) and time.monotonic() < deadline:
        time.sleep(0.3)
        app.run()
    assert set(app.dataframe[0].value["criterion"]) == {"taylor"}


@pytest.mark.parametrize("page", ["overview", "importance", "transport"])
def test_every_page_about_channels_leads_to_the_lesson(page):
    app = open_page(page)
    assert not app.exception
    assert any("learn" in link.proto.page for link in app.get("page_link"))
