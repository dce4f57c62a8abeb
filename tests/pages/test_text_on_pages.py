"""Text that a stranger wrote is nowhere on a page more than text: every page, with hostile names wherever one may stand."""

import json
import logging
import re
from collections import OrderedDict
from collections.abc import Iterator
from threading import Event
from typing import Any

import numpy as np
import own_files as files
import pytest
from opening import open_page, upload
from streamlit.testing.v1 import AppTest
from torch import nn

import intrafusion as itf
from intrafusion.models.card import ModelCard
from intrafusion.models.exported_program import read_program
from intrafusion.models.sources.user import keep_program
from intrafusion.runtime import log
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
SIGNS = r"(?<!\\)(!?\[b|<img|\$xyz\$|\*\*d\*\*|__e__|\u202e)|:material/home|:red\\?\[x|http://evil|www\.evil"
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


def network() -> nn.Module:
    """A classifier of digits whose layers, and so its groups, have names that Markdown would take for a link and for bold."""

    def one(name: str, *layers: nn.Module) -> nn.Module:
        return nn.Sequential(OrderedDict([(name, layers[0] if len(layers) == 1 else nn.Sequential(*layers))]))

    convolution = one("www", one("evil", one("example", nn.Conv2d(1, 6, 3, padding=1))))
    inner = one("__e__", nn.Linear(6 * 64, 8))
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), inner, nn.ReLU(), nn.Linear(8, 10)).eval()


@pytest.fixture
def evil(jobs: Jobs) -> Iterator[str]:
    """A kept program, kept images, a study and a job that waits, with hostile text in all that says something."""
    names = np.array([f"{EVIL}{number}" for number in range(10)])
    take_data([files.npz(home() / "x.npz", labels=np.arange(6), classes=names)], "evil")
    program, size, classes = read_program(files.export(network(), home() / "x.pt2"))
    details = {"command": EVIL, "told": [EVIL]}
    card = ModelCard("evil", (0.5,), (0.5,), size, classes, "kept/evil", source=EVIL, licence=EVIL, details=details)
    keep_program(program, card, "evil")
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
def test_no_page_takes_it_for_markup(caplog):
    caplog.set_level(logging.INFO, "intrafusion")
    app = open_page("overview", model="kept/evil", data="kept/evil")
    said = []
    for page in PAGES:
        app.switch_page(f"pages/{page}.py").run(timeout=120)
        assert not app.exception
        said += [(page, kind, text) for kind, text in shown(app) if kind not in TEXTS]
    assert not [(page, kind, text[:300]) for page, kind, text in said if taken(kind, text)]
    assert sum("onerror" in text for _, _, text in said) > len(PAGES)  # it is there, as text
    assert {page for page, kind, text in said if kind == "plotly_chart" and "onerror" in text} >= {"importance"}
    assert {page for page, _, text in said if "evil.example" in text} >= {"overview", "sensitivity"}  # names of groups
    for line in (form.format(record) for record in caplog.records for form in (log._Json(), log._Text(log._TEXT))):
        assert line.isprintable()


def test_an_error_that_quotes_it_is_text():
    app = open_page("overview", weights=f"/{EVIL}")
    assert "onerror" in app.error[0].value
    assert not taken("alert", app.error[0].value)


@pytest.mark.usefixtures("jobs")
@pytest.mark.parametrize("what", ["weights", "images", "pictures", "classes"])
def test_names_of_files_are_text(tmp_path, what):
    name, whole = EVIL.replace("/", "|"), files.picture()
    if what == "weights":
        path = tmp_path / f"{name}.pt"
        path.write_bytes(b"no weights")
    else:
        inside = {"images": {}, "pictures": {f"cat/{name}.png": b"no picture"}, "classes": {f"{name}/x.png": whole}}[what]
        path = files.pictures(tmp_path / f"{name}.zip", inside)
    app = upload(open_page("your_own", model="digits-mlp"), "weights" if what == "weights" else "images", path)
    said = [(kind, told) for kind, told in shown(app) if kind not in TEXTS]
    assert not [(kind, told[:300]) for kind, told in said if taken(kind, told)]
    assert "b-http-evil.example-b" in app.main.error[0].value
    if what in ("pictures", "classes"):
        assert "evil.example\\|" in app.main.error[0].value
