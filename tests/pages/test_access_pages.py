"""What the pages of a public server keep from strangers, and what any page says of an error that nobody expected."""

import ast
import re
from pathlib import Path

import own_files as files
import pytest
from gates import Gate
from opening import APP, finished, open_page, press, text

import intrafusion as itf
from intrafusion.models import hub
from intrafusion.runtime import access
from intrafusion.runtime.paths import store_path
from intrafusion.studies import sweeps as module
from intrafusion.studies.uploads import take_weights
from pages.shared import background_jobs, messages, open_model

SECRET = "/srv/secret/of/the/server"


@pytest.fixture
def public(monkeypatch):
    monkeypatch.setenv("INTRAFUSION_PUBLIC", "1")


@pytest.fixture
def kept(tmp_path):
    """A network that somebody keeps."""
    path = files.save_state(tmp_path / "w.safetensors", files.mlp_state())
    return take_weights(path, "digits-mlp", "theirs")


def labels(app) -> list[str]:
    return [button.label for button in app.button]


@pytest.mark.usefixtures("jobs", "public", "kept")
class TestOthers:
    def test_what_they_keep_is_seen_and_not_removed(self, monkeypatch):
        app = open_page("your_own")
        assert "**kept/theirs**" in text(app)
        assert "Remove permanently" not in labels(app)
        monkeypatch.delenv("INTRAFUSION_PUBLIC")
        assert "Remove permanently" in labels(app.run())

    def test_what_they_keep_is_not_replaced(self, monkeypatch):
        model = itf.load_model("digits-mlp")
        with pytest.raises(itf.IntrafusionError, match="kept/theirs already exists"):
            open_model.keep_network(model, "theirs")
        assert open_model.keep_network(model, "mine") == "kept/mine"
        monkeypatch.setenv("INTRAFUSION_KEPT_MB", "0")
        with pytest.raises(itf.IntrafusionError, match="limit of 0 MiB"):
            open_model.keep_network(model, "more")
        monkeypatch.delenv("INTRAFUSION_PUBLIC")
        assert open_model.keep_network(model, "theirs") == "kept/theirs"

    def test_where_their_files_came_from_is_not_told(self, tmp_path):
        app = open_page("overview", model="kept/theirs")
        assert "**Weights**: weights w.safetensors" in text(app)
        assert str(tmp_path) not in text(app)

    def test_a_key_of_weights_opens_no_other_folder(self, tmp_path, monkeypatch):
        (tmp_path / "open").mkdir()
        secret = files.save_state(tmp_path / "secret.pt", {"ema": files.mlp_state()})
        (tmp_path / "open" / "link.pt").symlink_to(secret)
        secret.with_name("open").joinpath("w.pt").write_bytes(secret.read_bytes())
        monkeypatch.setenv("INTRAFUSION_ROOTS", str(tmp_path / "open"))
        refused = open_page("overview", model="digits-mlp", weights=f"{tmp_path / 'open' / 'link.pt'}#ema")
        assert "cannot open" in refused.error[0].value
        opened = open_page("overview", model="digits-mlp", weights=f"{tmp_path / 'open' / 'w.pt'}#ema")
        assert not opened.error

    def test_what_they_compute_is_not_cancelled(self, jobs, monkeypatch):
        jobs.start("theirs", 3, Gate(), "curve of digits-vgg", who="203.0.113.1")
        app = open_page("overview")
        assert "**Running jobs**" in [words.value for words in app.sidebar.markdown]
        assert "Cancel" not in labels(app)
        assert not background_jobs.may_cancel(jobs.get("theirs"))

    def test_what_this_address_asked_for_is_cancelled_after_a_reload(self, jobs):
        job = jobs.start("mine", 3, Gate(), "curve of digits-vgg", who=background_jobs.reader_address())
        (cancel,) = [button for button in open_page("overview").sidebar.button if button.label == "Cancel"]
        cancel.click().run()
        job.wait(60)
        assert job.state == "cancelled"

    def test_so_many_computations_of_all_and_a_place_for_whoever_has_none(self, jobs, monkeypatch):
        monkeypatch.setattr(access, "ALL", 1)
        monkeypatch.setattr(access, "FIRST", 1)
        jobs.start("theirs", 3, Gate(), "curve of digits-vgg", who="203.0.113.1")
        app = press(open_page("recovery"), "Recover")
        assert not app.error
        app = press(open_page("recovery", model="digits-mlp"), "Recover")
        assert [error.value for error in app.error] == ["this server is busy; try again later"]

    def test_so_many_of_one_address_whatever_the_session(self, jobs):
        for number in range(access.EACH):
            jobs.start(number, 3, Gate(), "curve of digits-vgg", who=background_jobs.reader_address())
        (error,) = press(open_page("recovery"), "Recover").error
        assert error.value == "you have 4 unfinished computations, the most allowed; cancel one or wait"

    def test_so_much_is_kept_for_one_address_in_a_day(self, monkeypatch):
        monkeypatch.setattr(access, "_kept", access.Rate(10, 1.0, 86400))
        monkeypatch.setenv("INTRAFUSION_KEPT_MB", "8")
        access.check_share("a", 2 << 20)
        for size, words in ((1, "try again tomorrow"), (3 << 20, "try again tomorrow")):
            with pytest.raises(itf.IntrafusionError, match=f"at most 2 MiB a day on this server; {words}"):
                access.check_share("a", size)
        access.check_share("b", 1)

    def test_nothing_is_fetched_for_them(self):
        app = open_page("overview", model="cifar10-resnet56")
        assert "These weights are not on this machine" in [title.value for title in app.title]
        assert not [label for label in labels(app) if "Download" in label]
        assert "operator of this server can download it" in text(app)

    def test_they_name_no_cluster(self):
        app = open_page("sensitivity", executor="Ray cluster")
        assert "public server has no cluster" in text(app)
        assert not [box for box in app.text_input if box.key == "address"]

    def test_a_link_to_a_file_is_refused_in_one_line(self):
        for query in ({"data_path": "/etc/passwd"}, {"weights": "/etc/passwd"}):
            (error,) = open_page("curves", **query).error
            assert error.value.endswith("this server does not open its own files")
        assert not open_page("overview", model="digits-mlp", weights="random").error

    def test_a_network_too_large_for_this_server_is_not_opened(self, monkeypatch):
        large = {"model": "ImageNet (torchvision)", "imagenet": "vit_h_14", "weights": "random"}
        (error,) = open_page("overview", **large).error
        assert error.value == (
            "imagenet/vit_h_14 has 2,416 MiB of weights; the limit of this server is 512 MiB; choose a smaller model"
        )
        monkeypatch.setenv("INTRAFUSION_MODEL_MB", "4")
        assert "this server is 4 MiB" in open_page("overview", **large | {"imagenet": "squeezenet1_0"}).error[0].value
        monkeypatch.setenv("INTRAFUSION_MODEL_MB", "5")
        assert not open_page("overview", **large | {"imagenet": "squeezenet1_0"}).error


