import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import intrafusion as itf
from intrafusion.evaluation.accuracy import stratified
from intrafusion.evaluation.incremental import Meter
from intrafusion.runtime.cancellation import Cancelled, stoppable
from intrafusion.studies import sweeps as module
from intrafusion.studies.measurement import Result, run_spec
from intrafusion.studies.paired_comparison import paired
from intrafusion.studies.session import Session, open_session
from intrafusion.studies.store.sqlite import Store, point_key
from intrafusion.studies.sweeps import Failure, grid, origin, sweep

BASE = itf.PruneSpec(model="digits-mlp", limit=50)


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(BASE)


@pytest.fixture(scope="module")
def resnet() -> Session:
    return open_session(itf.PruneSpec(model="digits-resnet"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[itf.PruneSpec]:
    """The specs that were really measured, once for each look."""
    measured: list[itf.PruneSpec] = []

    def counting(spec, *rest, measure=module.measure):
        measured.append(spec)
        return measure(spec, *rest)

    monkeypatch.setattr(module, "measure", counting)
    return measured


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    with Store(tmp_path / "s.sqlite") as opened:
        yield opened


def last(found: Iterable[Result | Failure]) -> dict[itf.PruneSpec, Result]:
    """Where each point ended."""
    return {result.spec: result for result in found if isinstance(result, Result)}


class TestGrid:
    def test_holds_every_combination_once_with_the_last_field_fastest(self):
        specs = grid(BASE, criterion=["l1", "l2"], merge=["drop", "fusion"], sparsity=[0.1, 0.2, 0.3])
        assert len(specs) == len(set(specs)) == 12
        expected = [(c, m, s) for c in ("l1", "l2") for m in ("drop", "fusion") for s in (0.1, 0.2, 0.3)]
        assert [(spec.criterion, spec.merge, spec.sparsity) for spec in specs] == expected

    def test_leaves_everything_else_as_it_was(self):
        base = BASE.but(seed=4, groups=("1",), p=2)
        assert {spec.but(sparsity=0.3) for spec in grid(base, sparsity=[0.1, 0.9])} == {base.but(sparsity=0.3)}

    @pytest.mark.parametrize(("choices", "count"), [({}, 1), ({"seed": []}, 0), ({"seed": [1]}, 1)])
    def test_size_is_the_product(self, choices, count):
        assert len(grid(BASE, **choices)) == count

    def test_bad_choice_is_refused(self):
        with pytest.raises(itf.IntrafusionError, match="sparsity"):
            grid(BASE, sparsity=[0.5, 1.5])


class TestSweep:
    specs = grid(BASE, merge=["drop", "fusion"], sparsity=[0.1, 0.5])

    def test_results_are_those_of_run(self, session, runs):
        results = last(sweep(self.specs, session))
        assert set(results) == set(self.specs) == set(runs)
        for result in results.values():
            alone = run_spec(result.spec, session)
            assert (result.correct, result.params, result.macs) == (alone.correct, alone.params, alone.macs)

    def test_a_point_that_comes_twice_is_measured_once(self, session, runs):
        assert len(list(sweep([self.specs[0]] * 3, session))) == 1
        assert runs == [self.specs[0]]

    def test_computes_no_further_than_it_is_asked(self, session, runs):
        points = sweep(self.specs, session)
        assert runs == []
        next(points)
        next(points)
        points.close()
        assert len(runs) == 2

    @pytest.mark.parametrize("changes", [{"merge": "melt"}, {"criterion": "luck"}, {"groups": ("nine",)}], ids=str)
    def test_bad_last_spec_is_refused_before_the_first_is_computed(self, session, runs, changes):
        with pytest.raises(itf.IntrafusionError):
            next(sweep([*self.specs, BASE.but(**changes)], session))
        assert runs == []

    def test_nothing_to_do_is_nothing(self, session):
        assert list(sweep([], session)) == []

    def test_one_network_is_pruned_once_for_all_its_looks(self, session, monkeypatch):
        made = []
        monkeypatch.setattr(module, "pruned", lambda spec, b, f=module.pruned: made.append(spec) or f(spec, b))
        monkeypatch.setattr(module, "FIRST", 10)
        monkeypatch.setattr("intrafusion.evaluation.incremental.Meter._probe", lambda meter, network: 10)
        session = open_session(BASE)
        assert len(list(sweep(self.specs, session))) == 2 * len(self.specs)
        assert len(made) == len(self.specs)


class TestLooks:
    """Every point is first looked at on a fair sample."""

    @pytest.fixture(autouse=True)
    def small_batches(self, monkeypatch):
        monkeypatch.setattr("intrafusion.evaluation.incremental.Meter._probe", lambda meter, network: 50)

    base = itf.PruneSpec(model="digits-resnet", groups=("layer1.0.conv1",), limit=None)

    def test_all_points_are_seen_before_any_is_finished(self, resnet):
        specs = grid(self.base, sparsity=[0.2, 0.5], merge=["drop", "fusion"])
        found = list(sweep(specs, resnet))
        assert [result.count for result in found] == [100] * 4 + [597] * 4
        assert {result.spec for result in found[:4]} == set(specs)
        for early, late in zip(found[:4], found[4:], strict=True):
            assert early.complete is False
            assert late.complete is True
            assert _bits(late)[:100] == _bits(early)
            assert early.interval[0] < late.accuracy < early.interval[1]

    def test_the_sample_holds_every_class_in_its_proportion(self, resnet):
        data = resnet.images()
        order = stratified(data.labels, seed=0)
        assert sorted(order.tolist()) == list(range(597))
        share = data.labels.bincount() / 597
        for count in (10, 100, 333):
            assert ((data.labels[order[:count]].bincount(minlength=10) - count * share).abs() <= 1).all()
        assert not torch.equal(order, stratified(data.labels, seed=1))

    def test_a_decided_difference_is_not_refined(self, resnet):
        spec = self.base.but(groups="all", sparsity=0.3)  # 10 % where dropped, 88 % where fused
        found = last(sweep(grid(spec, merge=["drop", "fusion"]), resnet, decide=True))
        dropped, fused = found.values()
        assert dropped.count == fused.count == 100
        assert paired(fused, dropped).decided
        undecided = grid(self.base.but(groups=("layer3.1.conv1",), sparsity=0.05), merge=["drop", "fusion"])
        assert {result.count for result in last(sweep(undecided, resnet, decide=True)).values()} == {597}

    def test_a_cut_is_finished_look_by_look_before_the_next(self, resnet, monkeypatch):
        """The ratio of images seen to images left triples, in whole batches."""
        monkeypatch.setattr(module, "is_decided", lambda one, other: one.spec.groups == groups[0] and one.count >= 300)
        groups = [("layer1.0.conv1",), ("layer3.1.conv1",)]
        specs = grid(self.base, groups=groups, merge=["drop", "fusion"])
        found = [(result.spec.groups, result.spec.merge, result.count) for result in sweep(specs, resnet, decide=True)]
        looks = [(groups[0], count) for count in (250, 450)] + [(groups[1], count) for count in (250, 450, 550, 597)]
        first = [(group, 100) for group in groups]
        assert found == [(group, merge, count) for group, count in (*first, *looks) for merge in ("drop", "fusion")]

    def test_a_member_that_lags_behind_catches_up(self, resnet):
        specs = grid(self.base.but(groups="all", sparsity=0.3), merge=["drop", "fusion"])  # 10 % and 88 %
        stored = next(sweep(specs[:1], resnet))
        found = last(sweep(specs, resnet, decide=True, known={specs[0]: stored}))
        assert {spec: result.count for spec, result in found.items()} == {specs[1]: 100}

    def test_a_point_without_partner_is_always_finished(self, resnet):
        (result,) = last(sweep([self.base], resnet, decide=True)).values()
        assert result.complete


class TestStored:
    specs = grid(BASE.but(limit=None), merge=["drop", "fusion"], sparsity=[0.1, 0.5])

    def test_what_the_store_holds_is_not_computed_again(self, session, store, runs):
        first = last(sweep(self.specs[:2], session, store))
        runs.clear()
        again = list(sweep(self.specs, session, store))
        assert again[:2] == list(first.values())
        assert set(runs) == set(self.specs[2:])
        runs.clear()
        assert len(last(sweep(self.specs, open_session(BASE), store))) == 4
        assert runs == []

    def test_a_partial_point_goes_on_from_where_it_was(self, store, monkeypatch):
        monkeypatch.setattr("intrafusion.evaluation.incremental.Meter._probe", lambda meter, network: 50)
        session = open_session(BASE)
        looks = sweep(self.specs[:1], session, store)
        assert next(looks).count == 100
        looks.close()
        seen = []

        def counting(meter, network, changed, start, stop, patience, correct=Meter.correct):
            seen.append((start, stop))
            return correct(meter, network, changed, start, stop, patience)

        monkeypatch.setattr(Meter, "correct", counting)
        found = last(sweep(self.specs[:1], session, store))[self.specs[0]]
        assert seen == [(100, 597)]
        assert found.correct == run_spec(self.specs[0], session).correct

    def test_other_weights_or_images_are_other_points(self, session, store, runs):
        list(sweep(self.specs[:1], session, store))
        runs.clear()
        other = session.on(replace(session.images(), labels=session.images().labels.flip(0)))
        assert len(list(sweep(self.specs[:1], other, store))) == len(runs) > 0

    def test_a_study_that_is_broken_off_releases_its_claims(self, session, store, tmp_path):
        looks = sweep(self.specs, session, store)
        next(looks)
        looks.close()
        with Store(tmp_path / "s.sqlite") as other:
            assert other.claim(self.specs[-1], origin(self.specs[-1], session))

    def test_a_point_that_another_process_has_claimed_is_left_to_it(self, session, store, tmp_path, runs):
        """The other finishes while we wait for it."""
        specs = grid(BASE, merge=["drop", "fusion"], sparsity=[0.1, 0.5])  # one look each
        taken, point = specs[0], origin(specs[0], session)
        with Store(tmp_path / "s.sqlite") as other:
            assert other.claim(taken, point)
            looks = sweep(specs, session, store)
            ours = [next(looks) for _ in specs[1:]]
            assert {result.spec for result in ours} == set(specs[1:])
            result = run_spec(taken, session)
            other.put(result, point)
            other.release(taken, point)
            assert list(looks) == [result]
            assert taken not in runs


class TestFailures:
    specs = grid(BASE, merge=["drop", "fusion"], sparsity=[0.1, 0.5])

    @pytest.fixture
    def broken(self, monkeypatch):
        def breaking(spec, *rest, measure=module.measure):
            if spec == self.specs[1]:
                raise RuntimeError("no such shape\nlots of it")
            return measure(spec, *rest)

        monkeypatch.setattr(module, "measure", breaking)

    def test_a_limit_above_all_images_is_none(self, session):
        keys = [point_key(spec, origin(spec, session)) for spec in grid(BASE, limit=[None, 597, 10**9, 596])]
        assert keys[0] == keys[1] == keys[2] != keys[3]

    def test_points_that_share_a_row_are_measured_once(self, session, store, runs):
        specs = grid(BASE, merge=["drop", "fusion"], solver=["exact", "sinkhorn"], limit=[50, 10**6])
        found = last(sweep(specs, session, store))
        assert {(spec.merge, spec.solver if spec.merge == "fusion" else "any", spec.limit) for spec in runs} == {
            ("drop", "any", 50), ("drop", "any", 10**6), ("fusion", "exact", 50), ("fusion", "sinkhorn", 50),
            ("fusion", "exact", 10**6), ("fusion", "sinkhorn", 10**6),
        }  # fmt: skip
        assert set(found) == set(specs)
        for spec in specs:
            assert found[spec].spec == spec
            assert found[spec].complete
        assert all(
            found[a].correct == found[b].correct
            for a, b in itertools.pairwise([spec for spec in specs if spec.merge == "drop" and spec.limit == 50])
        )

    @pytest.mark.usefixtures("broken")
    def test_one_point_fails_in_one_line_and_the_others_go_on(self, session, store):
        store.save_study("s", "", [(spec, origin(spec, session)) for spec in self.specs])
        found = list(sweep(self.specs, session, store))
        assert [result for result in found if isinstance(result, Failure)] == [
            Failure(self.specs[1], "RuntimeError: no such shape")
        ]
        assert set(last(found)) == {self.specs[0], *self.specs[2:]}
        assert store.failures("s") == {self.specs[1]: "RuntimeError: no such shape"}

    def test_images_that_are_too_much_fail_the_points_that_look_at_them(self, monkeypatch):
        session = open_session(self.specs[0])
        make = session.meter

        def meter(spec, memory):
            if spec.limit is None:
                raise MemoryError
            return make(spec, memory)

        monkeypatch.setattr(session, "meter", meter)
        found = list(sweep([self.specs[0].but(limit=None), *self.specs[1:]], session))
        (failure,) = [result for result in found if isinstance(result, Failure)]
        assert failure.spec == self.specs[0].but(limit=None)
        assert failure.reason.startswith("out of memory; use fewer images")
        assert set(last(found)) == set(self.specs[1:])

    def test_a_failed_point_is_tried_again(self, session, store, monkeypatch, request):
        with monkeypatch.context():
            request.getfixturevalue("broken")
            list(sweep(self.specs, session, store))
        monkeypatch.undo()
        assert set(last(sweep(self.specs, session, store))) == set(self.specs)

    def test_a_store_that_cannot_be_written_ends_the_study_and_keeps_its_points(self, session, store, monkeypatch):
        def full(result, origin, put=store.put, left=[2]):  # noqa: B006
            if not left[0]:
                raise itf.IntrafusionError("the disk is full")
            left[0] -= 1
            put(result, origin)

        monkeypatch.setattr(store, "put", full)
        found = []
        with pytest.raises(itf.IntrafusionError, match="full"):
            found.extend(result for result in sweep(self.specs, session, store) if found.append(result) is None)
        assert len(store.get((spec, origin(spec, session)) for spec in self.specs)) == 2


def test_cancelling_reaches_into_a_point(session):
    stop = threading.Event()
    looks = sweep(grid(BASE, sparsity=[0.1, 0.2]), session)
    with stoppable(stop):
        next(looks)
        stop.set()
        with pytest.raises(Cancelled):
            next(looks)
    assert session.folded is not None  # nothing is left locked


def _bits(result: Result) -> list[int]:
    return np.unpackbits(np.frombuffer(result.correct, np.uint8), count=result.count).tolist()
