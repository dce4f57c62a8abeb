"""The driver with a Ray that has no processes: what it asks of the store and of Ray, and when."""

from collections.abc import Iterator
from typing import Any

import pytest
from fake_ray import FakeRay, RayError

import intrafusion as itf
from intrafusion.evaluation.incremental import MEMORY
from intrafusion.studies.cluster import driver
from intrafusion.studies.measurement import Result
from intrafusion.studies.session import Session, open_session
from intrafusion.studies.store.sqlite import Store
from intrafusion.studies.sweeps import Failure, checked_specs, grid, origin

BASE = itf.PruneSpec(model="digits-mlp", limit=None)


def points(number: int) -> list[itf.PruneSpec]:
    return grid(BASE, groups=[("1",), ("3",)], merge=["drop", "fusion"], sparsity=[k / 1000 for k in range(number // 4)])


def looks(specs: list[itf.PruneSpec]) -> list[Result]:
    """Two results of each point, the second complete."""
    return [
        Result(spec, 0.5, (0.4, 0.6), count, 100, 0.75, 11, 22, 33, 44, 5, 6, 1.5, bytes(count))
        for count in (10, 100)
        for spec in specs
    ]


def studied(ray: Any, specs: list[itf.PruneSpec], session: Session, store: Store | None) -> Iterator[Result | Failure]:
    share = driver._Share(1, 0)
    places = {spec: share.origin(spec, session) for spec in checked_specs(specs, session)}
    return driver._Driver(ray, places, session, store, {}, False, MEMORY, share).steps()


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(BASE)


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    with Store(tmp_path / "s.sqlite") as opened:
        yield opened


@pytest.fixture
def statements(store) -> list[str]:
    """The statements that the store executes, without those of triggers."""
    seen: list[str] = []
    store._db.set_trace_callback(lambda text: text.startswith("--") or seen.append(text))
    return seen


@pytest.mark.parametrize("workers", [1, 10])
@pytest.mark.parametrize("number", [80, 240])
def test_work_per_result_does_not_grow_with_the_study_or_the_workers(session, store, statements, workers, number):
    ray = FakeRay(workers, looks)
    found = list(studied(ray, points(number), session, store))
    assert len(found) == 2 * number
    transactions = sum(text.startswith("BEGIN") for text in statements)
    assert transactions <= 1.2 * len(found) / workers + 10  # results that arrive together are stored together
    assert len(statements) <= 10 * len(found)
    assert ray.listed <= 3 * len(found)


def test_results_are_stored_when_they_are_yielded_and_claims_end_with_their_task(session, store, tmp_path):
    specs, claims = points(80), "SELECT count(*) FROM claims"
    with Store(tmp_path / "s.sqlite") as other:
        for result in studied(FakeRay(10, looks), specs, session, store):
            assert other.get([(result.spec, origin(result.spec, session))])[result.spec].count >= result.count
            assert store._db.execute(claims).fetchone()[0] <= 40  # two tasks of two points for each worker
    assert store._db.execute(claims).fetchone()[0] == 0


def test_families_of_which_another_process_holds_a_point_are_left_to_it(session, store, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "_AGAIN", 0.0)
    monkeypatch.setattr(driver, "_POLL", 0.01)
    specs, sent = points(40), []
    taken, point = specs[5], origin(specs[5], session)
    family = [spec for spec in specs if spec.but(merge="drop") == taken.but(merge="drop")]
    ray = FakeRay(2, lambda specs: sent.append(specs) or looks(specs))
    with Store(tmp_path / "s.sqlite") as other:
        assert other.claim(taken, point)
        found = []
        for result in studied(ray, specs, session, store):
            found.append(result)
            if sum(one.complete for one in found) == len(specs) - len(family):
                assert not any(spec in family for task in sent for spec in task)
                other.put(theirs := looks([taken])[1], point)
                other.release(taken, point)
    assert [result for result in found if result.spec == taken] == [theirs]
    assert {result.spec for result in found if result.complete} == {*specs}


def test_a_lost_worker_s_points_stay_claimed_until_they_are_sent_again(session, store, statements):
    first = []

    def items(specs: list[itf.PruneSpec]) -> list[Any]:
        if not first:
            first.extend(specs)
            return [looks(specs)[0], RayError("gone")]
        if specs == first:
            assert not any(text.startswith("DELETE FROM claims") and "WHERE key" in text for text in statements)
        return looks(specs)

    found = list(studied(FakeRay(1, items), points(4), session, store))
    assert {result.spec for result in found if result.complete} == {*points(4)}
    assert len(first) == 2


def test_what_arrives_together_with_an_error_is_stored(session, store):
    specs, sent = points(8), []

    def items(specs: list[itf.PruneSpec]) -> list[Any]:
        sent.append(specs)
        return looks(specs) if len(sent) == 1 else ["device", "device", object]  # the third is no result

    with pytest.raises(AttributeError):
        list(studied(FakeRay(2, items), specs, session, store))
    first, second = sent[0]
    assert store.get((spec, origin(spec, session)) for spec in specs) == {first: looks([first])[1], second: looks([second])[0]}


def test_failures_are_stored(session, store):
    specs = points(8)
    ray = FakeRay(2, lambda specs: [Failure(spec, "no memory") for spec in specs])
    assert {*studied(ray, specs, session, store)} == {Failure(spec, "no memory") for spec in specs}
    store.save_study("s", "", [(spec, origin(spec, session)) for spec in specs])
    assert store.failures("s") == dict.fromkeys(specs, "no memory")
