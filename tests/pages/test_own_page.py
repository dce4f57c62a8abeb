import threading

import numpy as np
import own_files as files
import pytest
import torch
from opening import finished, given, open_page, text, upload, uploader
from streamlit.testing.v1 import AppTest

import intrafusion as itf
from intrafusion.data.datasets import kept_data
from intrafusion.errors import IntrafusionError
from intrafusion.models import hub
from intrafusion.runtime.cancellation import checkpoint
from intrafusion.runtime.paths import home
from intrafusion.studies.uploads import take_data, take_program
from pages.panels import uploads
from pages.shared import background_jobs, open_model

pytestmark = pytest.mark.usefixtures("jobs")


def open_own(**query: str) -> AppTest:
    app = open_page("your_own", **query)
    assert not app.exception
    return app


def test_nothing_is_there_at_first():
    app = open_own()
    assert "Nothing is saved" in text(app)
    assert all(app.button(key=f"own_{what}_take").disabled for what in ("program", "weights", "images"))


def test_weights_are_uploaded_and_opened(tmp_path):
    path = files.save_state(tmp_path / "My weights (1).safetensors", files.mlp_state())
    app = upload(open_own(model="digits-mlp"), "weights", path)
    assert hub.kept_names() == ["kept/My-weights-1"]
    app.button(key="own_weights_open").click().run()
    assert not app.exception
    assert app.selectbox(key="model").value == "kept/My-weights-1"
    assert "It is selected in the sidebar" in text(app)
    app.switch_page("pages/overview.py").run()
    assert "**kept/My-weights-1** has" in text(app)


def test_which_weights_of_a_file_and_what_was_left_out(tmp_path):
    wrapped = {"model": {"x": torch.ones(3)}, "ema": files.mlp_state() | {"n_averaged": torch.tensor(3)}}
    path = files.save_state(tmp_path / "run.pth.tar", wrapped)
    app = open_own(model="digits-mlp")
    app.text_input(key="own_weights_key").set_value("emo").run()
    upload(app, "weights", path)
    assert "choose one of model, ema" in app.error[0].value
    app.text_input(key="own_weights_key").set_value(" ema ").run()
    upload(app, "weights", path)
    assert hub.kept_names() == ["kept/run.pth"]
    assert app.info[0].value == "ignored, not weights: n_averaged"


def test_a_file_of_several_weights_in_the_sidebar(tmp_path):
    path = files.save_state(tmp_path / "w.ckpt", {"model": files.mlp_state(), "ema": files.mlp_state()})
    app = open_page("overview", model="digits-mlp", weights=f"{path}#ema")
    assert not app.exception
    assert f"{path}#ema" in next(code.value for code in app.code if "--weights" in code.value)
    files.save_state(tmp_path / "x.ckpt", {"ema": files.mlp_state() | {"epoch": 3}})
    app = open_page("overview", model="digits-mlp", weights=str(tmp_path / "x.ckpt"))
    assert "ignored, not weights: epoch" in app.info[0].value


def test_a_program_and_images_are_uploaded_and_used(tmp_path):
    app = upload(open_own(), "images", files.npz(tmp_path / "x_train.npz"), files.npz(tmp_path / "x_test.npz"))
    assert kept_data() == ["kept/x_train"]
    upload(app, "program", files.export(files.network(), tmp_path / "net.pt2"))
    app.button(key="own_program_open").click().run()
    assert app.selectbox(key="model").value == "kept/net"
    assert app.selectbox(key="data").value == "kept/x_train"  # a program of own data takes the images that are there
    for page in ("curves", "importance", "transport", "sensitivity", "recovery", "landscape", "training_lab"):
        app.switch_page(f"pages/{page}.py").run(timeout=120)
        assert not app.exception, page
    app.switch_page("pages/curves.py").run()
    line = next(code.value for code in app.code if code.value.startswith("python -m intrafusion curve"))
    assert "--model kept/net --data kept/x_train" in line
    link = next(code.value for code in app.code if code.value.startswith("http"))
    assert "data=kept%2Fx_train" in link


def test_a_program_without_images_says_where_they_come_from(tmp_path):
    take_program(files.export(files.network(), tmp_path / "net.pt2"), "net")
    app = open_page("curves", model="kept/net")
    assert not app.exception
    assert "on the *Your own* page" in app.info[0].value


