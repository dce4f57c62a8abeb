import re
import time
from urllib.parse import parse_qsl, urlsplit

import pytest
from opening import open_page, text

from intrafusion._registry import SOLVERS
from intrafusion.options import CHOICES

BUTTONS = {"cost", "distance", "view", "arrange", "look", "plane", "b_cost", "b_distance"}


def turn(app, key, value):
    """Set one control, whatever kind it is, and rerun."""
    kind = "button_group" if key in BUTTONS else "toggle" if key == "bias" else "selectbox"
    return getattr(app, kind)(key=key).set_value(value).run()


KNOBS = [
    ("distance", "L2", "p=2.0"), ("distance", "cosine", "distance='cosine'"), ("bias", True, "bias=True"),
    *(("cost", v, f"cost={v!r}") for v in CHOICES["cost"][1:]),
    *((key, v, f"{key}={v!r}") for key in ("source", "target") for v in CHOICES["source"][1:]),
    *(("anchors", v, f"anchors={v!r}") for v in CHOICES["anchors"][1:]),
    *(("solver", v, f"solver={v!r}") for v in list(SOLVERS)[1:]),
    *(("normalise", v, f"normalise={v!r}") for v in CHOICES["normalise"][1:]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "quoted"), KNOBS, ids=lambda v: str(v))
def test_every_transport_knob_reaches_the_plan_and_the_snippet(key, value, quoted):
    app = open_page("transport")
    before = text(app)
    turn(app, key, value)
    assert not app.exception
    assert not app.error
    assert quoted in text(app)
    assert text(app) != before


@pytest.mark.parametrize(("solver", "field", "value"), [
    ("sinkhorn", "reg", 0.1), ("unbalanced", "reg_m", 0.5), ("partial", "mass", 0.5),
])  # fmt: skip
def test_a_solver_brings_its_own_strength(solver, field, value):
    app = open_page("transport", solver=solver)
    cost = app.metric[0].value
    assert [n.key for n in app.number_input] == ["channel", field] or [n.key for n in app.number_input] == [
        field,
        "channel",
    ]
    app.number_input(key=field).set_value(value).run()
    assert f"{field}={value}" in text(app)
    assert app.metric[0].value != cost


def test_a_knob_that_means_nothing_is_left_out():
    app = open_page("transport", cost="activations", bias="true")
    assert not app.error
    assert "bias=True" not in text(app)
    assert app.toggle(key="bias").disabled


def stories(app):
    told = [m.value for m in app.markdown if m.value.startswith(("**With fusion.**", "**With dropping.**"))]
    return dict(zip(("fusion", "drop"), told, strict=True))


def test_a_dropped_channel_tells_where_it_goes():
    app = open_page("transport")
    assert "merged into" in stories(app)["fusion"]
    assert "It is removed" in stories(app)["drop"]


def test_a_kept_channel_tells_what_it_absorbed():
    app = open_page("transport", channel="5")
    assert re.search(r"It is kept, and absorbs channels? 3 \(weight 0\.\d\d\)", stories(app)["fusion"])
    assert "It is kept unchanged" in stories(app)["drop"]


def test_a_channel_whose_mass_is_left_behind_says_so():
    app = open_page("transport", solver="partial", mass="0.6")
    assert not app.exception
    assert "discards its mass" in stories(app)["fusion"]


def test_coupling_and_matrix_are_told_apart_by_this_channels_numbers():
    app = open_page("transport", channel="7")
    words = next(m.value for m in app.markdown if m.value.startswith("Channel 7 has mass"))
    mass, moved = (float(x) for x in re.findall(r"0\.\d{5}", words)[:2])
    weight = float(re.search(r"a weight of (\d\.\d+)", words)[1])
    assert moved / mass == pytest.approx(weight, abs=2e-3)