@pytest.mark.usefixtures("public")
def test_weights_by_name_are_those_that_are_here(tmp_path):
    name = "imagenet/squeezenet1_0"
    assert hub.names_weights(name, "random")
    assert not hub.names_weights(name, "IMAGENET1K_V1")
    path = hub.imagenet.published(name, "IMAGENET1K_V1")[1]
    path.parent.mkdir(parents=True)
    path.touch()
    assert hub.names_weights(name, "IMAGENET1K_V1")
    assert not hub.names_weights("digits-mlp", "IMAGENET1K_V1")
    assert not hub.names_weights(name, str(path))


@pytest.mark.usefixtures("jobs")
def test_where_a_damaged_store_lies_is_for_the_person_here_alone(monkeypatch):
    store_path().write_bytes(b"no store at all, and long enough to be read" * 100)
    for is_public, there in (("0", True), ("1", False)):
        monkeypatch.setenv("INTRAFUSION_PUBLIC", is_public)
        (warning,) = open_page("curves", model="digits-mlp", limit="500", criteria="random").warning
        said = warning.value.replace("\\", "")  # names are no markup
        assert (str(store_path()) in said, "<store>/studies.sqlite" in said) == (there, not there)


class TestErrors:
    def test_a_point_that_fails_as_nobody_expects_is_told_by_its_kind_and_id(self, jobs, monkeypatch, caplog):
        monkeypatch.setattr(module, "measure", self._fail)
        app = finished(open_page("curves", model="digits-mlp"), jobs)
        said = next(warning.value for warning in app.warning)
        assert SECRET not in text(app)
        found = re.search(r"RuntimeError \(id ([0-9a-f]{8})\)\. The details are in the server's log under this id\.$", said)
        (record,) = [r for r in caplog.records if getattr(r, "fields", {}).get("id") == found[1]]
        assert SECRET in str(record.exc_info[1])

    def test_a_job_as_well(self, jobs):
        def work():
            self._fail()
            yield

        job = jobs.start("key", 1, work)
        job.wait(30)
        assert messages.failure_reason(job) == (
            f"RuntimeError (id {job.error_id}). The details are in the server's log under this id."
        )

    @pytest.mark.parametrize(
        ("page", "place"),
        [
            ("importance", "intrafusion.studies.session.Session.scores"), ("overview", "pages.shared.job_queue.show_queue"),
            ("transport", "pages.shared.sidebar.choose"), ("curves", "pages.shared.studying.points"),
        ],
    )  # fmt: skip
    def test_wherever_on_a_page_it_is_one_line_with_the_id(self, jobs, monkeypatch, unexpected, page, place):
        monkeypatch.setattr(place, self._fail)
        app = open_page(page, model="digits-mlp")
        assert not app.exception
        found = re.fullmatch(
            r"Something went wrong \(id ([0-9a-f]{8})\)\. The details are in the server's log under this id\.",
            app.error[-1].value,
        )
        assert found[1] == unexpected()[-1].fields["id"]
        assert SECRET in str(unexpected()[-1].exc_info[1])
        assert SECRET not in text(app)

    def test_the_log_tells_what_was_kept_and_what_was_refused(self, tmp_path, caplog):
        caplog.set_level("INFO", "intrafusion")
        app = open_page("your_own", model="digits-mlp")
        for name, state in (("good", files.mlp_state()), ("bad", {})):
            path = files.save_state(tmp_path / f"{name}.safetensors", state)
            uploader = next(one for one in app.file_uploader if one.key.startswith("own_weights"))
            uploader.set_value((path.name, path.read_bytes(), "")).run()
            app.button(key="own_weights_take").click().run()
            finished(app, background_jobs.jobs())
        told = [(r.message, r.fields) for r in caplog.records if r.message.startswith("upload")]
        (kept, about), (refused, why) = told
        assert (kept, about) == ("upload kept", {"what": "weights", "name": "kept/good"})
        assert (refused, why["what"]) == ("upload refused", "weights")
        assert why["reason"].startswith("bad.safetensors")

    @staticmethod
    def _fail(*_):
        raise RuntimeError(f"no file at {SECRET}")


def test_pages_tell_of_errors_by_one_module_alone():
    """`telling` hides what strangers must not see: no page writes an exception's words by itself."""
    folder = Path(APP).parent / "pages"
    for file in folder.rglob("*.py"):
        if file.name in ("telling.py", "serving.py"):
            continue
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in (
                "st.error",
                "st.warning",
                "st.info",
                "st.toast",
            ):
                nodes = [node for argument in call.args for node in ast.walk(argument)]
                said = {node.id if isinstance(node, ast.Name) else getattr(node, "attr", "") for node in nodes}
                told = said & {"error", "problem", "reason", "why", "note"}
                assert "public" in said or not told, (file, call.lineno)
