import contextlib
import io
import json
import shlex
import time

import pytest
from opening import open_page, text
from streamlit.testing.v1 import AppTest

import intrafusion as itf
from intrafusion._registry import RECOVERIES
from intrafusion.cli import main
from pages.panels import recovery

pytestmark = pytest.mark.usefixtures("jobs")

QUICK = {"training": "1000", "epochs": "1", "rate": "0.05", "recovery_limit": "500", "equal": "false"}
PATIENCE = 240


def open_recovery(**query) -> AppTest:
    app = open_page("recovery", **(QUICK | query))
    assert not app.exception
    return app


def recovered(app: AppTest) -> AppTest:
    """Ask, and wait for the end."""
    next(button for button in app.main.button if button.label == "Recover").click().run()
    deadline = time.monotonic() + PATIENCE
    while not any(" points on " in bar.proto.text and "done" in bar.proto.text for bar in app.main.get("progress")):
        assert time.monotonic() < deadline, text(app)
        time.sleep(0.2)
        app.run()
    assert not app.exception
    return app


def answer(app: AppTest) -> dict[str, dict[str, str]]:
    return app.dataframe[0].value.set_index("recovery").to_dict("index")


def test_nothing_is_trained_before_it_is_asked(jobs):
    app = open_recovery()
    assert jobs.queue() == []
    assert "Press *Recover*" in text(app)
    assert not app.dataframe


def test_methods_side_by_side_and_a_second_reader_finds_them(jobs):
    app = recovered(open_recovery(methods=["none", "bn-reset", "perp", "overparam-sp"], equal="true"))
    found = answer(app)
    assert list(found) == ["none", "bn-reset", "perp", "overparam-sp"]
    share = {name: float(row["accuracy"].split("%")[0]) for name, row in found.items()}
    assert share["none"] < share["bn-reset"] < max(share["perp"], share["overparam-sp"])
    assert (found["none"]["precision, device"], found["perp"]["precision, device"]) == ("–", "fp32 on cpu")
    assert found["none"]["trainable parameters"] == found["bn-reset"]["trainable parameters"] == "–"
    assert int(found["overparam-sp"]["trainable parameters"].replace(",", "")) > 100 * int(
        found["perp"]["trainable parameters"]
    )
    assert "%" in found["overparam-sp"]["at equal compute"]
    assert found["perp"]["at equal compute"] == "–"
    assert "Similarity of images" in text(app)
    assert "reconstructed" in text(app)
    jobs.stop(10)
    jobs._jobs.clear()
    again = open_recovery(methods=["none", "bn-reset", "perp", "overparam-sp"], equal="true")
    assert answer(again) == found
    assert next(b for b in again.main.button if b.label == "Recover").disabled


def test_a_network_without_norms_is_offered_what_it_can_do():
    app = open_recovery(model="digits-mlp")
    assert next(m for m in app.multiselect if m.key == "methods").value == recovery._DEFAULT_PLAIN


def test_what_cannot_be_done_is_one_line():
    app = recovered(open_recovery(model="digits-mlp", methods=["none", "bn-reset"]))
    assert [one for one in app.warning if "this network has no BatchNorm" in one.value]
    assert "none" in answer(app)


def test_without_a_method_one_line():
    app = open_recovery()
    next(m for m in app.multiselect if m.key == "methods").set_value([]).run()
    assert [info.value for info in app.info] == ["Choose at least one recovery method."]


def test_several_seeds_are_several_specs():
    base = itf.PruneSpec()
    specs = recovery.specs(base, ["none", "perp", "overparam"], 2, True)
    assert len(specs) == len(set(specs)) == 8
    assert {spec.budget for spec in specs if spec.recovery == "perp"} == {"epochs"}
    assert {spec.budget for spec in specs if spec.recovery == "overparam"} == {"epochs", "compute"}


def test_the_snippet_and_the_command_line_run(capsys):
    app = open_recovery(methods=["perp-head"], model="digits-mlp")
    snippet = next(code.value for code in app.code if code.value.startswith("import intrafusion"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet, {})
    shown = float(printed.getvalue().splitlines()[-1])
    line = next(code.value for code in app.code if code.value.startswith("python -m intrafusion sweep"))
    main.main([*shlex.split(line)[3:], "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["accuracy"] == pytest.approx(shown)
    assert result["recovery"] == "perp-head"


@pytest.mark.parametrize("key", ["methods=hope", "epochs=-3", "rate=abc", "training=0", "gamma=1e99", "seeds=9"])
def test_a_link_with_nonsense_opens(key):
    name, _, value = key.partition("=")
    assert "Recovery" in text(open_recovery(**{name: value}))


def test_every_recovery_can_be_chosen():
    assert list(next(m for m in open_recovery().multiselect if m.key == "methods").options) == list(RECOVERIES)
