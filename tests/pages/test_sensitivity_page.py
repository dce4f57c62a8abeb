import contextlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from threading import Event
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
from made_results import made_result
from opening import open_page, text
from store_processes import heard, lock_and_wait, process
from streamlit.testing.v1 import AppTest

import intrafusion as itf
from intrafusion._registry import MERGES
from intrafusion.pruning.merge import drop, fusion
from intrafusion.runtime.cancellation import checkpoint
from intrafusion.studies.cluster import driver
from intrafusion.studies.measurement import Result, run_spec
from intrafusion.studies.sensitivity import difference, sensitivity_matrix
from intrafusion.studies.session import Session, open_session
from intrafusion.studies.store import in_memory
from intrafusion.studies.store import sqlite as stores
from intrafusion.studies.store.in_memory import StoreOrMemory
from intrafusion.studies.store.sqlite import Store
from intrafusion.studies.study_file import Study
from intrafusion.studies.sweeps import origin, sweep
from pages.panels import sensitivity
from pages.panels.allocation import in_words
from pages.shared import studying

pytestmark = pytest.mark.usefixtures("jobs")

PATIENCE = 240
SMALL = {"model": "digits-mlp", "study_sparsities": ["30", "70"]}
LOOKS = {**SMALL, "criterion": "taylor"}  # looks at images, and so waits to be asked
POINTS = 8  # two groups, two sparsities, two merges


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(itf.PruneSpec(model="digits-mlp"))


@pytest.fixture
def third() -> Iterator[None]:
    """A third merge, as later versions have: it fuses, and so equals fusion."""
    MERGES.register("third", "fuses, too")(fusion)
    yield
    del MERGES["third"]


def open_sensitivity(**query) -> AppTest:
    app = open_page("sensitivity", **query)
    assert not app.exception
    return app


def progress(app: AppTest) -> str:
    """What the page says of the study (the sidebar lists jobs too)."""
    return next(bar.proto.text for bar in app.main.get("progress") if " points on " in bar.proto.text)


def until(app: AppTest, condition: Callable[[AppTest], bool]) -> AppTest:
    deadline = time.monotonic() + PATIENCE
    while not condition(app):
        assert time.monotonic() < deadline, f"waited in vain: {progress(app)}"
        time.sleep(0.1)
        app.run()
    assert not app.exception
    return app


def settled(app: AppTest, says: str = "done") -> AppTest:
    return until(app, lambda app: says in progress(app))


def suggested(app: AppTest) -> AppTest:
    """The page once the suggested sparsities are measured on all images, not on a sample alone."""
    return until(app, lambda app: re.search(r"measured \*\*.*\*\*.* on 597 images", text(app)) is not None)


def press(app: AppTest, label: str) -> AppTest:
    next(button for button in app.main.button if button.label == label).click().run()
    return app


def labels(app: AppTest) -> list[str]:
    return [button.label for button in app.main.button]


def figures(app: AppTest) -> dict[str, dict]:
    """The page's pictures by title."""
    specs = [json.loads(element.proto.spec) for element in app.get("plotly_chart")]
    return {spec["layout"]["title"]["text"]: spec for spec in specs}


def headings(app: AppTest) -> list[str]:
    return [element.value for element in app.subheader]


def frames(spec: dict) -> set[tuple[float, float]]:
    """Column and row of the chosen cell."""
    return {(s["x0"] + 0.5, s["y0"] + 0.5) for s in spec["layout"]["shapes"] if s["type"] == "rect"}


