import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from gates import PATIENCE, Gate, until
from opening import open_page, text
from streamlit.testing.v1 import AppTest

from intrafusion.runtime.jobs import Job, Jobs
from pages.shared import background_jobs, job_panel


@pytest.fixture
def jobs(monkeypatch) -> Iterator[Jobs]:
    """The server's jobs, none at first."""
    made = Jobs(turn=60)
    monkeypatch.setattr(background_jobs, "jobs", lambda: made)
    yield made
    made.stop(PATIENCE)


@pytest.fixture
def two(jobs) -> tuple[Job, Job]:
    """Somebody's study computes, and another's waits."""
    first = jobs.start("first", 18, Gate(), "curve of digits-resnet", who="203.0.113.1")
    until(lambda: first.state == "running")
    return first, jobs.start("second", 3, Gate(), "scores of digits-vgg", who="203.0.113.2")


def rows(app: AppTest) -> list[str]:
    return [bar.proto.text for bar in app.sidebar.get("progress")]


def headings(app: AppTest) -> list[str]:
    return [words.value for words in app.sidebar.markdown if "Running jobs" in words.value]


def cancels(app: AppTest) -> list:
    return [button for button in app.sidebar.button if button.label == "Cancel"]


@pytest.mark.parametrize("page", ["overview", "transport"])
def test_nothing_is_shown_while_nobody_computes(page, jobs):
    app = open_page(page)
    assert not app.exception
    assert (rows(app), headings(app), cancels(app)) == ([], [], [])


CORNERS = {
    "a page": ("overview", {}),
    "a page that stops early": ("curves", {"model": "cifar10-resnet20", "weights": "random"}),
    "weights that are not here": ("overview", {"model": "cifar10-resnet56"}),
    "weights that are wrong": ("transport", {"weights": "/nowhere.pt"}),
}


@pytest.mark.parametrize(("page", "query"), CORNERS.values(), ids=CORNERS)
def test_everybody_sees_what_is_computed_and_who_waits(page, query, two, monkeypatch, tmp_path):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))
    app = open_page(page, **query)
    assert not app.exception
    assert headings(app) == ["**Running jobs**"]
    assert rows(app) == [
        "curve of digits-resnet  \n:gray[0 of 18 done]",
        "scores of digits-vgg  \n:gray[waiting, next in line]",
    ]
    assert "in turns." in text(app)
    assert cancels(app) == []  # they are others'


def test_when_all_is_done_the_queue_goes(two):
    app = open_page("overview")
    for job in two:
        job.cancel()
        job.wait(PATIENCE)
    app.run()
    assert (rows(app), headings(app)) == ([], [])


def asking_page() -> None:
    """The queue, and then a page whose button starts a job, as in app.py."""
    import streamlit as st

    from pages.shared import background_jobs, job_queue

    job_queue.show_queue()
    if st.button("Start"):
        background_jobs.start_job("mine", 4, st.session_state.work, "my study")
        st.rerun()


@pytest.fixture
def app(jobs) -> AppTest:
    app = AppTest.from_function(asking_page)
    app.session_state.work = Gate()
    return app.run()


def test_a_job_that_the_page_just_started_is_there_at_once_and_its_owner_can_stop_it(app, two):
    app.run()
    assert len(rows(app)) == 2
    app.main.button[0].click().run()
    assert rows(app)[2] == "my study  \n:gray[waiting, 2 ahead]"
    (cancel,) = cancels(app)
    cancel.click().run()
    assert len(rows(app)) == 2
    assert cancels(app) == []
    assert [job.state for job in two] == ["running", "waiting"]


def test_a_running_job_is_stopped_in_the_middle_of_a_result(app, jobs):
    app.main.button[0].click().run()
    until(lambda: jobs.get("mine").state == "running")
    app.session_state.work.results.release()
    until(lambda: len(jobs.get("mine").results) == 1)
    app.run()
    assert rows(app) == ["my study  \n:gray[1 of 4 done]"]
    cancels(app)[0].click().run()
    assert (jobs.get("mine").state, jobs.get("mine").results) == ("cancelled", [0])
    assert rows(app) == []


def test_what_somebody_else_started_under_the_same_key_is_shared(app, jobs):
    jobs.start("mine", 4, Gate(), "their study")
    app.main.button[0].click().run()
    assert [row.split("  \n")[0] for row in rows(app)] == ["their study"]


def asked_page() -> None:
    import streamlit as st

    from pages.shared import job_panel, job_queue

    job_queue.show_queue()
    job_panel.ask(("scores",), "Compute chip", 4, st.session_state.work, "Not computed yet: chip")


def test_asked_work_says_how_far_it_is_on_its_page_and_in_the_sidebar(jobs):
    app = AppTest.from_function(asked_page)
    app.session_state.work = Gate()
    app.session_state.here = SimpleNamespace(spec=SimpleNamespace(model="digits-vgg"))
    app.run().main.button[0].click().run()
    (job,) = jobs.queue()
    for count in range(1, 4):
        time.sleep(0.01)
        app.session_state.work.results.release()
        until(lambda count=count: len(job.results) == count)
    app.run()
    assert app.main.get("progress")[0].proto.text == "Not computed yet: chip; 3 of 4 done, about 1 s left"
    assert rows(app) == ["Compute chip, digits-vgg  \n:gray[3 of 4 done, about 1 s left]"]
    app.main.button[0].click().run()
    assert not app.exception
    assert job.state == "cancelled"
    assert "Cancelled; finished results are kept" in text(app)
    assert rows(app) == []


def test_rows_stay_where_they_are_while_turns_go_round(monkeypatch):
    made, works = Jobs(turn=0), [Gate(), Gate()]
    monkeypatch.setattr(background_jobs, "jobs", lambda: made)
    try:
        first, second = (made.start(number, 4, work, f"study {number}") for number, work in enumerate(works))
        app = AppTest.from_function(asking_page).run()
        assert [row.split("  \n")[0] for row in rows(app)] == ["study 0", "study 1"]
        works[0].results.release()
        until(lambda: first.done == 1)
        until(lambda: made.queue() == [second, first])  # turns go round at each checkpoint
        app.run()
        assert rows(app)[0] == "study 0  \n:gray[1 of 4 done]"  # and not that it waits: its turn comes every second
    finally:
        made.stop(PATIENCE)


class Seen(Job):
    """A job as its page sees it, without a thread."""

    def __init__(self, total=18, done=0.0, left=None, ahead=0, state="running", started=1.0):
        self.total, self.left, self.ahead, self.started = total, left, ahead, started
        self.said_done, self.said_state = done, state

    done = property(lambda self: self.said_done)
    state = property(lambda self: self.said_state)


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Seen(), "0 of 18 done"),
        (Seen(done=7.4, left=12.2), "7 of 18 done, about 12 s left"),
        (Seen(done=7, left=200, state="waiting"), "7 of 18 done, about 3 min 20 s left"),
        (Seen(total=1), "computing"),
        (Seen(total=0), "computing"),
        (Seen(total=1, done=0.42, left=80), "42% done, about 1 min 20 s left"),
        (Seen(started=None, state="waiting", ahead=1), "waiting, next in line"),
        (Seen(started=None, state="waiting", ahead=3), "waiting, 3 ahead"),
        (Seen(done=7, left=12, state="stopping"), "stopping"),
    ],
)
def test_how_far_a_job_is_is_said_in_words(job, words, monkeypatch):
    monkeypatch.setattr(Jobs, "ahead", lambda self, job: job.ahead)
    monkeypatch.setattr(Jobs, "seconds_left", lambda self, job: job.left)
    assert job_panel.words(job) == words
