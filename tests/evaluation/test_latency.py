"""Two networks timed in turns: what is said follows from the paired ratios, never from how fast this machine is."""

import copy
import math
import threading

import pytest
import torch
from scipy.stats import binom
from torch import nn

import intrafusion as itf
from intrafusion.evaluation import latency as module
from intrafusion.evaluation.accuracy import size
from intrafusion.evaluation.latency import (
    Latency,
    LatencyComparison,
    Speed,
    compare_latency,
    device_words,
    large_batch,
    measure_latency,
    peak_memory,
    ratio,
)
from intrafusion.reporting.figures.latency import latencies, latency_headline, widths
from intrafusion.reporting.report import speed_words
from intrafusion.runtime.cancellation import Cancelled, stoppable

EXAMPLE = torch.zeros(1, 1, 8, 8)


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 10)).eval()


def made(before: tuple[float, ...], after: tuple[float, ...], smaller: bool = True) -> LatencyComparison:
    first, second = (Speed((Latency(1, one),), params, 1, 1, 1) for one, params in ((before, 9), (after, 8 if smaller else 9)))
    return LatencyComparison(first, second, "cpu", 1.0)


@pytest.fixture
def steps(monkeypatch):
    """A clock that runs a millisecond at each look, so that every run takes as long."""
    now = iter(range(10**9))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now) / 1000)


def test_a_comparison_grows_and_ends_complete():
    found = list(compare_latency(net(8), net(4), EXAMPLE, batch=4, runs=6))
    shares = [one.share for one in found]
    assert shares == sorted(shares)
    assert (shares[-1], max(shares[:-1]) < 1) == (1.0, True)
    last = found[-1]
    for speed, width in ((last.before, 8), (last.after, 4)):
        assert [(one.batch, len(one.seconds)) for one in speed.latencies] == [(1, 6), (4, 6)]
        assert all(second > 0 for one in speed.latencies for second in one.seconds)
        known = size(net(width), EXAMPLE)
        assert (speed.params, speed.macs) == (known.params, known.macs)
        assert speed.memory == 4 * 2 * 64 * width * 4  # images x (convolution and ReLU alive at once), fp32
        assert 4 * known.params < speed.bytes < 4 * known.params + 1000  # and a header
    assert last.is_smaller
    assert len(last.rows()) == 2 * 2 * 6
    assert last.summary()["verdict"] == last.sentence()


def test_networks_take_turns_and_who_begins_alternates(monkeypatch):
    order, first, second = [], net(2), net(1)
    monkeypatch.setattr(module, "_run", lambda network, images, passes: order.append("AB"[network is second]) or 0.01)
    list(compare_latency(first, second, EXAMPLE, batch=2, runs=6))
    assert "".join(order) == 2 * ("AABB" + "ABBA" * 3)  # warm-up and one pass of each, then turns


def test_a_single_network_is_measured_alone():
    found = measure_latency(net(4), EXAMPLE, batch=2, runs=6)
    assert [len(one.seconds) for one in found.latencies] == [6, 6]
    low, high = found.latencies[0].quartiles
    assert low <= found.latencies[0].median <= high


@pytest.mark.parametrize(
    "measured", [lambda a, b: measure_latency(a, EXAMPLE, 2, 6), lambda a, b: list(compare_latency(a, b, EXAMPLE, 2, 6))]
)
def test_the_networks_are_left_in_the_modes_that_they_came_in(measured):
    first, second = (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 5)) for _ in range(2))
    first[1].eval()
    modes = [module.training for network in (first, second) for module in network.modules()]
    state = copy.deepcopy(first.state_dict())
    measured(first, second)
    assert [module.training for network in (first, second) for module in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())


def test_each_network_is_timed_in_its_own_numbers():
    found = list(compare_latency(net(4).double(), net(2).bfloat16(), EXAMPLE, batch=2, runs=6))[-1]
    assert found.kind == "float64 and bfloat16"
    assert found.before.bytes > 3 * found.after.bytes
    assert "Both networks ran in float64 and bfloat16 on " in speed_words(found)


def test_long_measurements_end_after_the_fewest_turns(monkeypatch, steps):
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    *_, found = compare_latency(net(2), net(1), EXAMPLE, batch=2, runs=30)
    assert [one.turns for one in found.ratios] == [6, 6]
    assert found.share == 1


def test_it_stops_when_asked():
    stop = threading.Event()
    stop.set()
    with stoppable(stop), pytest.raises(Cancelled):
        list(compare_latency(net(2), net(1), EXAMPLE, batch=2, runs=6))