class TestStudy:
    def test_a_cheap_one_runs_unasked_and_the_page_shows_what_the_library_measures(self, session):
        app = settled(open_sensitivity(**SMALL))
        assert not app.error
        assert not app.warning
        assert headings(app) == [
            "Group 1", "Fragile groups", "Suggested sparsities", "Comparison with another study", "Share and reproduce",
        ]  # fmt: skip
        rows = app.dataframe[0].value
        assert len(rows) == POINTS
        base = itf.PruneSpec(model="digits-mlp", groups="all", sparsity=0.0)
        study = Study("any", base, {"groups": ("each",), "sparsity": (0.3, 0.7), "merge": ("drop", "fusion")})
        measured = {result.spec: result for result in sweep(study.specs(session.groups), session)}
        said = {(row.group, row.sparsity, row.merge): row.accuracy for row in rows.itertuples()}
        assert said == {(s.groups[0], s.sparsity, s.merge): r.accuracy for s, r in measured.items()}
        assert labels(app) == ["Run study"]
        assert app.main.button[0].disabled

    def test_one_that_looks_at_images_waits_to_be_asked_and_can_be_taken_away_before(self):
        app = open_sensitivity(**LOOKS)
        assert progress(app) == f"0 of {POINTS} points on 597 images: not computed yet"
        assert "Press *Run study*" in text(app)
        assert "Nothing is measured yet" in figures(app)
        assert any(code.value.startswith("python -m intrafusion sweep") for code in app.code)
        settled(press(app, "Run study"))
        assert len(app.dataframe[0].value) == POINTS

    def test_it_is_stored_under_its_settings_and_the_next_server_knows_its_points(self, jobs):
        settled(open_sensitivity(**LOOKS), "not computed yet")
        settled(press(open_sensitivity(**LOOKS), "Run study"))
        with Store() as store:
            (row,) = store.studies()
            assert (row.name, row.points, row.done) == ("digits-mlp taylor", POINTS, POINTS)
        jobs._jobs.clear()
        assert progress(open_sensitivity(**LOOKS)) == f"{POINTS} of {POINTS} points on 597 images: done"
        assert jobs.queue() == []

    def test_curves_of_a_group_take_its_points_from_the_study(self, jobs):
        settled(open_sensitivity(**SMALL))
        jobs._jobs.clear()
        app = open_page("curves", model="digits-mlp", scope="this group", sparsities=["30", "70"])
        assert not app.exception
        assert progress(app) == "4 of 4 points on 597 images: done"
        assert jobs.queue() == []

    def test_it_is_cancelled_what_is_there_stays_and_it_goes_on(self, monkeypatch):
        free = Event()

        def stuck(specs, session, store, **options) -> Iterator[Result]:
            results = sweep(specs, session, store, **options)
            yield next(results)
            while not free.is_set():
                checkpoint()
                time.sleep(0.001)
            yield from results

        monkeypatch.setattr(sensitivity, "sweep", stuck)
        app = press(open_sensitivity(**LOOKS), "Run study")
        until(app, lambda app: "1 on a sample so far" in progress(app))
        assert labels(app) == ["Cancel"]
        assert "appear when this study is done" in text(app)
        press(app, "Cancel")
        assert "cancelled; finished points are kept; 1 on a sample so far" in progress(app)
        free.set()
        assert len(app.dataframe[0].value) == 1
        assert "on fewer images so far" in figures_text(app)
        settled(press(app, "Continue"))

    def test_a_reload_and_another_reader_find_it_running(self, monkeypatch):
        free = Event()

        def waiting(specs, session, store, **options) -> Iterator[Result]:
            while not free.is_set():
                checkpoint()
                time.sleep(0.001)
            yield from sweep(specs, session, store, **options)

        monkeypatch.setattr(sensitivity, "sweep", waiting)
        press(open_sensitivity(**LOOKS), "Run study")
        other = open_sensitivity(**LOOKS)
        assert labels(other) == ["Cancel"]
        assert "computing" in progress(other)
        (row,) = [bar.proto.text for bar in other.sidebar.get("progress")]
        assert row.startswith("sensitivity of digits-mlp")
        free.set()
        settled(other)

    def test_it_is_done_when_its_work_has_ended_not_when_the_last_point_is_in(self, monkeypatch):
        free = Event()

        def lingering(specs, session, store, **options) -> Iterator[Result]:
            yield from sweep(specs, session, store, **options)
            while not free.is_set():
                checkpoint()
                time.sleep(0.001)

        monkeypatch.setattr(sensitivity, "sweep", lingering)
        app = until(open_sensitivity(**SMALL), lambda app: f"{POINTS} of {POINTS} points" in progress(app))
        assert "computing" in progress(app)
        assert "appear when this study is done" in text(app)
        free.set()
        assert "Fragile groups" in headings(settled(app))

    def test_points_that_fail_are_told_by_their_reason_and_the_others_go_on(self):
        def brittle(model, group, plan) -> None:
            if group.name == "3":
                raise itf.IntrafusionError("this merge cannot take group 3")
            drop(model, group, plan)

        MERGES.register("brittle", "breaks on one group")(brittle)
        try:
            app = settled(open_sensitivity(**SMALL, study_merges=["drop", "brittle"]), "done; 2 failed")
        finally:
            del MERGES["brittle"]
        (warning,) = app.warning
        assert warning.value == (
            "Group 3 at 30%, l1, brittle, and 1 more points could not be measured: this merge cannot take group 3"
        )
        assert len(app.dataframe[0].value) == POINTS - 2

    def test_what_runs_is_what_the_way_says(self, monkeypatch):
        asked = {}

        def on_cluster(specs, session, store, **options) -> Iterator[Result]:
            asked.update(options)
            yield from sweep(specs, session, store)

        monkeypatch.setattr(driver, "sweep_on_cluster", on_cluster)
        monkeypatch.setattr(sensitivity, "find_spec", lambda name: object())
        monkeypatch.setattr(sensitivity, "has_bf16", lambda device: False)
        query = {"executor": "Ray cluster", "address": "host:6379", "decide": "true", "precision": "fast"}
        app = open_sensitivity(**SMALL, **query)
        assert "not computed yet" in progress(app)  # a cluster is never asked unasked
        assert "Fast needs a device with bfloat16" in text(app)
        settled(press(app, "Run study"))
        assert asked == {"decide": True, "address": "host:6379"}
        (line,) = [code.value for code in app.code if "intrafusion sweep" in code.value]
        assert line.endswith("--decide --executor ray --address host:6379")
        assert "precision" not in line

    def test_without_ray_the_choice_explains_itself(self, monkeypatch):
        monkeypatch.setattr(sensitivity, "find_spec", lambda name: None)
        app = open_sensitivity(**LOOKS, executor="Ray cluster")
        assert "needs the package ray" in text(app)
        assert "--executor" not in text(app)

    @pytest.mark.parametrize("broken", ["a folder", "another program's", "nonsense"])
    def test_without_a_store_the_page_says_so_in_one_line_and_works(self, broken, monkeypatch, tmp_path):
        path = tmp_path / "store"
        if broken == "a folder":
            path.mkdir()
        else:
            path.write_bytes(b"SQLite format 3\0" if broken == "another program's" else b"no database, certainly" * 99)
        monkeypatch.setenv("INTRAFUSION_STORE", str(path))
        app = settled(open_sensitivity(**SMALL))
        (warning,) = app.warning
        assert warning.value.startswith("Results will be lost when the server stops: ")
        assert "\n" not in warning.value
        assert len(app.dataframe[0].value) == POINTS

    def test_while_another_program_locks_the_store_results_wait_and_the_page_says_so(self, monkeypatch, tmp_path):
        path = tmp_path / "store"
        monkeypatch.setenv("INTRAFUSION_STORE", str(path))
        monkeypatch.setattr(studying, "StoreOrMemory", partial(StoreOrMemory, wait=0.05))
        monkeypatch.setattr(in_memory, "_AGAIN", 0.5)
        open_sensitivity(**LOOKS)
        with process(lock_and_wait, path) as (_, pipe):
            assert heard(pipe) == "locked"
            app = settled(press(open_sensitivity(**LOOKS), "Run study"))
            (warning,) = [warning.value for warning in app.warning]
            assert warning.startswith("Jobs continue, and their results are held in memory: ")
            assert "locked by another program" in warning
            assert len(app.dataframe[0].value) == POINTS
        until(app, lambda app: not app.warning)
        with Store(path) as store:
            (row,) = store.studies()
            assert len(store.results(row.name)) == POINTS


