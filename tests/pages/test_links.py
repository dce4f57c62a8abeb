"""Links of any kind open every page: what a page understands it keeps, and of the rest one line speaks."""

import ast
import functools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from opening import APP, text
from places import ROOT
from streamlit.testing.v1 import AppTest

from intrafusion.runtime.escaping import code
from intrafusion.runtime.jobs import Job, Jobs
from pages.shared import background_jobs
from pages.shared.links import SIDEBAR
from pages.shared.navigation import _PAGES

PAGES = [name for name, _, _ in _PAGES]
SAID = "Invalid settings in this link"
FREE = {
    "weights",
    "data_path",
    "study_name",
    "address",
    "export_sparsities",
    "lesson_changes",
}  # any text, perhaps refused later
EXAMPLES = int(os.environ.get("INTRAFUSION_EXAMPLES", "3"))  # of each page; more find more
ODD = (
    "", " ", "nan", "-0", "1e999", "-inf", "0x10", "1_0", "9" * 400, "-3", "12.5", "true", "None", "null", "[]", "\x00",
    "a\x00b",
    "\u202e", "١٢", "<script>alert(1)</script>", "$\\frac12$", ":smile:", "![](http://x/y.png)", "`", "``` ```",
    "../../etc", "a" * 9000,
    "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "\n\n# x", "%00", "l1,l2", "L1", "📉",
)  # fmt: skip


class Idle(Jobs):
    """Jobs that end at once, with nothing: links are about what pages ask, not about what comes of it."""

    def start(self, key, total, work, *about, **options) -> Job:
        return super().start(key, total, lambda: iter(()), *about, **options)


@pytest.fixture(scope="module", autouse=True)
def idle() -> Iterator[None]:
    made = Idle()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(background_jobs, "jobs", lambda: made)
        yield
    made.stop(10)


def follow(page: str, query: dict[str, str | list[str]]) -> AppTest:
    """A session that a link opens, on its page."""
    app = AppTest.from_file(APP, default_timeout=240)
    app.query_params.update(query)
    app.switch_page(f"pages/{page}.py").run()
    assert not app.exception, [one.value for one in app.exception]
    return app


def notices(app: AppTest) -> list[str]:
    return [one.value for one in app.warning if one.value.startswith(SAID)]


def link_of(app: AppTest) -> dict[str, list[str]]:
    """The parameters of the permalink that a page shows."""
    return parse_qs(urlsplit(next(code.value for code in app.code if code.value.startswith("http"))).query)


@functools.cache
def choices(page: str) -> dict[str, list[str]]:
    """A page's bound widgets, by name: values that each takes."""
    app = follow(page, {})
    named = set(link_of(app)) - FREE - set(SIDEBAR)
    found = {w.key: list(w.options) for kind in (app.selectbox, app.segmented_control, app.multiselect) for w in kind}
    found |= {w.key: [f"{w.min:g}", f"{w.max:g}"] for w in app.slider if not isinstance(w.value, tuple)}
    found |= {w.key: [str(w.value)] for w in app.number_input if w.value is not None}
    found |= {w.key: ["true", "false"] for kind in (app.toggle, app.checkbox) for w in kind}
    return {key: values[:3] for key, values in found.items() if key in named}


@pytest.mark.parametrize("page", PAGES)
def test_a_permalink_of_the_app_is_understood(page):
    """With the settings that a page opens with, and with others."""
    app = follow(page, {})
    assert not notices(app)
    assert not notices(follow(page, link_of(app)))
    other = {key: values[-1] for key, values in choices(page).items() if key not in ("criterion", "lesson_criterion")}
    app = follow(page, other | {"model": "digits-mlp"})  # of settings that hang together some may not fit
    again = follow(page, link_of(app))
    assert not notices(again)
    assert link_of(again) == link_of(app)


FORM = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
@FORM
@given(data=st.data())
def test_any_link_opens(page, data):
    """No traceback, settings that a link spells well kept, and one notice where something in it means nothing here."""
    known = choices(page)
    bad: dict[str, Any] = dict.fromkeys(data.draw(st.sets(st.sampled_from([*known, "group"]), max_size=3)), "☃\x00")
    bad |= data.draw(st.dictionaries(st.text("abcXYZ_é \x00<", min_size=1, max_size=9), st.sampled_from(ODD), max_size=2))
    light = sorted(
        set(known) - set(bad) - {"criterion", "compare", "criteria", "cell"}
    )  # some criteria look at images for long
    good = {key: data.draw(st.sampled_from(known[key])) for key in light if data.draw(st.booleans())}
    app = follow(page, good | bad)
    said = notices(app)
    if page in ("learn", "docs"):  # whose neurons and sections to choose among are those of its other settings
        assert bool(bad) <= len(said) <= 1
        return
    assert len(said) == bool(bad), said
    if said:
        more = re.search(r"and ([\d,]+) more", said[0])
        assert len(re.findall("`+ .+? `+", said[0])) + (int(more[1]) if more else 0) == len(bad)
    for key, value in good.items():
        if key in app.session_state:
            assert value in (
                str(app.session_state[key]),
                str(app.session_state[key]).lower(),
                *_items(app.session_state[key]),
            )


