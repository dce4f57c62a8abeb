"""Links of any kind open every page: what a page understands it keeps, and of the rest one line speaks."""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opening import APP, text
from streamlit.testing.v1 import AppTest

from intrafusion.jobs import Job, Jobs
from pages.common import literal, shell
from pages.common.links import SIDEBAR
from pages.common.navigation import _PAGES

PAGES = [name for name, _, _ in _PAGES]
SAID = "Not understood in this link"
FREE = {
    "weights",
    "data_path",
    "study_name",
    "address",
    "sparsities",
    "lesson_changes",
}  # any text, perhaps refused later
EXAMPLES = int(os.environ.get("INTRAFUSION_EXAMPLES", "6"))  # of each page; more find more
ODD = (
    "", " ", "nan", "-0", "1e999", "-inf", "0x10", "1_0", "9" * 400, "-3", "12.5", "true", "None", "null", "[]", "\x00", "a\x00b",
    "\u202e", "١٢", "<script>alert(1)</script>", "$\\frac12$", ":smile:", "![](http://x/y.png)", "`", "``` ```", "../../etc", "a" * 9000,
    "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "\n\n# x", "%00", "l1,l2", "L1", "📉",
)  # fmt: skip


class Idle(Jobs):
    """Jobs that end at once, with nothing: links are about what pages ask, not about what comes of it."""

    def start(self, key, total, work, title="", part=None, computes=True) -> Job:
        return super().start(key, total, lambda: iter(()), title, part, computes)


@pytest.fixture(scope="module", autouse=True)
def idle() -> Iterator[None]:
    made = Idle()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shell, "jobs", lambda: made)
        yield
    made.stop(10)


def follow(page: str, query: dict[str, str | list[str]]) -> AppTest:
    """A session that a link opens, on its page."""
    app = AppTest.from_file(APP, default_timeout=60)
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
    found |= {w.key: [str(w.min), str(w.max)] for w in app.slider if not isinstance(w.value, tuple)}
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


@pytest.mark.parametrize("page", PAGES)
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@given(data=st.data())
def test_any_link_opens(page, data):
    """No traceback, at most one notice whatever the link says, and none too few or too many where it is known which is due."""
    known = choices(page)
    bad = data.draw(
        st.dictionaries(st.sampled_from([*known, "model", "device", "group"]), st.just("☃\x00"), max_size=3), "bad"
    )
    bad |= data.draw(
        st.dictionaries(st.text("abcXYZ_é \x00<", min_size=1, max_size=9), st.sampled_from(ODD), max_size=3), "odd"
    )
    good = {
        key: data.draw(st.sampled_from(known[key]), key)
        for key in data.draw(st.sets(st.sampled_from([*known, "group"])), "good")
        if key in known and key not in bad
    }
    good = {key: value for key, value in good.items() if key not in ("criterion", "compare", "criteria")}
    app = follow(page, good | bad)
    said = notices(app)
    assert len(said) == bool(bad)
    if said:
        named = len(re.findall(r"` .*? `", said[0]))
        assert named + int((re.search(r"and ([\d,]+) more", said[0]) or [0, 0])[1]) == len(bad)
    for key in bad:
        assert key not in app.query_params or key not in known
    assert "Traceback" not in text(app)
    if "group" not in bad and "model" not in bad:
        for key, value in good.items():
            if key in app.session_state:
                assert value in str(app.session_state[key]).lower() or value in str(app.session_state[key])


@pytest.mark.parametrize("page", PAGES)
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@given(data=st.data())
def test_any_value_of_any_setting_opens(page, data):
    names = st.sampled_from(
        [*choices(page), *SIDEBAR, *FREE, "criterion", "embed", "rank", "lab_rounds", "lesson_seed"]
    )
    value = st.one_of(st.sampled_from(ODD), st.text(max_size=20), st.integers().map(str), st.floats().map(str))
    query = data.draw(
        st.dictionaries(names, st.one_of(value, st.lists(value, min_size=1, max_size=3)), max_size=6), "link"
    )
    app = follow(page, query)
    assert len(notices(app)) <= 1
    assert all("\n" not in one.value for one in app.error)
    assert all(len(one.value) < 700 for one in app.error)