def figures_text(app: AppTest) -> str:
    return json.dumps(list(figures(app).values()))


class TestPicture:
    def test_the_chosen_cell_is_framed_and_told(self):
        app = settled(open_sensitivity(**SMALL))
        app.selectbox(key="group").set_value("3")
        app.button_group(key="cell").set_value(30).run()
        panels = next(spec for title, spec in figures(app).items() if title.startswith("Fusion"))
        assert frames(panels) == {(0, 1)}
        assert headings(app)[0] == "Group 3"
        rows = app.dataframe[0].value.query("group == '3' and sparsity == 0.3").set_index("merge")
        for merge in ("drop", "fusion"):
            assert f"**{merge}**: {rows.accuracy[merge]:.1%} ± " in text(app)
        gap = 100 * (rows.accuracy["fusion"] - rows.accuracy["drop"])
        assert f"**fusion − drop: {gap:+.1f} points**".replace("-", "−") in text(app)

    @pytest.mark.parametrize("merge", ["drop", "fusion"])
    def test_one_merge_alone_has_a_heatmap_and_no_difference(self, merge):
        app = settled(open_sensitivity(**SMALL, study_merges=merge))
        assert next(iter(figures(app))).startswith(f"With {merge}, ")
        assert "at least two merges" in text(app)
        assert " − " not in text(app)

    def test_of_three_merges_the_reader_chooses_the_pair(self, third):
        app = settled(open_sensitivity(**SMALL, study_merges=["drop", "third", "fusion"]))
        assert (app.selectbox(key="first_merge").value, app.selectbox(key="second_merge").value) == ("third", "drop")
        assert any(title.startswith("With fusion, ") for title in figures(app))  # the one that is in no difference
        app.selectbox(key="first_merge").set_value("drop").run()
        assert app.selectbox(key="second_merge").options == ["third", "fusion"]
        app.selectbox(key="first_merge").set_value("fusion").run()
        app.selectbox(key="second_merge").set_value("third").run()
        assert not app.exception
        assert any(title.startswith("No clear difference between fusion and third") for title in figures(app))

    def test_a_criterion_without_any_choice_says_what_to_choose(self):
        app = open_sensitivity(**SMALL)
        app.multiselect(key="study_sparsities").set_value([]).run()
        assert "Choose at least one merge and one sparsity" in app.info[0].value

    def test_nothing_pruned_is_said_of_a_cell(self):
        def page() -> None:
            from made_results import made_result

            from intrafusion.studies.sensitivity import sensitivity_matrix
            from pages.panels.sensitivity import cell_in_words

            results = [made_result("a", 0.1, merge, 0.9, channels=(10, 10)) for merge in ("drop", "fusion")]
            made = {merge: sensitivity_matrix(results, merge) for merge in ("drop", "fusion")}
            cell_in_words(made, ("fusion", "drop"), ("a", 0.1))

        app = AppTest.from_function(page).run()
        assert not app.exception
        assert text(app).startswith("**Nothing was pruned**: all 10 channels are kept")

    def test_chance_is_called_so(self):
        right = [[True] * 60 + [False] * 40, [True] * 20 + [False] * 80]
        made = [sensitivity_matrix([made_result("a", 0.5, right=each)], "fusion") for each in right]
        sure = difference(*made).cells["a", 0.5].pairs[0]
        same = difference(made[0], made[0]).cells["a", 0.5].pairs[0]
        names = ("fusion", "drop")
        assert sensitivity.pair_in_words(sure, names).endswith(
            "Only fusion is correct on 40 images, only drop on 0: a significant difference."
        )
        assert "**fusion − drop: +40.0 points**" in sensitivity.pair_in_words(sure, names)
        assert sensitivity.pair_in_words(same, names).endswith("which may be chance.")

    @pytest.mark.parametrize(
        ("better", "says"),
        [
            (60, ": fusion is better on all images."),
            (20, ", which does not decide yet which is better."),
            (0, ": drop is better on all images."),
        ],
    )
    def test_the_first_images_speak_of_all(self, better, says):
        right = [[True] * count + [False] * (100 - count) for count in (better, 20 if better else 60)]
        made = [sensitivity_matrix([made_result("a", 0.5, right=each, total=2000)], "fusion") for each in right]
        words = sensitivity.pair_in_words(difference(*made).cells["a", 0.5].pairs[0], ("fusion", "drop"))
        assert "points** (95 % for all 2,000 images: " in words
        assert words.endswith(says)


