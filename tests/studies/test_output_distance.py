"""How far answers move, and which change: against logits written by hand."""

import pytest
import torch
from figure_reading import check_both_themes, numbers, title, traces
from torch import Tensor

import intrafusion as itf
from intrafusion.reporting.figures.output_distance import class_bars, distance_histograms
from intrafusion.studies.output_distance import KINDS, Outputs, outputs
from intrafusion.studies.session import open_session
from intrafusion.studies.weight_space import Solutions

LABELS = [0, 1, 2, 0, 1, 2, 0, 0]
SAID = {  # predictions of three classes, an image of every kind, and one that does not change
    "dense": [0, 1, 2, 1, 0, 0, 1, 0],
    "dropped": [1, 0, 2, 2, 1, 2, 2, 0],
    "fused": [0, 2, 1, 0, 2, 2, 1, 0],
}


def answers(said: list[int], strength: float = 3.0) -> Tensor:
    return strength * torch.nn.functional.one_hot(torch.tensor(said), 3).double()


@pytest.fixture
def found() -> Outputs:
    return Outputs({name: answers(said) for name, said in SAID.items()}, torch.tensor(LABELS), ("ant", "bee", "cat"))


def test_every_kind_is_found(found):
    kinds = {kind: rows.tolist() for kind, rows in found.changed().items()}
    assert kinds == {kind: [place] for place, kind in enumerate(KINDS)}


def test_the_surest_come_first():
    sure = torch.tensor([1.0, 5.0, 3.0])
    dense = torch.zeros(3, 2)
    dense[:, 0] = sure
    other = dense.flip(1)
    found = Outputs({"dense": dense, "dropped": other, "fused": dense}, torch.zeros(3, dtype=torch.int64), ("a", "b"))
    assert found.changed()["fusion keeps"].tolist() == [1, 2, 0]


def test_distances_and_medians_by_hand(found):
    assert found.distance("dense").tolist() == [0] * 8
    moved = (3**2 + 3**2) ** 0.5
    assert found.distance("dropped").tolist() == pytest.approx([moved, moved, 0, moved, moved, moved, moved, 0])
    assert found.medians("fused") == pytest.approx({"ant": 0, "bee": moved, "cat": moved})


def test_rows_name_the_classes(found):
    rows = found.rows()
    assert len(rows) == 8
    assert rows[1] == {
        "image": 1, "class": "bee", "dense": "bee", "dropped": "ant", "fused": "cat",
        "dropped_distance": pytest.approx(18**0.5), "fused_distance": pytest.approx(18**0.5),
    }  # fmt: skip


def test_real_answers_come_one_network_after_the_other():
    spec = itf.PruneSpec(sparsity=0.4, limit=200)
    session = open_session(spec)
    steps = list(outputs(Solutions(spec, session)))
    assert [step.share for step in steps] == pytest.approx([1 / 3, 2 / 3, 1])
    data = session.images()
    for name, merge in (("dropped", "drop"), ("fused", "fusion")):
        small = itf.prune(session.model, session.example, 0.4, merge=merge)
        right = itf.evaluate(small, data, limit=200).correct
        assert torch.equal(steps[-1].predictions(name) == steps[-1].labels, right)


class TestFigures:
    def test_histograms_hold_every_image_and_say_who_moves_further(self, found):
        fig = distance_histograms(found)
        assert [trace.name for trace in traces(fig, "bar")] == ["dropped", "fused"]
        assert [numbers(trace.y).sum() for trace in traces(fig, "bar")] == [8, 8]
        assert "about equally far" in title(fig)
        twice = Outputs({**found.logits, "dropped": found.logits["dense"] + 10}, found.labels, found.classes)
        assert title(distance_histograms(twice)).startswith("Dropping moves the logits 4")
        check_both_themes(lambda dark: distance_histograms(found, dark))

    def test_nothing_moved_is_drawn_too(self, found):
        still = Outputs(dict.fromkeys(SAID, found.logits["dense"]), found.labels, found.classes)
        assert "about equally far" in title(distance_histograms(still))

    def test_classes_side_by_side(self, found):
        fig = class_bars(found)
        assert title(fig) == "Fused is closer to dense than dropped in 1 of 3 classes"
        assert list(traces(fig, "bar")[0].x) == ["ant", "bee", "cat"]
        check_both_themes(lambda dark: class_bars(found, dark))
