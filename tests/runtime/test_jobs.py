import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import copy_context
from pathlib import Path

import pytest
import torch

import intrafusion as itf
from intrafusion.runtime import jobs as jobs_module
from intrafusion.runtime.cache import Cache
from intrafusion.runtime.cancellation import beside, checkpoint
from intrafusion.runtime.jobs import Job, Jobs, Line

PATIENCE = 240  # seconds that no test waits for, unless it fails


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


@pytest.fixture(autouse=True, scope="module")
def _only_new_objects_are_collected() -> Iterator[None]:
    """Each job's end collects garbage, which takes a fifth of a second where all of torch is looked through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
    assert job.state == "stopping"
    assert job.active
    work.let()  # work without checkpoints stops between two results
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
    "any other": (RuntimeError("no such shape\nTried it\n  twice"), "RuntimeError: no such shape"),
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


def test_job_that_was_cancelled_while_waiting_does_not_take_its_turn(tap):
    line, work, computed = Line(), tap(1), []
    first = Job("first", 1, work, line=line)
    until(work.started.is_set)
    job = Job("key", 3, lambda: iter(computed.append("x") or range(3)), line=line)
    job.cancel()
    work.let()
    assert finished(first).state == "done"
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


def test_finished_jobs_are_forgotten_when_their_results_hold_too_much():
    jobs = Jobs(memory=1000)
    for number in range(4):
        finished(jobs.start(number, 1, lambda: iter([{"weights": torch.zeros(100)}])))  # 400 bytes
    assert jobs.get(2).held == 400
    jobs.get(1)  # a page that is open asks for it, so that 3 is the oldest
    finished(jobs.start(4, 1, lambda: iter([b"x" * 200])))
    assert [number for number in range(5) if jobs.get(number)] == [1, 2, 4]


def test_a_job_that_ends_before_its_start_returns_is_not_forgotten(monkeypatch):
    monkeypatch.setattr(jobs_module, "Job", lambda *arguments: finished(Job(*arguments)))
    jobs = Jobs(memory=1000)
    for number in range(4):
        jobs.start(number, 1, lambda: iter([bytes(400)]))
    assert [number for number in range(4) if jobs.get(number)] == [1, 2, 3]
    jobs.start("large", 1, lambda: iter([bytes(2000)]))
    assert jobs.get("large").results == [bytes(2000)]


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


def endless(begun: threading.Event, closed: list[str]) -> Iterator[int]:
    """A point that would never end, but has checkpoints."""
    try:
        while True:
            begun.set()
            time.sleep(0.001)
            checkpoint()
        yield 0
    except Exception:
        pytest.fail("a cancellation was taken for a failure")
    finally:
        closed.append("closed")


def test_a_long_point_is_cancelled_where_it_stands():
    begun, closed = threading.Event(), []
    job = Jobs().start("key", 5, lambda: endless(begun, closed))
    assert begun.wait(PATIENCE)
    job.cancel()
    until(lambda: not job.active)
    assert (job.state, job.results, job.error, closed) == ("cancelled", [], None, ["closed"])


def test_a_job_between_two_turns_is_cancelled_while_the_other_computes(tap):
    jobs, first_work, second_work = Jobs(turn=0), tap(), tap()
    first = jobs.start("first", 3, first_work)
    until(first_work.started.is_set)
    second = jobs.start("second", 3, second_work)
    first_work.let()
    until(second_work.started.is_set)
    assert (first.state, second.state) == ("waiting", "running")
    first.cancel()
    assert first_work.closed.wait(1)
    assert finished(first).state == "cancelled"
    assert first.results == [0]
    assert second.state == "running"


class TestTurns:
    def test_go_round_after_each_result_when_a_turn_is_short(self):
        jobs, order, gate = Jobs(turn=0), [], threading.Event()

        def work(name: str, count: int) -> Iterator[str]:
            gate.wait(PATIENCE)
            for _ in range(count):
                order.append(name)
                yield name

        counts = {"a": 4, "b": 1, "c": 2}
        started = [jobs.start(name, count, lambda n=name, c=count: work(n, c)) for name, count in counts.items()]
        gate.set()
        assert [finished(job).state for job in started] == ["done"] * 3
        assert "".join(order) == "abcacaa"
        assert [len(job.results) for job in started] == [4, 1, 2]

    def test_last_while_they_are_not_over(self, tap):
        jobs, first_work, second_work = Jobs(turn=60), tap(), tap(1)
        first = jobs.start("first", 3, first_work)
        second = jobs.start("second", 1, second_work)
        first_work.let(2)
        until(lambda: len(first.results) == 2)
        assert (first.state, second.state) == ("running", "waiting")
        assert not second_work.started.is_set()

    def test_short_work_is_done_long_before_the_long_work_it_came_after(self):
        jobs = Jobs(turn=0.02)

        def long() -> Iterator[int]:
            for number in range(500):
                time.sleep(0.002)
                yield number

        first = jobs.start("long", 500, long)
        until(lambda: len(first.results) > 10)
        assert finished(jobs.start("short", 3, lambda: iter(range(3)))).state == "done"
        assert first.active
        first.cancel()
        finished(first)

    def test_stay_with_a_job_that_is_alone(self, tap):
        jobs, work = Jobs(turn=0), tap()
        job = jobs.start("key", 3, work)
        work.let(2)
        until(lambda: len(job.results) == 2)
        assert job.state == "running"

    def test_are_not_needed_by_what_does_not_compute(self, tap):
        jobs, computing, download = Jobs(), tap(1), tap(1)
        first = jobs.start("first", 1, computing)
        until(computing.started.is_set)
        second = jobs.start("second", 1, download, computes=False)
        until(download.started.is_set)
        assert jobs.queue() == [second, first]
        assert [jobs.ahead(job) for job in (first, second)] == [0, 0]
        download.let()
        assert finished(second).results == [0]
        assert first.state == "running"

    def test_are_free_again_when_work_ends_in_an_unheard_of_way(self):
        def work() -> Iterator[int]:
            yield 1
            raise SystemExit(3)

        jobs = Jobs()
        job = finished(jobs.start("key", 2, work))
        assert (job.state, job.error) == ("failed", "SystemExit: 3")
        assert finished(jobs.start("next", 1, lambda: iter([1]))).state == "done"


def steps(begun: threading.Event, over: threading.Event) -> Iterator[int]:
    """One long step with checkpoints."""
    begun.set()
    while not over.is_set():
        time.sleep(0.001)
        checkpoint()
    yield 1


class TestTurnsWithinAStep:
    def test_short_work_does_not_wait_for_the_end_of_a_long_step(self):
        jobs, begun, over = Jobs(turn=0.01), threading.Event(), threading.Event()
        long = jobs.start("long", 1, lambda: steps(begun, over))
        assert begun.wait(PATIENCE)
        assert finished(jobs.start("short", 3, lambda: iter(range(3)))).state == "done"
        assert long.active
        over.set()
        assert finished(long).results == [1]
        assert long.waited > 0

    def test_work_that_needs_what_a_waiting_job_computes_lets_it(self):
        jobs, memo, begun, over = Jobs(turn=60), Cache(), threading.Event(), threading.Event()

        def holds() -> Iterator[int]:
            begun.set()
            yield memo.get("key", lambda: next(iter(list(holding()))))

        def holding() -> Iterator[int]:
            while not over.is_set():
                time.sleep(0.001)
                checkpoint(idle=True)  # its turn ends, and it holds the memo's lock
            yield 7

        def needs() -> Iterator[int]:
            over.set()
            yield memo.get("key", lambda: 8)

        first = jobs.start("first", 1, holds)
        assert begun.wait(PATIENCE)
        second = jobs.start("second", 1, needs)
        assert (finished(second).results, finished(first).results) == ([7], [7])

    def test_work_beside_others_needs_no_turn(self, tap):
        jobs, work, aside, over = Jobs(turn=60), tap(1), threading.Event(), threading.Event()

        def exports() -> Iterator[int]:
            with beside():
                aside.set()
                assert over.wait(PATIENCE)
            yield 1

        first = jobs.start("first", 1, exports)
        assert aside.wait(PATIENCE)
        second = jobs.start("second", 1, work)
        until(work.started.is_set)
        assert (first.state, second.state) == ("running", "running")
        over.set()
        until(lambda: first.state == "waiting")  # for a turn, as the second has it
        work.let()
        assert finished(first).state == finished(second).state == "done"

    def test_random_numbers_go_on_where_they_stood(self):
        def draws(seed: int, found: list[float]) -> Iterator[int]:
            torch.manual_seed(seed)
            for _ in range(20):
                found.append(float(torch.rand(())))
                checkpoint()
            yield 1

        with torch.random.fork_rng([]):
            jobs, found, gate = Jobs(turn=0), ([], []), threading.Event()
            jobs.start("gate", 1, lambda: iter([gate.wait(PATIENCE)]))
            made = [jobs.start(seed, 1, lambda seed=seed: draws(seed, found[seed])) for seed in (0, 1)]
            gate.set()
            assert all(finished(job).waited for job in made)
            for seed in (0, 1):
                torch.manual_seed(seed)
                assert found[seed] == [float(torch.rand(())) for _ in range(20)]

    def test_threads_of_the_work_have_no_turn_to_pass_on(self):
        jobs, other = Jobs(turn=0), threading.Event()

        def work() -> Iterator[int]:
            jobs.start("other", 1, lambda: iter([other.set()]))
            context = copy_context()
            thread = threading.Thread(target=lambda: context.run(lambda: [checkpoint() for _ in range(100)]))
            thread.start()
            thread.join(PATIENCE)
            assert not other.is_set()
            checkpoint()
            assert other.is_set()
            yield 1

        assert finished(jobs.start("key", 1, work)).error is None

    def test_a_job_that_waits_within_a_step_is_cancelled_there(self, tap):
        jobs, begun, work = Jobs(turn=0), threading.Event(), tap(1)
        first = jobs.start("first", 1, lambda: steps(begun, threading.Event()))
        assert begun.wait(PATIENCE)
        jobs.start("second", 1, work)
        until(work.started.is_set)
        assert first.state == "waiting"
        first.cancel()
        assert finished(first).state == "cancelled"


class TestGone:
    """Jobs whose askers have gone, by a clock of the test's own."""

    @pytest.fixture
    def watched(self, tap):
        jobs = Jobs()
        made = {name: jobs.start(name, 1, tap(1)) for name in ("asked", "named", "shared")}
        made["asked"].askers.add("a")
        made["shared"].askers |= {"a", "b"}
        return jobs, made

    def test_are_cancelled_after_a_grace_unless_somebody_else_waits_or_they_last(self, watched):
        jobs, made = watched
        for now in (0, 5, 99):
            jobs.tend(lambda session: session == "b", 100, now)
            assert {job.state for job in made.values()} <= {"running", "waiting"}
        jobs.tend(lambda session: session == "b", 100, 100.0)
        assert made["asked"].state in ("stopping", "cancelled")
        jobs.tend(lambda session: False, 100, 150.0)
        jobs.tend(lambda session: False, 100, 260.0)
        assert made["shared"].state in ("stopping", "cancelled")
        assert made["named"].active

    def test_are_kept_when_the_session_comes_back_in_time(self, watched):
        jobs, made = watched
        for now, here in ((0, False), (90, False), (95, True), (96, False), (190, False)):
            jobs.tend(lambda session, here=here: here, 100, now)
        assert made["asked"].state in ("running", "waiting")
        jobs.tend(lambda session: False, 100, 196)
        assert made["asked"].state in ("stopping", "cancelled")

    def test_no_time_is_told_of_a_job_that_waits_for_longer_than_turns_take(self, tap, monkeypatch):
        monkeypatch.setattr(Job, "seconds_left", property(lambda job: 10.0))
        jobs = Jobs(turn=1)
        made = [jobs.start(key, 1, tap(1)) for key in "ab"]
        monkeypatch.setattr(Job, "waits", property(lambda job: 5.9 if job is made[1] else 0.0))
        assert jobs.seconds_left(made[1]) == 20
        monkeypatch.setattr(Job, "waits", property(lambda job: 6.1 if job is made[1] else 0.0))
        assert jobs.seconds_left(made[1]) is None
        assert jobs.seconds_left(made[0]) == 20