class TestSmallerNetwork:
    def test_both_accuracies_are_shown_and_the_measured_one_is_the_librarys(self, session):
        app = settled(open_sensitivity(**SMALL, share="40"))
        values = {metric.label: metric.value for metric in app.metric}
        line = next(code.value for code in app.code if "--sparsities" in code.value)
        groups, shares = re.search(r"--groups (.*?) --.*--sparsities (.*?) --", line).groups()
        spec = itf.PruneSpec(model="digits-mlp", groups=tuple(groups.split()), sparsities=tuple(map(float, shares.split())))
        result = run_spec(spec, session)
        assert values["Measured accuracy"].startswith(f"{result.accuracy:.1%} ± ")
        assert values["MACs"] == f"{result.macs / result.macs_before:.0%}"
        assert result.macs <= 0.4 * result.macs_before
        assert f"Expected {values['Expected accuracy']}, measured **{values['Measured accuracy']}**" in text(app)

    @pytest.mark.parametrize(
        ("query", "says"),
        [
            ({"budget": "parameters", "share": "5"}, "of the parameters remain even at the largest measured sparsities"),
            ({"budget": "MACs", "share": "5"}, "of the MACs remain even at the largest measured sparsities"),
            ({"budget": "accuracy", "least": "100"}, "100.0% is above the"),
        ],
    )
    def test_a_target_out_of_reach_is_said(self, query, says):
        app = settled(open_sensitivity(**SMALL, **query))
        assert says in app.warning[0].value

    def test_an_accuracy_that_is_asked_for_is_looked_for(self):
        app = settled(open_sensitivity(**SMALL, budget="accuracy", least="97"))
        assert re.search(r"The target of 97\.0% is (not )?met\.", text(app))

    def test_a_target_that_the_network_meets_as_it_is_prunes_nothing(self):
        app = settled(open_sensitivity(**SMALL, share="100"))
        assert "needs no pruning" in app.info[0].value

    @pytest.mark.parametrize(
        ("expected", "least", "words"),
        [
            (0.97, None, "Expected 97.0%, measured **95.0% ± 1.5**: pruned together, the groups lose more than the sum"),
            (0.94, None, "measured **95.0% ± 1.5**: the losses add up within the interval on 400 images."),
            (0.92, None, "the groups lose less than the sum of their separate losses."),
            (0.95, 0.9, "images. The target of 90.0% is met."),
            (0.95, 0.96, "images. The target of 96.0% is not met."),
        ],
    )
    def test_whether_the_losses_add_up_is_said_in_words(self, expected, least, words):
        measured = SimpleNamespace(accuracy=0.95, interval=(0.935, 0.965), count=400)
        assert words in in_words(SimpleNamespace(accuracy=expected), measured, least)


