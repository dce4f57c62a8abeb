import json
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from intrafusion.cli import health_checks
from intrafusion.cli.health_checks import BROKEN, MISSING, OK, Finding, examine, is_well
from intrafusion.cli.main import main
from intrafusion.runtime.paths import store_path
from intrafusion.studies.store.schema import FORMAT
from intrafusion.studies.store.sqlite import Store


def found(**options) -> dict[str, Finding]:
    return {one.name: one for one in examine(**options)}


@pytest.fixture
def alone(monkeypatch):
    """Only what a test changes: models and packages are as they are on every machine."""
    monkeypatch.setattr(health_checks, "PACKAGES", ())
    monkeypatch.setattr(health_checks, "OPTIONAL", {})
    monkeypatch.setattr(health_checks.builtin, "names", list)


def test_a_machine_that_is_well(capsys):
    assert main(["doctor", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_name = {row["name"]: row for row in rows}
    assert {
        "python",
        "torch",
        "streamlit",
        "POT",
        "cpu",
        "cache",
        "store",
        "data digits",
        "data cifar10",
        "timm",
    } < set(by_name)
    assert all(set(row) == {"name", "state", "said", "todo", "needed"} for row in rows)
    assert all(row["state"] == OK for row in rows if row["needed"])
    assert by_name["model digits-resnet"]["said"].startswith("accuracy 99.7% on 597 test images")
    assert "none yet" in by_name["store"]["said"]
    assert not store_path().exists()
    assert by_name["data cifar10"]["todo"].startswith("python -m intrafusion data cifar10 --download")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("permitted", "state", "said"), [
    (True, OK, "and no network access"), (False, MISSING, "but with network access"),
])  # fmt: skip
def test_whether_checks_of_files_can_leave_the_network(monkeypatch, permitted, state, said):
    monkeypatch.setattr(health_checks.sandbox, "is_alone", lambda: permitted)
    about = found()["checks"]
    assert (about.state, about.needed) == (state, False)
    assert said in about.said


@pytest.mark.usefixtures("alone")
class TestStore:
    def test_a_sound_one_is_counted(self):
        with Store() as store:
            store.save_study("s", "", [])
        assert found()["store"] == Finding("store", OK, f"{store_path()}: format {FORMAT}, 1 studies, 0 points")

    def test_a_damaged_one_is_broken_and_the_exit_is_1(self, capsys):
        with Store() as store:
            store.save_study("s", "x" * 50_000, [])
        raw = bytearray(store_path().read_bytes())
        raw[4096:] = b"\xff" * (len(raw) - 4096)
        store_path().write_bytes(raw)
        assert found()["store"].state == BROKEN
        assert main(["doctor"]) == 1
        out = capsys.readouterr().out
        assert "broken  store" in out
        assert out.endswith("A required check failed.\n")

    def test_damage_that_nothing_has_stumbled_on_yet_is_found(self):
        with Store() as store:
            store.save_study("s", "x" * 50_000, [])
            store.delete("s")
        raw = bytearray(store_path().read_bytes())
        raw[36:40] = (99).to_bytes(4)  # how many pages are free
        store_path().write_bytes(raw)
        store = found()["store"]
        assert (store.state, "is damaged: " in store.said) == (BROKEN, True)

    def test_one_of_another_program_is_told_and_left_alone(self):
        with closing(sqlite3.connect(store_path())) as db:
            db.execute("CREATE TABLE theirs (x)")
        before = store_path().read_bytes()
        store = found()["store"]
        assert (store.state, "another program" in store.said) == (BROKEN, True)
        assert store_path().read_bytes() == before

    def test_one_that_is_locked_is_told(self):
        Store().close()
        with closing(sqlite3.connect(store_path(), isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            store = found()["store"]
        assert (store.state, "locked" in store.said) == (BROKEN, True)


@pytest.mark.usefixtures("alone")
class TestDisk:
    def test_a_full_one(self, monkeypatch):
        usage = health_checks.shutil.disk_usage("/")._replace(free=1000)
        monkeypatch.setattr(health_checks.shutil, "disk_usage", lambda path: usage)
        cache = found()["cache"]
        assert (cache.state, "0.0 GB free" in cache.said, cache.todo[:15]) == (BROKEN, True, "free some space")

    def test_one_that_cannot_be_written(self, monkeypatch, tmp_path):
        monkeypatch.setenv("INTRAFUSION_HOME", "/proc/nowhere")  # where even root makes nothing
        cache = found()["cache"]
        assert (cache.state, "cannot write to" in cache.said) == (BROKEN, True)


@pytest.mark.usefixtures("alone")
class TestData:
    def test_what_is_given_is_opened(self, tmp_path):
        path = tmp_path / "my.npz"
        np.savez(path, images=np.zeros((5, 4, 4, 3), np.uint8), labels=np.arange(5))
        assert found(data_path=str(path))["data path"].said == "5 images of own"
        path.write_bytes(b"no zip")
        assert found(data_path=str(path))["data path"].state == BROKEN


def test_a_damaged_model_is_broken(monkeypatch, tmp_path):
    for name in ("digits-mlp.json", "digits-mlp.safetensors"):
        (tmp_path / name).write_bytes((health_checks.builtin.ASSETS / name).read_bytes())
    monkeypatch.setattr(health_checks.builtin, "ASSETS", tmp_path)
    assert health_checks._careful("m", health_checks._model, "digits-mlp").state == OK
    (tmp_path / "digits-mlp.safetensors").write_bytes(b"nothing")
    assert health_checks._careful("m", health_checks._model, "digits-mlp").state == BROKEN


@pytest.mark.usefixtures("alone")
def test_what_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(health_checks, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(health_checks, "OPTIONAL", {"no-such-extra": "pip install it"})
    findings = found()
    assert findings["no-such-package"] == Finding(
        "no-such-package", MISSING, "not installed", "pip install -r requirements.txt"
    )
    assert (findings["no-such-extra"].state, findings["no-such-extra"].todo) == (MISSING, "pip install it")
    assert not is_well(list(findings.values()))
    monkeypatch.setattr(health_checks, "PACKAGES", ())
    assert is_well(list(found().values()))
