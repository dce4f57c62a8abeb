import threading
import time
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from intrafusion.runtime.cache import Cache, held_bytes
from intrafusion.runtime.cancellation import Cancelled, stoppable

TENSOR, ARRAY = torch.zeros(10, 10), np.zeros((4, 4))


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


@dataclass(frozen=True)
class Pair:
    first: object
    second: object = None


def test_bytes_of_what_results_hold():
    assert held_bytes(TENSOR) == 400
    assert held_bytes(ARRAY) == 128
    assert held_bytes(b"four") == 4
    assert held_bytes([1, "text", None, Pair]) == 0
    assert held_bytes(Pair({"a": [TENSOR, (ARRAY,)]}, MappingProxyType({b"k": 1}))) == 400 + 128 + 1
    assert held_bytes(nn.BatchNorm1d(8)) == 4 * 8 * 4 + 8


def test_what_lies_in_one_place_counts_once_and_a_part_holds_the_whole():
    assert held_bytes([TENSOR, TENSOR[0], TENSOR.T, TENSOR.detach()]) == 400
    assert held_bytes([ARRAY[0], ARRAY[1]]) == 128
    network = nn.Linear(10, 10)
    assert held_bytes([network, nn.Sequential(network), network.weight]) == 440


def test_a_circle_ends():
    circle: list = [TENSOR]
    circle.append(circle)
    assert held_bytes(circle) == 400
