import pytest

from intrafusion.runtime.progress import Arrivals, in_words


def arrivals(*steps: tuple[float, float]) -> tuple[Arrivals, float]:
    """Results given as (work, seconds that it took), and the seconds in all."""
    made, spent = Arrivals(), 0.0
    for work, took in steps:
        spent += took
        made.add(work, spent)
    return made, spent


@pytest.mark.parametrize(
    ("steps", "total", "left"),
    [
        ([], 10, None),
        ([(1, 2.0)], 10, None),  # one result: the start and the pace cannot be told apart
        ([(1, 2.0), (1, 2.0)], 10, 16),
        ([(1, 30.0), (1, 2.0)], 10, 16),  # the start-up is no pace
        ([(1, 30.0), *[(1, 2.0)] * 5], 10, 8),
        ([*[(1, 4.0)] * 4, *[(1, 1.0)] * 4], 10, 2),  # it became faster
        ([*[(1, 1.0)] * 4, *[(1, 4.0)] * 4], 10, 8),  # and slower
        ([*[(1, 0.0)] * 8, (1, 3.0), (1, 3.0)], 12, 6),  # eight were known before
        ([*[(1, 0.0)] * 12], 20, None),
        ([(0.1, 1.0)] * 10, 10, 90),  # a tenth of a part at a time
        ([(0, 1.0)] * 5, 10, None),  # time passes, and nothing is done
        ([(1, 1.0)] * 10, 10, 0),
    ],
)
def test_time_left_is_that_of_the_rest_at_the_present_pace(steps, total, left):
    made, spent = arrivals(*steps)
    assert made.seconds_left(total, spent) == (left if left is None else pytest.approx(left))


def test_refining_passes_are_not_taken_for_the_first_one():
    """A rough look at each of 10 points costs as much as the nine times larger rest."""
    made, spent = arrivals(*[(0.1, 1.0)] * 10, *[(0.9, 1.0)] * 5)
    assert made.seconds_left(10, spent) == pytest.approx(5, rel=0.2)


def test_time_runs_down_between_two_results_by_no_more_than_one_of_them():
    made, spent = arrivals(*[(1, 2.0)] * 4)
    seen = [made.seconds_left(10, spent + late) for late in (0, 0.5, 1, 1.9, 2, 5)]
    assert seen == pytest.approx([12, 11.5, 11, 10.1, 10, 10])


def test_the_last_result_may_come_any_moment():
    made, spent = arrivals(*[(1, 2.0)] * 4)
    assert made.seconds_left(5, spent + 6) == 0


def test_nothing_is_said_when_a_result_is_far_later_than_the_others_were():
    made, spent = arrivals(*[(1, 2.0)] * 4)
    assert made.seconds_left(10, spent + 7.9) == pytest.approx(10)
    assert made.seconds_left(10, spent + 8.1) is None  # three times the longest, and 2 s
    made.add(1, spent + 100)
    assert made.seconds_left(10, spent + 100) == pytest.approx(5 * 106 / 4, rel=0.5)  # and again when it has come


def test_more_work_than_was_said_leaves_nothing():
    made, spent = arrivals(*[(1, 2.0)] * 4)
    assert made.seconds_left(3, spent) == 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 s"), (0.7, "1 s"), (1.4, "1 s"), (12.3, "12 s"), (59.4, "59 s"), (59.6, "1 min"), (64, "1 min"),
        (66, "1 min 10 s"), (150, "2 min 30 s"), (594, "9 min 50 s"), (595, "10 min"), (1499, "25 min"),
        (3569, "59 min"), (3570, "1 h"), (3600 + 20 * 60, "1 h 20 min"), (7199, "2 h"), (30 * 3600, "30 h"),
    ],
)  # fmt: skip
def test_times_are_said_as_people_say_them(seconds, words):
    assert in_words(seconds) == words
