"""The test of learning rates, against valleys whose best is known."""

import math

import pytest

from intrafusion.training.lr_search import RATES, best_rate


@pytest.mark.parametrize(("place", "tried"), [(6, 3), (8, 5), (0, 8), (9, 5)])
def test_the_best_rate_of_a_valley_is_found_in_few_runs(place, tried):
    seen = []

    def probe(rate: float) -> float:
        seen.append(rate)
        return abs(RATES.index(rate) - place)

    assert best_rate(probe) == RATES[place]
    assert len(seen) == len(set(seen)) == tried


def test_where_no_short_run_learns_there_is_no_best_rate():
    assert best_rate(lambda rate: math.inf) is None