def test_mean_and_deviation_are_those_of_the_fields(tmp_path):
    app = open_own()
    app.text_input(key="own_program_Mean").set_value("0.25").run()
    app.text_input(key="own_program_Standard deviation").set_value("zero").run()
    path = files.export(files.network(), tmp_path / "net.pt2")
    given(app, "program", path).button(key="own_program_take").click().run()
    assert "must be numbers" in app.error[0].value
    app.text_input(key="own_program_Standard deviation").set_value("0.5").run()
    app.button(key="own_program_take").click().run()  # what was refused before its check is still there
    finished(app, background_jobs.jobs())
    card = itf.load_model("kept/net").card
    assert (card.mean, card.std) == ((0.25,), (0.5,))


@pytest.mark.parametrize(("what", "make", "expected"), [
    ("weights", lambda f: files.pickled(f / "w.pt", f / "sentinel"), "cannot load"),
    ("program", lambda f: files.save_state(f / "p.pt2", files.mlp_state()), "has no models/model.json"),
    ("images", lambda f: files.bomb(f / "d.zip"), "limit is 200 times"),
])  # fmt: skip
def test_what_is_refused_is_one_line_without_a_path_of_the_server(tmp_path, what, make, expected):
    app = upload(open_own(), what, make(tmp_path))
    (error,) = app.error
    assert expected in error.value
    assert "\n" not in error.value
    assert "/tmp" not in error.value
    assert not (tmp_path / "sentinel").exists()
    assert (hub.kept_names(), kept_data()) == ([], [])


@pytest.fixture
def held(monkeypatch):
    """Checks of weights that go on until they are let go; what to set for that."""
    let_go = threading.Event()

    def steps(workshop, *_):
        yield 1, 2
        while not let_go.wait(0.01):
            checkpoint()
        raise IntrafusionError(f"{workshop.given[0].name} is no good")

    monkeypatch.setattr(uploads, "weights_steps", steps)
    return let_go


def checks(app: AppTest) -> list[str]:
    return [bar.proto.text for bar in app.main.get("progress")]


def test_a_check_is_a_job_that_a_reload_finds_again_and_whose_bytes_are_freed(tmp_path, held, jobs, monkeypatch):
    path = files.save_state(tmp_path / "w.pt", files.mlp_state())
    contexts, real = [], uploads.get_script_run_ctx
    monkeypatch.setattr(uploads, "get_script_run_ctx", lambda: contexts.append(real()) or contexts[-1])
    app = given(open_own(), "weights", path)
    file = uploader(app, "weights").value
    app.button(key="own_weights_take").click().run()
    (job,) = jobs.queue()
    assert job.title == "check of w.pt"
    assert "Checking" in checks(app)[0]
    assert any("check of w.pt" in bar.proto.text for bar in app.sidebar.get("progress"))
    assert uploader(app, "weights").value is None
    assert app.button(key="own_weights_take").disabled
    (context,) = contexts
    assert file is not None
    assert context.uploaded_file_mgr.get_files(context.session_id, [file.file_id]) == []
    (folder,) = home().glob(".taking-*")
    assert (folder / "given" / "w.pt").read_bytes() == path.read_bytes()
    again = open_own()
    again.query_params["check_weights"] = app.query_params["check_weights"]
    again.run()
    assert "Checking" in checks(again)[0]
    assert not again.warning
    held.set()
    assert finished(again, jobs).error[0].value == "w.pt is no good"
    assert not list(home().glob(".taking-*"))
    assert finished(app, jobs).error[0].value == "w.pt is no good"
    assert not open_own().error  # of others


@pytest.mark.usefixtures("held")
def test_a_check_can_be_cancelled_by_who_asked_for_it_alone(tmp_path, jobs, monkeypatch):
    monkeypatch.setenv("INTRAFUSION_PUBLIC", "1")
    app = given(open_own(), "weights", files.save_state(tmp_path / "w.pt", files.mlp_state()))
    app.button(key="own_weights_take").click().run()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(background_jobs, "reader_address", lambda: "203.0.113.1")
        assert "Cancel" not in [button.label for button in open_own().button]
    app.button(key="own_weights_cancel").click().run()
    assert "Nothing was saved" in text(finished(app, jobs))
    assert [path.name for path in home().glob(".taking-*")] == []
    assert hub.kept_names() == []


