import os
import signal
import threading
import time
from contextvars import copy_context

import pytest

from intrafusion.runtime.cache import Cache
from intrafusion.runtime.cancellation import Cancelled, beside, checkpoint, clock, interruptible, stoppable


@pytest.fixture
def stop() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def in_a_thread(run) -> list:
    seen: list = []

    def target() -> None:
        try:
            seen.append(run())
        except Cancelled as error:
            seen.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return seen


def test_outside_of_stoppable_work_a_checkpoint_does_nothing():
    assert checkpoint() is None


def test_a_checkpoint_raises_from_when_the_work_was_asked_to_stop():
    asked = threading.Event()
    with stoppable(asked):
        checkpoint()
        asked.set()
        for _ in range(2):
            with pytest.raises(Cancelled):
                checkpoint()


def test_nobody_who_answers_failures_answers_a_cancellation(stop):
    def careful() -> str:
        try:
            checkpoint()
        except Exception:
            return "answered"
        return "not asked"

    with stoppable(stop), pytest.raises(Cancelled):
        careful()


def test_after_the_block_all_is_as_before(stop):
    with pytest.raises(ZeroDivisionError), stoppable(stop):
        raise ZeroDivisionError
    checkpoint()
    with stoppable(threading.Event()):
        with pytest.raises(Cancelled), stoppable(stop):
            checkpoint()
        checkpoint()  # the outer block was not asked to stop


def test_other_threads_go_on_unless_they_carry_the_context(stop):
    with stoppable(stop):
        assert in_a_thread(checkpoint) == [None]
        context = copy_context()
        (raised,) = in_a_thread(lambda: context.run(checkpoint))
        assert isinstance(raised, Cancelled)


def test_a_memo_stays_clean_and_whoever_waits_for_the_same_key_computes_it(stop):
    memo, computing, waiting = Cache(), threading.Event(), threading.Event()

    def stopped() -> str:
        computing.set()
        assert waiting.wait(10)
        checkpoint()
        return "never"

    def first() -> None:
        with stoppable(stop):
            memo.get("key", stopped)

    one = threading.Thread(target=lambda: in_a_thread(first))
    one.start()
    assert computing.wait(10)
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(memo.get("key", lambda: "computed")))
    other.start()
    waiting.set()
    one.join(10)
    other.join(10)
    assert found == ["computed"]
    assert memo.peek("key") == "computed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_next_checkpoint_and_a_second_one_does_not(number):
    @interruptible()
    def work() -> None:
        os.kill(os.getpid(), number)
        with pytest.raises(Cancelled):
            checkpoint()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Cancelled):  # the block ends with it, too: a signal is not forgotten
        work()
    assert signal.getsignal(number) == before
    checkpoint()


def test_after_a_signal_and_not_before_sigurg_interrupts_work_where_it_stands():
    seen = []

    @interruptible()
    def work() -> None:
        os.kill(os.getpid(), signal.SIGURG)
        os.kill(os.getpid(), signal.SIGINT)
        seen.append("goes on")
        try:
            os.kill(os.getpid(), signal.SIGURG)
            seen.append("not interrupted")
        finally:
            os.kill(os.getpid(), signal.SIGURG)  # what tidies up is left alone
            seen.append("tidied up")

    before = signal.getsignal(signal.SIGURG)
    with pytest.raises(Cancelled):
        work()
    assert seen == ["goes on", "tidied up"]
    assert signal.getsignal(signal.SIGURG) == before


def test_other_threads_are_not_interruptible_and_go_on():
    def run() -> str:
        with interruptible():
            checkpoint()
        return "done"

    assert in_a_thread(run) == ["done"]


class Counted:
    """Turns that are counted, each of which is waited for a second."""

    def __init__(self):
        self.waited, self.seen = 0.0, []

    def pass_on(self, idle=False):
        self.seen.append("idle" if idle else "over")
        self.waited += 1

    def step_aside(self):
        self.seen.append("aside")

    def come_back(self):
        self.seen.append("back")


def test_a_checkpoint_passes_the_turn_on_unless_the_work_was_stopped(stop):
    turns = Counted()
    with stoppable(threading.Event(), turns):
        checkpoint()
        checkpoint(idle=True)
        with stoppable(threading.Event()):  # the turns are those of the block around it
            checkpoint()
        with pytest.raises(Cancelled), stoppable(stop):
            checkpoint()
    assert turns.seen == ["over", "idle", "over"]
    checkpoint()
    assert len(turns.seen) == 3


def test_the_clock_stands_still_while_work_waits_for_its_turn():
    with stoppable(threading.Event(), Counted()):
        began, real = clock(), time.perf_counter()
        for _ in range(100):
            checkpoint()
        assert clock() - began == pytest.approx(time.perf_counter() - real - 100, abs=0.05)
    assert clock() == pytest.approx(time.perf_counter(), abs=1)


def test_work_beside_others_comes_back_however_it_ends():
    turns = Counted()
    with beside():
        pass  # outside of jobs there is nobody
    with stoppable(threading.Event(), turns), pytest.raises(ZeroDivisionError), beside():
        raise ZeroDivisionError
    assert turns.seen == ["aside", "back"]


def test_whoever_waits_for_a_memo_gives_its_turn_away():
    memo, turns, inside, go_on = Cache(), Counted(), threading.Event(), threading.Event()

    def compute() -> str:
        inside.set()
        assert go_on.wait(10)
        return "computed"

    one = threading.Thread(target=lambda: memo.get("key", compute))
    one.start()
    assert inside.wait(10)
    turns.pass_on = lambda idle: go_on.set() if idle else None
    with stoppable(threading.Event(), turns):
        assert memo.get("key", lambda: "again") == "computed"
    one.join(10)