def test_the_queue_is_in_the_order_of_turns_and_says_what_everyone_computes(tap):
    jobs, works = Jobs(turn=0), [tap(2) for _ in range(3)]
    made = [jobs.start(i, 2, work, title=f"study {i}") for i, work in enumerate(works)]
    until(works[0].started.is_set)
    assert [job.title for job in jobs.queue()] == ["study 0", "study 1", "study 2"]
    assert [jobs.ahead(job) for job in made] == [0, 1, 2]
    works[0].let()
    until(works[1].started.is_set)
    assert [job.key for job in jobs.queue()] == [1, 2, 0]
    assert [job.state for job in jobs.queue()] == ["running", "waiting", "waiting"]
    made[2].cancel()
    until(lambda: not made[2].active)
    assert [job.key for job in jobs.queue()] == [1, 0]
    for work in works:
        work.let(5)
    for job in made:
        finished(job)
    assert jobs.queue() == []
    assert Jobs().queue() == []


def test_of_several_results_of_one_part_the_last_is_kept_and_parts_of_it_count():
    shares, seen = [("a", 0.25), ("b", 0.5), ("a", 1.0), ("c", 1.0), ("b", 1.0)], []
    gates = [threading.Semaphore(0) for _ in shares]

    def work() -> Iterator[tuple[str, float]]:
        for share, gate in zip(shares, gates, strict=True):
            assert gate.acquire(timeout=PATIENCE)
            yield share

    job = Jobs().start("key", 3, work, part=lambda result: result)
    for number, gate in enumerate(gates):
        before = job.done
        gate.release()
        until(lambda before=before: job.done > before)
        seen.append((job.done, job.results))
        assert job.share == pytest.approx(job.done / 3)
        assert number < 3 or job.results[2] == ("c", 1.0)
    assert [done for done, _ in seen] == [0.25, 0.75, 1.5, 2.5, 3]
    assert seen[1][1] == [("a", 0.25), ("b", 0.5)]
    assert seen[2][1] == [("a", 1.0), ("b", 0.5)]
    assert finished(job).results == [("a", 1.0), ("b", 1.0), ("c", 1.0)]