def test_a_job_that_never_began_leaves_nothing(tmp_path, jobs):
    from intrafusion.runtime.staging import Workshop

    workshop = Workshop()
    workshop.give("w.pt", memoryview(b"x"))
    assert len(list(home().glob(".taking-*"))) == 1
    del workshop
    assert list(home().glob(".taking-*")) == []


@pytest.mark.parametrize(
    ("public", "wanted", "taken"), [("0", "", True), ("1", "", False), ("1", "0", False), ("1", "1", True)]
)
def test_programs_are_for_public_servers_whose_operator_wants_them(monkeypatch, public, wanted, taken):
    monkeypatch.setenv("INTRAFUSION_PUBLIC", public)
    monkeypatch.setenv("INTRAFUSION_PROGRAMS", wanted)
    app = open_own()
    assert ("own_program_take" in [button.key for button in app.button]) == taken
    assert ("does not accept programs" in text(app)) != taken
    assert "own_weights_take" in [button.key for button in app.button]


def test_kept_things_can_be_removed(tmp_path):
    take_data([files.npz(tmp_path / "x.npz", classes=np.array(["a", "b", "c"]))], "mine")
    app = open_own()
    assert "6 test" in text(app)
    app.button(key="own_remove images kept/mine").click().run()
    assert not app.exception
    assert kept_data() == []


def test_a_damaged_run_of_the_lab_is_listed_and_can_be_removed():
    path = home() / "lab" / "abc.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"no run")
    app = open_own()
    assert "training lab run: damaged" in text(app)
    app.button(key="own_remove lab lab/abc").click().run()
    assert not app.exception
    assert not path.exists()


@pytest.mark.parametrize("page", ["overview", "curves", "your_own"])
@pytest.mark.parametrize("key", ["model", "imagenet", "weights", "data", "data_path", "own_weights_model", "own_program_data"])
def test_no_parameter_of_a_link_runs_code(tmp_path, monkeypatch, page, key):
    (tmp_path / "own_trap.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    app = open_page(page, **{key: "own_trap:make"})
    assert not app.exception
    assert not (tmp_path / "mark").exists()


def test_no_field_and_no_card_runs_code(tmp_path, monkeypatch):

    (tmp_path / "own_trap.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    app = open_own()
    for field in app.text_input:
        field.set_value("own_trap:make")
    app.run()
    assert not app.exception
    with pytest.raises(itf.IntrafusionError, match="your own code"):
        open_model.cached_session.__wrapped__("own_trap:make", None, "cpu")
    path = files.save_state(tmp_path / "w.safetensors", files.mlp_state())
    (tmp_path / "w.json").write_text('{"details": {"architecture": "own_trap:make"}}')
    upload(open_own(), "weights", path)
    assert not (tmp_path / "mark").exists()


def test_what_is_converted_is_told_and_what_is_ambiguous_is_settled_by_the_fields(tmp_path):
    path = files.npz(tmp_path / "d.npz", images=files.PIXELS[:, :3, :3].repeat(3, 3), labels=files.LABELS[:, None])
    app = upload(open_own(), "images", path)
    assert "may have its channels first or last" in app.error[0].value
    app.selectbox(key="own_images_layout").set_value("nchw").run()
    app.text_input(key="own_images_range").set_value("0").run()
    given(app, "images", path)
    app.button(key="own_images_take").click().run()
    assert "two numbers" in app.error[0].value
    app.text_input(key="own_images_range").set_value("0, 255").run()
    app.button(key="own_images_take").click().run()
    finished(app, background_jobs.jobs())
    assert next(note.value for note in app.info if "d.npz" in note.value).endswith("reading labels (6, 1) as (6,)")
    data = itf.load_data("kept/d")
    assert np.array_equal(data.images.numpy(), files.PIXELS[:, :3, :3].repeat(3, 3))


def test_what_was_passed_over_of_a_path_is_told_on_the_page(tmp_path):
    path = files.npz(tmp_path / "x.npz", labels=files.LABELS[:, None])
    take_program(files.export(files.network(), tmp_path / "net.pt2"), "net")
    app = open_page("curves", model="kept/net", data_path=str(path))
    assert not app.exception
    assert any("reading labels (6, 1) as (6,)" in note.value for note in app.info), text(app)
