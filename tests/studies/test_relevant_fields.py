"""What of a spec its result depends on: specs that cannot differ are one, and what is declared is what is read."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion import PruneSpec
from intrafusion._registry import CRITERIA, MERGES, RECOVERIES, SOLVERS
from intrafusion.models.card import ModelCard
from intrafusion.pruning.transport.solvers import Problem
from intrafusion.studies.relevant_fields import calibrates, own_code, relevant, trains
from intrafusion.studies.session import Session, merged, open_session
from intrafusion.studies.store.sqlite import Origin, point_key
from intrafusion.training.recovery import RecoveryOptions
from intrafusion.training.recovery.settings import Case

SPEC, CPU = PruneSpec(), Origin("m", "d", "cpu")
MOVING = {"distance": "cosine", "p": 2.0, "source": "softmax", "target": "softmax", "solver": "sinkhorn", "reg": 0.05,
          "reg_m": 1.0, "mass": 0.5, "normalise": "target"}  # fmt: skip
COMPARING = {"cost": "activations", "bias": True}
TRAINING = {"training": 40, "epochs": 1.0, "budget": "compute", "rate": 0.01, "patience": 3}
KINDS = {"ratio": 3.0, "gamma": 5.0, "rank": 2}
STAYING = [name for name, entry in MERGES.items() if not entry.transports]


def alike(base: PruneSpec, changes: dict[str, Any]) -> set[str]:
    """The fields, of these, whose change makes no difference."""
    return {name for name, value in changes.items() if relevant(base.but(**{name: value})) == relevant(base)}


@pytest.mark.parametrize("merge", list(MERGES))
def test_a_merge_that_moves_nothing_depends_on_no_transport(merge):
    every = MOVING | COMPARING
    expected = set(every) if not MERGES[merge].transports else {"reg", "reg_m", "mass"}
    assert alike(SPEC.but(merge=merge), every) == expected
    centroids = SPEC.but(merge=merge, anchors="kmeans")
    assert relevant(centroids) != relevant(SPEC.but(merge=merge))
    assert alike(centroids, every) == expected - set(COMPARING)


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_a_solver_depends_on_its_own_knobs(solver):
    read = {"exact": set(), "sinkhorn": {"reg"}, "unbalanced": {"reg_m"}, "partial": {"mass"}}[solver]
    knobs = {"reg": 0.05, "reg_m": 1.0, "mass": 0.5}
    assert alike(SPEC.but(solver=solver), knobs) == set(knobs) - read


@pytest.mark.parametrize("recovery", list(RECOVERIES))
def test_a_recovery_depends_on_its_own_knobs(recovery):
    every, learns = TRAINING | KINDS, RECOVERIES[recovery].needs == "labels"
    own = {"similarity": {"gamma"}, "overparam": {"ratio"}, "overparam-sp": {"ratio", "gamma"}, "perp-lora": {"rank"},
           "perp-masklora": {"rank"}}.get(recovery, set())  # fmt: skip
    assert set(every) - alike(SPEC.but(recovery=recovery), every) == (set(TRAINING) | own if learns else set())
    assert trains(SPEC.but(recovery=recovery)) == learns


@pytest.mark.parametrize(
    ("change", "looks"),
    [({}, False), ({"criterion": "taylor"}, True), ({"cost": "activations"}, True), ({"merge": "calibrated"}, True),
     ({"merge": "drop", "cost": "activations"}, False), ({"recovery": "repair"}, True), ({"recovery": "finetune"}, False),
     ({"merge": "drop", "cost": "activations", "anchors": "gmm"}, True)],
)  # fmt: skip
def test_calibration_images_count_where_they_are_looked_at(change, looks):
    spec = SPEC.but(**change)
    assert calibrates(relevant(spec)) == looks
    assert (relevant(spec.but(calibration=7)) != relevant(spec)) == looks


def test_the_order_of_groups_does_not_count():
    assert relevant(SPEC.but(groups=("b", "a"))) == relevant(SPEC.but(groups=("a", "b"))) != relevant(SPEC)
    first = SPEC.but(groups=("a", "b", "c"), sparsities=(0.1, 0.2, 0.3))
    assert relevant(SPEC.but(groups=("c", "a", "b"), sparsities=(0.3, 0.1, 0.2))) == relevant(first)
    assert relevant(SPEC.but(groups=("c", "a", "b"), sparsities=(0.1, 0.2, 0.3))) != relevant(first)
    equal = SPEC.but(groups=("b", "a"), sparsities=(0.4, 0.4))
    assert relevant(equal) == relevant(SPEC.but(groups=("a", "b"), sparsity=0.4))


OTHERS = {
    "criterion": "l2", "sparsity": 0.4, "round_to": 8, "merge": "refit", "anchors": "gmm", "recovery": "repair", "seed": 1,
    "precision": "fast", "groups": ("a",), "cost": "activations", "bias": True, "normalise": "none", "model": "digits-vgg",
    "dataset": "cifar10", "solver": "partial", "p": 2.0, "source": "importance", "target": "softmax", "distance": "cosine",
}  # fmt: skip


@pytest.mark.parametrize("name", list(OTHERS))
def test_what_may_differ_counts(name):
    assert relevant(SPEC.but(**{name: OTHERS[name]})) != relevant(SPEC)


@pytest.mark.parametrize("name", ["criterion", "merge", "solver", "recovery"])
def test_an_unknown_name_is_left_to_who_measures(name):
    spec = SPEC.but(**{name: "own"}, epochs=3)
    assert relevant(spec) == spec


def test_the_code_of_methods_that_others_register_counts():
    key = {}
    for times in (1, 2):
        CRITERIA.register("own", "one's own")(lambda model, group, data, generator, times=times: times * torch.ones(group.size))
        try:
            key[times] = point_key(SPEC.but(criterion="own"), CPU)
        finally:
            del CRITERIA["own"]
    assert key[1] != key[2]
    assert own_code(SPEC) == own_code(SPEC.but(merge="refit", criterion="taylor", recovery="finetune")) == []


def test_what_is_declared_is_a_field():
    fields = {field.name for field in dataclasses.fields(PruneSpec)}
    for registry in (CRITERIA, MERGES, SOLVERS, RECOVERIES):
        assert {knob for entry in registry.values() for knob in entry.knobs} <= fields


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_solvers_read_what_they_declare(solver):
    random = np.random.default_rng(0)
    a, b, M = np.full(6, 1 / 6), np.full(3, 1 / 3), random.random((6, 3))
    plain = {"reg": 0.02, "reg_m": 5.0, "mass": 0.9}
    for knob, other in (("reg", 0.2), ("reg_m", 0.5), ("mass", 0.5)):
        first, second = (SOLVERS[solver](Problem(a, b, M, **{**plain, knob: v})) for v in (plain[knob], other))
        assert (np.abs(first - second).max() > 1e-6) == (knob in SOLVERS[solver].knobs)


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(SPEC.but(model="digits-mlp", limit=50))


@pytest.mark.parametrize("recovery", [name for name, entry in RECOVERIES.items() if entry.needs == "labels"])
def test_recoveries_read_what_they_declare(recovery, session):
    read = set()

    class Watched(RecoveryOptions):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    spec = SPEC.but(model="digits-mlp", criterion="l1", merge="drop", training=60)
    how = Watched(epochs=1, rate=0.01)
    read.clear()
    try:
        list(RECOVERIES[recovery](Case(merged(spec.but(recovery=recovery), session), session.training(spec), how)) or ())
    except itf.IntrafusionError:
        assert recovery == "perp-norm"  # there is none in this network
    named = {field.name for field in dataclasses.fields(RecoveryOptions)} & read
    assert named - {"seed"} <= {*RECOVERIES[recovery].knobs}
    assert {"training", "epochs", "rate"} <= {*RECOVERIES[recovery].knobs}


class Small(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(8 * 16, 10),
        )  # fmt: skip
        self.card = ModelCard("small", (0.5,), (0.5,), (1, 8, 8), 10, "digits")
        self.eval()


@pytest.mark.parametrize("merge", STAYING)
@pytest.mark.parametrize("anchors", ["important", "kmeans"])
def test_merges_that_stay_read_nothing_of_transport(merge, anchors):
    model, data = Small(), itf.load_data("digits").subset(40)
    moving = MOVING if anchors == "kmeans" else MOVING | {"cost": "activations"}
    first, second = (
        itf.prune(model, model.card.example(), 0.5, merge=merge, anchors=anchors, data=data, **knobs)
        for knobs in ({}, moving | {"p": 1.0})
    )
    for (name, ours), theirs in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
