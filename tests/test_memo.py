import threading
import time

import pytest

from intrafusion.runtime.cache import Cache
from intrafusion.runtime.cancellation import Cancelled, stoppable


def test_each_key_is_computed_once():
    memo, calls = Cache(), []
    assert [memo.get(key, lambda key=key: calls.append(key) or 10 * key) for key in (1, 2, 1)] == [10, 20, 10]
    assert calls == [1, 2]
    assert memo.peek(1) == 10
    assert memo.peek(3) is None


def test_the_least_recently_used_is_forgotten():
    memo = Cache(limit=2)
    memo.get("a", lambda: 1)
    memo.get("b", lambda: 2)
    memo.get("a", lambda: 0)
    memo.get("c", lambda: 3)
    assert [memo.peek(key) for key in "abc"] == [1, None, 3]


def test_results_that_hold_much_are_forgotten_sooner_but_not_the_last():
    memo = Cache(memory=1000)
    memo.get("a", lambda: b"x" * 600)
    memo.get("b", lambda: b"x" * 300)
    assert memo.peek("a") is not None
    memo.get("c", lambda: b"x" * 200)
    assert [memo.peek(key) is not None for key in "abc"] == [True, False, True]
    memo.get("d", lambda: b"x" * 2000)
    assert [memo.peek(key) is not None for key in "acd"] == [False, False, True]


def test_an_error_is_not_remembered():
    memo = Cache()
    with pytest.raises(ZeroDivisionError):
        memo.get("a", lambda: 1 / 0)
    assert memo.get("a", lambda: 5) == 5


def test_threads_that_ask_for_one_key_wait_for_one_computation():
    memo, calls, got, gate = Cache(), [], [], threading.Event()

    def slow():
        calls.append(1)
        assert gate.wait(60)
        return "done"

    threads = [threading.Thread(target=lambda: got.append(memo.get("a", slow))) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert memo.get("b", lambda: "other") == "other"  # does not wait for a
    gate.set()
    for thread in threads:
        thread.join()
    assert got == ["done"] * 6
    assert len(calls) == 1


def test_a_result_may_ask_for_others():
    memo = Cache()
    assert memo.get("a", lambda: memo.get("b", lambda: 2) + 1) == 3


def test_who_waits_for_another_can_be_cancelled_and_the_other_is_not_disturbed():
    memo, let, stop = Cache(), threading.Event(), threading.Event()
    worker = threading.Thread(target=lambda: memo.get("a", lambda: let.wait(10) and 7))
    worker.start()
    while "a" not in memo._turns:
        time.sleep(0.001)
    stop.set()
    with stoppable(stop), pytest.raises(Cancelled):
        memo.get("a", lambda: pytest.fail("computed twice"))
    let.set()
    worker.join()
    assert memo.peek("a") == 7
