import pytest

import intrafusion as itf
from intrafusion import sweep as module
from intrafusion.run import Bench, Result, open_bench, run
from intrafusion.sweep import grid, sweep

BASE = itf.PruneSpec(model="digits-mlp", limit=50)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return open_bench(BASE)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[itf.PruneSpec]:
    """The specs that were really computed."""
    computed: list[itf.PruneSpec] = []

    def counting(spec: itf.PruneSpec, bench: Bench) -> Result:
        computed.append(spec)
        return run(spec, bench)

    monkeypatch.setattr(module, "run", counting)
    return computed


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

    def test_results_come_in_order_and_are_those_of_run(self, bench, runs):
        results = list(sweep(self.specs, bench))
        assert [result.spec for result in results] == self.specs == runs
        for result in results:
            alone = run(result.spec, bench)
            assert (result.accuracy, result.params, result.macs) == (alone.accuracy, alone.params, alone.macs)

    def test_known_results_are_not_computed_again(self, bench, runs):
        known = {self.specs[1]: run(self.specs[1], bench)}
        mine = known[self.specs[1]]
        results = list(sweep(self.specs, bench, known))
        assert results[1] is mine
        assert runs == [self.specs[0], *self.specs[2:]]
        assert set(known) == set(self.specs)
        assert list(sweep(reversed(self.specs), bench, known)) == results[::-1]
        assert len(runs) == 3

    def test_point_that_comes_twice_is_computed_once(self, bench, runs):
        results = list(sweep([self.specs[0]] * 3, bench))
        assert len(results) == 3
        assert runs == [self.specs[0]]

    def test_computes_no_further_than_it_is_asked(self, bench, runs):
        known: dict[itf.PruneSpec, Result] = {}
        points = sweep(self.specs, bench, known)
        assert runs == []
        next(points)
        next(points)
        points.close()
        assert runs == self.specs[:2] == list(known)

    @pytest.mark.parametrize("changes", [{"merge": "melt"}, {"criterion": "luck"}, {"groups": ("nine",)}], ids=str)
    def test_bad_last_spec_is_refused_before_the_first_is_computed(self, bench, runs, changes):
        with pytest.raises(itf.IntrafusionError):
            next(sweep([*self.specs, BASE.but(**changes)], bench))
        assert runs == []

    def test_nothing_to_do_is_nothing(self, bench):
        assert list(sweep([], bench)) == []