def test_a_point_that_failed_is_a_result_and_the_others_go_on():
    def work() -> Iterator[tuple[int, str]]:
        for number in range(3):
            try:
                yield number, f"{1 / (number - 1):.0f}"
            except ZeroDivisionError as error:
                yield number, str(error)

    job = finished(Jobs().start("key", 3, work))
    assert job.results == [(0, "-1"), (1, "division by zero"), (2, "1")]
    assert (job.state, job.error) == ("done", None)


def test_a_job_whose_parts_ended_early_is_done_all_the_same():
    job = finished(Jobs().start("key", 4, lambda: iter([0.5, 1.0]), part=lambda share: (share, share)))
    assert (job.done, job.share, job.state) == (1.5, 1.0, "done")


def test_a_download_that_was_cancelled_with_its_last_byte_is_cancelled(tap):
    work = tap(1)
    job = Jobs().start("key", 1, work, part=lambda result: ("file", 1.0), computes=False)
    job.cancel()  # the file would only get its name after the last result
    work.let()
    assert finished(job).state == "cancelled"


class TestTime:
    def test_only_own_computing_counts(self):
        jobs, sleep = Jobs(turn=0), 0.02

        def work(seconds: float) -> Iterator[int]:
            for number in range(6):
                time.sleep(seconds)
                yield number

        before, start = time.monotonic(), time.perf_counter()
        slow, quick = (jobs.start(s, 6, lambda s=s: work(s)) for s in (5 * sleep, sleep))
        until(lambda: not quick.active)
        wall = time.perf_counter() - start
        assert 6 * sleep <= quick.elapsed < wall - 5 * 5 * sleep  # as long as five slow results it waited
        finished(slow)
        assert 30 * sleep <= slow.elapsed
        assert slow.elapsed + quick.elapsed < time.perf_counter() - start
        assert before <= quick.asked <= quick.started <= time.monotonic()
        assert quick.elapsed == quick.elapsed  # it does not go on

    def test_is_left_as_much_as_the_results_took_and_nothing_at_the_end(self):
        def work() -> Iterator[int]:
            for number in range(100):
                time.sleep(0.01)
                yield number

        jobs = Jobs()
        job = jobs.start("key", 100, work)
        assert job.seconds_left is None
        until(lambda: len(job.results) >= 10)
        left, done = job.seconds_left, len(job.results)
        assert left == pytest.approx(job.elapsed / done * (100 - done), rel=0.5)
        assert jobs.seconds_left(job) == pytest.approx(left, rel=0.5)
        job.cancel()
        assert finished(job).seconds_left is None

    def test_is_not_known_without_a_total(self, tap):
        work = tap(3)
        job = Jobs().start("key", 0, work)
        work.let(2)
        until(lambda: len(job.results) == 2)
        assert (job.seconds_left, job.share) == (None, None)

    @pytest.mark.parametrize(
        ("own", "expected"),
        [
            ({"a": 10.0}, {"a": 10}),
            ({"a": 10.0, "b": 30.0}, {"a": 20, "b": 40}),
            ({"a": 10.0, "b": 30.0, "c": 20.0}, {"a": 30, "b": 60, "c": 50}),
            ({"a": 10.0, "b": None}, {"a": 20, "b": None}),
            ({"a": 10.0, "b": 0.0}, {"a": 10, "b": 0}),
        ],
    )
    def test_until_the_end_is_longer_where_others_take_turns(self, own, expected, tap, monkeypatch):
        monkeypatch.setattr(Job, "seconds_left", property(lambda job: own[job.key]))
        jobs = Jobs()
        made = {key: jobs.start(key, 1, tap(1)) for key in own}
        assert {key: jobs.seconds_left(job) for key, job in made.items()} == expected


