import threading
from collections.abc import Callable, Iterator

import pytest

import intrafusion as itf
from intrafusion.jobs import Job, Jobs

PATIENCE = 10  # seconds that no test waits for, unless it fails


class Tap:
    """Work that yields 0, 1, 2, ... each time the test lets it."""

    def __init__(self, count: int = 3):
        self.count, self.closed = count, threading.Event()
        self.started = threading.Event()
        self.turns = threading.Semaphore(0)

    def __call__(self) -> Iterator[int]:
        self.started.set()
        try:
            for number in range(self.count):
                assert self.turns.acquire(timeout=PATIENCE)
                yield number
        finally:
            self.closed.set()

    def let(self, results: int = 1) -> None:
        self.turns.release(results)


@pytest.fixture
def tap() -> Iterator[Callable[..., Tap]]:
    taps: list[Tap] = []

    def make(count: int = 3) -> Tap:
        taps.append(Tap(count))
        return taps[-1]

    yield make
    for each in taps:
        each.let(100)


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(PATIENCE * 100):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail("waited in vain")


def finished(job: Job) -> Job:
    job.wait(PATIENCE)
    assert not job.active
    return job


def test_results_arrive_one_by_one(tap):
    work = tap()
    job = Jobs().start("key", 3, work)
    assert job.active
    for count in range(3):
        assert job.results == list(range(count))
        assert job.state in ("waiting", "running")
        work.let()
        until(lambda count=count: len(job.results) > count)
    assert finished(job).results == [0, 1, 2]
    assert (job.state, job.error, job.total) == ("done", None, 3)


@pytest.mark.parametrize("total", [3, 0], ids=["known length", "unknown length"])
def test_cancelled_job_keeps_what_is_there_and_closes_its_work(tap, total):
    work = tap()
    job = Jobs().start("key", total, work)
    work.let()
    until(lambda: len(job.results) == 1)
    job.cancel()
    work.let()  # a job stops between two results
    assert finished(job).state == "cancelled"
    assert job.results == [0, 1]
    assert work.closed.wait(PATIENCE)


def test_job_that_was_complete_when_it_was_cancelled_is_done(tap):
    work = tap(2)
    job = Jobs().start("key", 2, work)
    work.let()
    until(lambda: len(job.results) == 1)
    job.cancel()
    work.let()
    assert finished(job).state == "done"
    assert job.results == [0, 1]


def test_cancelling_a_finished_job_changes_nothing():
    job = finished(Jobs().start("key", 1, lambda: iter([7])))
    job.cancel()
    assert (job.state, job.results) == ("done", [7])


FAILURES = {
    "one of ours": (itf.IntrafusionError("no such thing: choose another"), "no such thing: choose another"),
    "any other": (RuntimeError("out of memory\nTried to allocate\n  lots"), "RuntimeError: out of memory"),
    "without words": (KeyError(), "KeyError"),
    "blank": (ValueError("\n"), "ValueError"),
}


@pytest.mark.parametrize(("failure", "words"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("before", [0, 2])
def test_failure_is_one_line_and_keeps_what_is_there(failure, words, before):
    def work() -> Iterator[int]:
        yield from range(before)
        raise failure

    jobs = Jobs()
    job = finished(jobs.start("key", 5, work))
    assert job.state == "failed"
    assert job.error.startswith(words)
    assert "\n" not in job.error
    assert job.results == list(range(before))
    assert finished(jobs.start("next", 1, lambda: iter([1]))).state == "done"  # the turn is free again


def test_failure_before_the_first_result_is_told():
    def work() -> Iterator[int]:
        raise itf.IntrafusionError("refused")

    assert finished(Jobs().start("key", 1, work)).error == "refused"


def test_unexpected_failure_is_logged_with_its_traceback(caplog):
    def work() -> Iterator[int]:
        raise ZeroDivisionError("by zero")
        yield

    finished(Jobs().start("key", 1, work))
    assert "ZeroDivisionError" in caplog.text
    assert "Traceback" in caplog.text


def test_two_jobs_run_one_at_a_time_in_the_end_both(tap):
    jobs, first_work, second_work = Jobs(), tap(1), tap(1)
    first = jobs.start("first", 1, first_work)
    until(first_work.started.is_set)
    second = jobs.start("second", 1, second_work)
    assert not second_work.started.wait(0.25)
    assert (first.state, second.state) == ("running", "waiting")
    assert second.active
    first_work.let()
    until(second_work.started.is_set)
    assert finished(first).state == "done"
    second_work.let()
    assert finished(second).results == [0]


def test_waiting_job_can_be_cancelled_while_the_other_runs(tap):
    jobs, first_work, second_work = Jobs(), tap(1), tap(1)
    first = jobs.start("first", 1, first_work)
    until(first_work.started.is_set)
    second = jobs.start("second", 1, second_work)
    second.cancel()
    assert finished(second).state == "cancelled"
    assert first.state == "running"
    first_work.let()
    assert finished(first).state == "done"
    assert not second_work.started.is_set()
    assert second.results == []


def test_job_that_was_cancelled_while_waiting_does_not_take_its_turn():
    turn, computed = threading.Lock(), []
    turn.acquire()
    job = Job(3, lambda: iter(computed.append("x") or range(3)), turn)
    job.cancel()
    turn.release()
    assert finished(job).state == "cancelled"
    assert (computed, job.results) == ([], [])


def test_same_key_is_the_same_job_while_it_runs_and_a_new_one_after(tap):
    jobs, work = Jobs(), tap(1)
    job = jobs.start("key", 1, work)
    assert jobs.start("key", 1, tap(1)) is job
    assert jobs.get("key") is job
    work.let()
    finished(job)
    assert jobs.get("key") is job  # a reload still finds its result
    again = jobs.start("key", 1, lambda: iter([5]))
    assert again is not job
    assert jobs.get("key") is again
    assert finished(again).results == [5]


def test_unknown_key_is_no_job():
    assert Jobs().get("nothing") is None


def test_oldest_finished_jobs_are_forgotten_beyond_the_limit():
    jobs = Jobs(limit=3)
    for number in range(6):
        finished(jobs.start(number, 1, lambda: iter([1])))
    assert [number for number in range(6) if jobs.get(number)] == [3, 4, 5]


def test_running_jobs_are_never_forgotten(tap):
    jobs, work = Jobs(limit=2), [tap(1) for _ in range(4)]
    running = [jobs.start(number, 1, work[number]) for number in range(4)]
    assert [jobs.get(number) for number in range(4)] == running
    for job, each in zip(running, work, strict=True):
        each.let()
        assert finished(job).state == "done"


def test_many_askers_of_one_key_get_one_job(tap):
    jobs, work, found = Jobs(), tap(1), []
    calls = []

    def counted() -> Iterator[int]:
        calls.append(1)
        return work()

    askers = [threading.Thread(target=lambda: found.append(jobs.start("key", 1, counted))) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    work.let()
    assert len(set(map(id, found))) == 1
    finished(found[0])
    assert calls == [1]


def test_stopping_all_jobs_cancels_the_running_and_the_waiting_one(tap):
    jobs, running, waiting = Jobs(), tap(), tap()
    first = jobs.start("first", 3, running)
    assert running.started.wait(PATIENCE)
    second = jobs.start("second", 3, waiting)
    running.let(3)
    jobs.stop(PATIENCE)
    assert not first.active
    assert second.state == "cancelled"
    assert not waiting.started.is_set()