class TestOtherStudies:
    def test_two_criteria_are_compared_on_the_same_images(self):
        settled(open_sensitivity(**SMALL))
        app = settled(open_sensitivity(**SMALL, criterion="l2"))
        assert app.selectbox(key="other_study").options == ["digits-mlp l1"]
        app.selectbox(key="other_study").set_value("digits-mlp l1").run()
        assert not app.warning
        assert any(title.startswith("digits-mlp l2 is better than digits-mlp l1 in") for title in figures(app))

    def test_results_of_other_code_are_said_to_be_and_measured_again(self, jobs, monkeypatch):
        settled(open_sensitivity(**SMALL))
        settled(open_sensitivity(**SMALL, criterion="l2"))
        jobs._jobs.clear()
        monkeypatch.setattr(stores, "code_version", lambda: "another")
        app = settled(open_sensitivity(**SMALL, criterion="l2", other_study="digits-mlp l1"))
        with Store() as store:
            done = {row.name: (row.points, row.done, row.older) for row in store.studies()}
        assert done == {"digits-mlp l2": (POINTS, POINTS, POINTS), "digits-mlp l1": (POINTS, 0, POINTS)}
        assert "results of “digits-mlp l1” come from another code version" in text(app)
        settled(open_sensitivity(**SMALL))
        app = settled(open_sensitivity(**SMALL, criterion="l2", other_study="digits-mlp l1"))
        assert "another version of the code" not in text(app)
        assert not app.warning

    def test_studies_of_other_networks_and_broken_ones_are_left_out(self):
        with Store() as store:
            store.save_study("broken", "this is no TOML", [])
            store.save_study("of another network", Study("x", itf.PruneSpec(), {"sparsity": (0.5,)}).to_toml(), [])
        app = settled(open_sensitivity(**SMALL))
        assert not app.error
        assert "to compare the two here" in text(app)

    def test_other_images_are_refused_in_one_line(self):
        settled(open_sensitivity(**SMALL, study_name="few", study_limit="500"))
        app = settled(open_sensitivity(**SMALL, other_study="few"))
        assert "results on different images" in app.warning[0].value

    def test_a_stored_study_of_this_name_gives_way_only_when_asked(self):
        settled(open_sensitivity(**SMALL, study_name="mine"))
        app = settled(open_sensitivity(**SMALL, study_name="mine", criterion="l2"))
        with Store() as store:
            assert Study.from_toml(store.study("mine").text).base.criterion == "l1"
            settled(press(app, "Replace and run"))
            assert Study.from_toml(store.study("mine").text).base.criterion == "l2"
        assert labels(app.run()) == ["Run study"]

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({}, "digits-resnet l1"),
            ({"criterion": "l2", "solver": "sinkhorn", "reg": 0.5}, "digits-resnet l2, solver sinkhorn, reg 0.5"),
            ({"weights": "/here/my net.pt", "precision": "fast"}, "digits-resnet (my net) l1, precision fast"),
        ],
    )
    def test_a_study_without_a_name_is_named_after_its_settings(self, changes, name):
        assert sensitivity.automatic_name(itf.PruneSpec(**changes)) == name