class Model:
    """Something large that a job's work holds on to."""


@pytest.mark.parametrize("how", ["done", "failed", "cancelled", "never began"])
def test_an_ended_job_lets_go_of_its_work(how, tap):
    def start(jobs: Jobs) -> tuple[Job, weakref.ref]:
        model = Model()

        def work() -> Iterator[int]:
            yield 1
            if how == "failed":
                raise itf.IntrafusionError(str(model))  # of others the log keeps the traceback, under pytest
            while how == "cancelled":
                checkpoint()
                time.sleep(0.001)

        return jobs.start("key", 5, work), weakref.ref(model)

    jobs, blocking = Jobs(), tap(1)
    if how == "never began":
        jobs.start("first", 1, blocking)
        until(blocking.started.is_set)
    job, model = start(jobs)
    if how in ("cancelled", "never began"):
        until(lambda: job.results or how == "never began")
        job.cancel()
    blocking.let()
    assert finished(job).state == ("cancelled" if how == "never began" else how)
    assert model() is None


def test_ended_jobs_leave_no_threads():
    jobs, before = Jobs(turn=0), set(threading.enumerate())
    for job in [jobs.start(number, 3, lambda: iter(range(3))) for number in range(5)]:
        finished(job)
    assert set(threading.enumerate()) <= before