def test_the_numbers_are_the_plans():
    app = open_page("transport")
    names = {m.label: m for m in app.metric}
    assert list(names) == ["Transport cost", "Mass moved", "Entropy, nats", "Non-zeros", "Output distance"]
    assert names["Mass moved"].value == "31.2%"  # 10 of 32 channels
    assert float(names["Output distance"].value) < float(names["Output distance"].delta.split()[-1])


@pytest.mark.parametrize("look", ["map", "sparsity player", "two settings"])
@pytest.mark.parametrize("model", ["digits-mlp", "digits-vgg", "cifar10-resnet20"])
def test_every_look_opens_on_every_kind_of_network(model, look, monkeypatch, tmp_path):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))  # no CIFAR images
    app = open_page("transport", model=model, look=look)
    assert not app.exception
    assert not app.error
    assert "Share and reproduce" in text(app)
    if model == "cifar10-resnet20" and look == "two settings":  # its default B compares activations
        assert "not on this machine yet" in app.info[0].value


@pytest.mark.parametrize("order", ["importance", "target"])
@pytest.mark.parametrize("view", ["matrix", "cost"])
def test_every_view_in_every_order(view, order):
    app = open_page("transport", view=view, arrange=order)
    assert not app.exception
    assert f"&view={view}&arrange={order}" in text(app)


def test_two_settings_differ_where_they_are_changed():
    app = open_page("transport", look="two settings")
    first = app.dataframe[0].value
    assert first["A"][0] != first["B"][0]
    turn(app, "b_cost", "weights")
    same = app.dataframe[0].value
    assert list(same["A"]) == list(same["B"])
    turn(app, "b_solver", "sinkhorn")
    assert float(app.dataframe[0].value["B"][0]) > float(same["A"][0])


def test_the_tsne_plane():
    app = open_page("transport", plane="tsne")
    assert not app.exception
    assert app.button_group(key="plane").value == "tsne"


def test_a_permalink_restores_every_knob():
    app = open_page("transport", look="two settings", solver="sinkhorn", b_solver="partial")
    for key, value in (("distance", "cosine"), ("source", "importance"), ("arrange", "target"), ("b_distance", "L2")):
        turn(app, key, value)
    app.number_input(key="reg").set_value(0.3).run()
    app.number_input(key="b_mass").set_value(0.4).run()
    link = next(c.value for c in app.code if c.value.startswith("http"))
    again = open_page("transport", **dict(parse_qsl(urlsplit(link).query)))
    assert [m.value for m in again.metric] == [m.value for m in app.metric]
    assert again.dataframe[0].value.equals(app.dataframe[0].value)
    assert again.number_input(key="reg").value == 0.3
    assert again.button_group(key="arrange").value == "target"


@pytest.mark.parametrize("query", [
    {"solver": "magic"}, {"distance": "L7"}, {"cost": "vibes"}, {"arrange": "chaos"}, {"look": "nowhere"}, {"plane": "umap"},
    {"solver": "sinkhorn", "reg": "-4"}, {"solver": "partial", "mass": "many"}, {"view": "inside"},
], ids=str)  # fmt: skip
def test_a_bad_link_falls_back(query):
    app = open_page("transport", **query)
    assert not app.exception
    assert not app.error
    assert "With fusion" in text(app)


def test_what_needs_images_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
    app = open_page("transport", model="cifar10-resnet20", cost="activations")
    assert not app.exception
    assert "not on this machine yet" in app.info[0].value
    assert "Download CIFAR-10 (170 MB)" in [b.label for b in app.button]


def test_a_dear_output_distance_waits_to_be_asked_and_says_what_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))  # no CIFAR images
    app = open_page("transport", model="cifar10-vgg16_bn", weights="random")
    assert "Output distance" not in [m.label for m in app.metric]
    next(b for b in app.button if b.label == "Measure").click().run()
    deadline = time.monotonic() + 240
    while "no usable cifar10" not in text(app) and time.monotonic() < deadline:
        time.sleep(0.3)
        app.run()
    assert not app.exception
    assert "no usable cifar10" in text(app)