class TestTakingAway:
    def test_a_permalink_restores_the_page(self):
        app = settled(open_sensitivity(**SMALL, study_name="mine"))
        app.selectbox(key="group").set_value("3")
        app.button_group(key="cell").set_value(30)
        app.selectbox(key="budget").set_value("accuracy").run()
        app = suggested(app.slider(key="least").set_value(95.0).run())
        link = next(code.value for code in app.code if code.value.startswith("http"))
        again = suggested(settled(open_sensitivity(**parse_qs(urlsplit(link).query))))
        assert figures(again) == figures(app)
        assert [m.value for m in again.markdown] == [m.value for m in app.markdown]
        assert again.text_input(key="study_name").value == "mine"

    @pytest.mark.parametrize(
        "query",
        [
            {"study_merges": "nonsense"},
            {"study_sparsities": "900"},
            {"cell": "45"},
            {"cell": "abc"},
            {"precision": "nonsense"},
            {"executor": "nonsense"},
            {"budget": "nonsense"},
            {"share": "900"},
            {"other_study": "nonsense"},
            {"compared_merge": "nonsense"},
            {"first_merge": "drop", "second_merge": "drop"},
        ],
    )
    def test_a_bad_link_falls_back(self, query, jobs):
        app = open_sensitivity(**{**LOOKS, **query})
        assert not app.error
        assert "Share and reproduce" in text(app)

    def test_the_snippet_on_the_page_runs(self):
        app = settled(open_sensitivity(**SMALL))
        snippet = next(code.value for code in app.code if code.value.startswith("import intrafusion"))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(snippet, {})
        assert printed.getvalue().count("Result(spec=") == POINTS  # all of them from the store

    def test_the_stored_text_is_the_study_on_the_page(self, session):
        settled(open_sensitivity(**SMALL, solver="sinkhorn", reg="0.5"))
        with Store() as store:
            (row,) = store.studies()
            study = Study.from_toml(row.text)
            assert [result.spec for result in store.results(row.name)] == study.specs(session.groups)
            known = store.get((spec, origin(spec, session)) for spec in study.specs(session.groups))
        assert len(known) == POINTS
        assert (study.base.solver, study.base.reg) == ("sinkhorn", 0.5)

    def test_missing_images_offer_a_download(self, monkeypatch, tmp_path):
        monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
        app = open_sensitivity(model="cifar10-resnet20", weights="random")
        assert "not on this machine yet" in app.info[0].value
        assert labels(app) == ["Download CIFAR-10 (170 MB)"]