def _items(value: Any) -> Sequence[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


@pytest.mark.parametrize("page", PAGES)
@FORM
@given(data=st.data())
def test_any_value_of_any_setting_opens(page, data):
    names = st.sampled_from([*choices(page), *SIDEBAR, *FREE, "criterion", "embed", "rank", "lab_rounds", "lesson_seed"])
    value = st.one_of(st.sampled_from(ODD), st.text(max_size=20), st.integers().map(str), st.floats().map(str))
    query = data.draw(st.dictionaries(names, st.one_of(value, st.lists(value, min_size=1, max_size=3)), max_size=6))
    app = follow(page, query)
    assert len(notices(app)) <= 1
    assert all("\n" not in one.value and len(one.value) < 700 for one in app.error)
    assert "Traceback" not in text(app)


def test_a_notice_goes_when_the_reader_goes_on_and_does_not_come_back():
    app = follow("transport", {"sparsity": "900", "foo": "1"})
    assert notices(app) == [f"{SAID} were ignored: ` sparsity=900 `, ` foo=1 `."]
    assert notices(app.run()) == notices(app)  # pages that draw themselves again keep it
    app.slider(key="sparsity").set_value(50).run()
    assert notices(app) == []
    assert notices(app.switch_page("pages/curves.py").run()) == []
    assert notices(app.switch_page("pages/transport.py").run()) == []


def test_settings_of_another_page_are_no_settings_here_but_stay_in_the_app_on_the_way():
    assert "rank=8" in notices(follow("transport", {"rank": "8"}))[0]
    app = follow("recovery", {"rank": "9", "recovery_merge": "drop"})
    assert notices(app) == []
    assert notices(app.switch_page("pages/transport.py").run()) == []


def test_infinity_is_no_whole_number():
    """Streamlit's own widget ends in an OverflowError for it."""
    app = follow("transport", {"channel": "1e999", "sparsity": "40"})
    assert notices(app) == [f"{SAID} were ignored: ` channel=1e999 `."]
    assert app.slider(key="sparsity").value == 40


@pytest.mark.parametrize(("page", "name"), [
    ("recovery", "against"), ("recovery", "seeds"), ("recovery", "recovery_scope"), ("export", "export_scope"),
    ("landscape", "shown"),    ("landscape", "landscape_scope"), ("sensitivity", "cell"), ("sensitivity", "executor"),
    ("importance", "image"),    ("transport", "look"),    ("importance", "attribution"), ("learn", "lesson_neuron"),
    ("learn", "lesson_p"), ("curves", "scope"),
])  # fmt: skip
def test_an_empty_choice_is_the_default(page, name):
    """Streamlit lets a link empty even a control that must have a choice."""
    app = follow(page, {name: ""})
    assert not app.error
    link = link_of(app) | {name: []}
    assert link == link_of(follow(page, {})) | {name: []}


def test_what_a_page_comes_to_later_is_judged_later():
    app = follow("curves", {"merges": "", "sparsities": "7"})
    assert "Choose at least one" in app.info[0].value
    assert "sparsities=7" in notices(app)[0]  # of a page that stops early, too
    app = follow("transport", {"reg": "abc"})
    assert notices(app) == []  # the exact solver has no such knob
    assert "reg=abc" in notices(app.selectbox(key="solver").set_value("sinkhorn").run())[0]


@pytest.mark.parametrize(("value", "shown"), [
    ("<b>$x$ :smile: ![](http://x/y.png)", "` <b>$x$ :smile: ![](http://x/y.png) `"),
    ("a``b`c", "``` a``b`c ```"), ("a\x00\n\u202eb", "` a\\x00\\n\\u202eb `"), ("x" * 99, f"` {'x' * 39}… `"), ("", "`  `"),
])  # fmt: skip
def test_values_are_shown_as_text(value, shown):
    assert code(value) == shown


def test_an_error_that_quotes_a_link_makes_no_picture_of_it():
    app = follow("overview", {"weights": "![x](http://example.org/y.png) $a$ <b> **c**"})
    assert app.error[0].value.startswith(
        "no file at \\!\\[x\\](http:\u2060/example.org/y.png) \\$a\\$ \\<b\\> \\*\\*c\\*\\*; check"
    )


def test_widgets_of_one_name_are_of_one_kind():
    """A session carries a setting from page to page, where a widget of another kind would fail on it."""
    kinds: dict[str, set[str]] = {}
    for path in (*ROOT.glob("pages/**/*.py"),):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                for word in call.keywords:
                    if word.arg == "key" and isinstance(word.value, ast.Constant):
                        kinds.setdefault(word.value.value, set()).add(call.func.attr)
    assert len(kinds) > 60
    assert {key: found for key, found in kinds.items() if len(found) > 1} == {}