def resident() -> float:
    """The process's resident memory in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def tensors(peaks: list[float]) -> Iterator[int]:
    """Allocates and frees tensors of 5 to 20 MB among small ones that stay, and keeps them in a cycle, as networks are."""
    generator, live, small = torch.Generator().manual_seed(0), [], []
    cycle: list = [live, small]
    cycle.append(cycle)
    for number in range(4):
        for megabytes in torch.randint(5, 21, (40,), generator=generator).tolist():
            live.append(torch.ones(megabytes * 250_000))
            small.append(torch.ones(1000))
            if len(live) > 20:
                live.pop(int(torch.randint(20, (), generator=generator)))
        peaks.append(resident())
        yield number


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_memory_comes_back_when_a_job_ends():
    jobs, peaks = Jobs(), []
    finished(jobs.start("before", 1, lambda: iter([0])))
    before = resident()
    assert finished(jobs.start("key", 4, lambda: tensors(peaks))).state == "done"
    assert max(peaks) > before + 200
    assert resident() < 1.1 * before + 20


@pytest.mark.gpu
def test_memory_of_the_device_comes_back_when_a_job_ends():
    def work() -> Iterator[int]:
        held = []
        for number in range(5):
            held.append(torch.ones(5_000_000, device="cuda"))
            peaks.append(torch.cuda.memory_reserved())
            yield number

    stays, peaks = torch.ones(1, device="cuda"), []
    before = torch.cuda.memory_reserved()
    finished(Jobs().start("key", 5, work))
    assert max(peaks) > before + 90e6
    assert torch.cuda.memory_reserved() <= before
    del stays