@pytest.mark.parametrize("count", range(1, 41))
def test_the_interval_is_that_of_the_sign_test(count):
    pairs = ratio(Latency(1, tuple(1.0 + i for i in range(count))), Latency(1, (1.0,) * count))
    if count < 6:
        assert pairs.interval == (0.0, math.inf)
        return
    rank = int(pairs.interval[0]) - 1
    assert pairs.interval == (1 + rank, count - rank)
    assert 2 * binom.cdf(rank, count, 0.5) <= 0.05 < 2 * binom.cdf(rank + 1, count, 0.5)


SLOW, FAST, BOTH = (2.0,) * 8, (1.0,) * 8, (1.0, 3.0) * 4


@pytest.mark.parametrize(("before", "after", "smaller", "verdict", "words"), [
    (SLOW, FAST, True, "faster", "Smaller and faster: 2.00 times faster (2.00 to 2.00) at batch 1"),
    (FAST, SLOW, True, "slower", "Smaller but not faster: 2.00 times slower (2.00 to 2.00) at batch 1"),
    (SLOW, BOTH, True, "no clear difference",
     "Smaller but not faster: no clear difference (0.67 to 2.00 times as fast) at batch 1"),
    (SLOW, FAST, False, "faster", "2.00 times faster (2.00 to 2.00) at batch 1"),
])  # fmt: skip
def test_verdicts_go_by_the_interval(before, after, smaller, verdict, words):
    found = made(before, after, smaller)
    assert (found.ratios[0].verdict, found.sentence()) == (verdict, words)


def test_medians_alone_decide_nothing():
    """The machine gets slower by the hour, and the second network is the slower one within every turn."""
    drift = tuple(float(2**turn) for turn in range(8))
    found = made(drift, tuple(1.1 * one for one in drift))
    assert found.ratios[0].verdict == "slower"
    assert found.ratios[0].times == pytest.approx(1 / 1.1)


def test_faster_at_one_batch_only_is_not_faster_everywhere():
    one, two = made(SLOW, FAST), made(FAST, SLOW)
    both = LatencyComparison(
        Speed(one.before.latencies + two.before.latencies, 9, 1, 1, 1),
        Speed(one.after.latencies + two.after.latencies, 8, 1, 1, 1), "cpu", 1.0,
    )  # fmt: skip
    assert both.sentence().startswith("Smaller but not faster everywhere: ")
    assert latency_headline(both) == "Smaller, faster at batch 1 only"


def test_memory_counts_what_is_alive_at_once():
    images = torch.zeros(2, 1, 8, 8)
    assert peak_memory(nn.Sequential(nn.ReLU(inplace=True)), images) == 0  # nothing beyond the images
    assert peak_memory(nn.Flatten(), images) == 0  # a view
    three = nn.Sequential(nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid())
    assert peak_memory(three, images) == 2 * images.nbytes  # the first result is gone when the third comes


@pytest.mark.parametrize(
    ("options", "match"),
    [({"batch": 1}, "batch must be at least 2"), ({"runs": 5}, "runs must be at least 6, not 5")],
)
def test_bad_settings_are_one_line(options, match):
    with pytest.raises(itf.IntrafusionError, match=match):
        next(compare_latency(net(2), net(1), EXAMPLE, **options))


def test_the_device_and_the_batch_go_by_the_example():
    assert "thread" in device_words(torch.device("cpu"))
    assert (large_batch(EXAMPLE), large_batch(torch.zeros(1, 3, 224, 224))) == (64, 16)


@pytest.mark.gpu
def test_on_a_gpu_its_own_counter_tells_memory():
    *_, found = compare_latency(net(8).cuda(), net(4).cuda(), EXAMPLE.cuda(), batch=4, runs=6)
    assert found.before.memory > found.after.memory > 0


def test_the_picture_has_every_run_and_says_which_lie_beyond():
    found = made((*FAST, 50.0), (*FAST, 1.0))
    fig = latencies(found)
    assert [len(trace.x) for trace in fig.data] == [9, 9]
    assert "1 run beyond" in [note.text for note in fig.layout.annotations]
    assert fig.layout.title.text == "Smaller but not faster"


def test_widths_show_what_stays_and_what_went():
    from intrafusion.reporting import Width

    fig = widths([Width("a", 8, 5), Width("b", 4, 4)], "fusion")
    assert [list(trace.y) for trace in fig.data] == [[5, 4], [3, 0]]
    assert fig.layout.title.text == "9 of 12 channels are kept"
