"""Text that a stranger wrote is nowhere on a page more than text: every page, with hostile names wherever one may stand."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np
import own_files as files
import pytest
from opening import open_page
from streamlit.testing.v1 import AppTest

import intrafusion as itf
from intrafusion.models.card import card_of
from intrafusion.models.hub import keep
from intrafusion.runtime.jobs import Jobs
from intrafusion.runtime.paths import home, store_path
from intrafusion.studies.store.sqlite import Store
from intrafusion.studies.study_file import Study
from intrafusion.studies.uploads import take_data
from pages.shared.navigation import _PAGES

EVIL = "![b](http://evil.example/b.png) <img src=x onerror=alert(1)> $xyz$ :material/home: :red[x] `c` **d**\u202e"
PAGES = [name for name, _, _ in _PAGES]
TEXTS = {
    "arrow_data_frame",
    "code",
    "selectbox",
    "multiselect",
    "text_input",
    "download_button",
}  # which Streamlit shows as text
SIGNS = r"(?<!\\)(!?\[b|<img|\$xyz\$|\*\*d\*\*|\u202e)|:material/home|:red\\?\[x|http://evil"
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)


def taken(kind: str, text: str) -> list[str]:
    """What of it Streamlit or Plotly would take for more than text, code apart."""
    return re.findall(r"<img|\$xyz\$|\u202e" if kind == "plotly_chart" else SIGNS, CODE.sub("", text))


def shown(app: AppTest) -> Iterator[tuple[str, str]]:
    """What each element of the page and the sidebar says, with its kind."""

    def walk(block: Any) -> Iterator[tuple[str, str]]:
        for element in block.children.values():
            if hasattr(element, "children"):
                yield element.type, getattr(getattr(element.proto, "expandable", None), "label", "")
                yield from walk(element)
            elif element.type == "plotly_chart":
                yield element.type, json.dumps(json.loads(element.proto.spec), ensure_ascii=False)
            else:
                proto = element.proto
                yield (
                    element.type,
                    "\n".join(str(getattr(proto, field, "")) for field in ("body", "label", "text", "help", "value")),
                )

    yield from walk(app.main)
    yield from walk(app.sidebar)


@pytest.fixture
def evil(jobs: Jobs) -> Iterator[str]:
    """A kept network, kept images, a study and a job that waits, with hostile text in all that says something."""
    names = np.array([f"{EVIL}{number}" for number in range(10)])
    take_data([files.npz(home() / "x.npz", labels=np.arange(6), classes=names)], "evil")
    model = itf.load_model("digits-mlp")
    details = card_of(model).details | {"command": EVIL, "told": [EVIL]}
    model.card = replace(card_of(model), source=EVIL, licence=EVIL, details=details)
    keep(model, "evil")
    study = Study(EVIL, itf.PruneSpec(model="kept/evil", dataset="kept/evil"), {"sparsity": (0.5,)})
    Store(store_path()).save_study(study.name, study.to_toml(), [])
    ended = Event()

    def wait() -> Iterator[int]:
        while not ended.wait(0.05):
            yield 0

    jobs.start("evil", 2, wait, EVIL)
    yield EVIL
    ended.set()


@pytest.mark.usefixtures("evil")
def test_no_page_takes_it_for_markup():
    app = open_page("overview", model="kept/evil", data="kept/evil")
    said = []
    for page in PAGES:
        app.switch_page(f"pages/{page}.py").run(timeout=120)
        assert not app.exception
        said += [(page, kind, text) for kind, text in shown(app) if kind not in TEXTS]
    assert not [(page, kind, text[:300]) for page, kind, text in said if taken(kind, text)]
    assert sum("onerror" in text for _, _, text in said) > len(PAGES)  # it is there, as text
    assert {page for page, kind, text in said if kind == "plotly_chart" and "onerror" in text} >= {"importance"}


def test_an_error_that_quotes_it_is_text():
    app = open_page("overview", weights=f"/{EVIL}")
    assert "onerror" in app.error[0].value
    assert not taken("alert", app.error[0].value)
