"""Batches are as small as the memory of the network asks for."""

import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.data.datasets import normalise
from intrafusion.models import batching
from intrafusion.models.exported_program import built
from intrafusion.models.exported_program.program import Program
from intrafusion.pruning.groups.feature_maps import normalised


@pytest.fixture
def wide() -> Program:
    """Digits, each made 400 x 400 pixels large, and summed up."""
    steps = [
        ["upsample_nearest", [{"value": "x"}, [400, 400]], ["large"]],
        ["relu", [{"value": "large"}], ["again"]],
        ["mean", [{"value": "again"}, [2, 3], False], ["mean"]],
        [{"layer": "head"}, [{"value": "mean"}], ["logits"]],
    ]
    head = {"head": {"kind": "Linear", "in_features": 1, "out_features": 10, "whole": False}}
    about = {"format": 1, "image": [1, 8, 8], "given": "x", "answer": "logits", "layers": head, "learned": {}, "steps": steps}
    program = built(about, {"head.weight": torch.arange(10.0)[:, None] - 4.5})
    program.card = itf.ModelCard("wide", (0.5,), (1.0,), (1, 8, 8), 10, "digits")
    return program


def test_a_program_tells_the_bytes_of_an_image(wide):
    large = 4 * 400 * 400
    assert 2 * large <= wide.plan.image_bytes <= 5 * large


def test_a_network_sees_as_many_images_as_its_memory_holds(wide, monkeypatch):
    data = itf.load_data("digits").subset(50)
    monkeypatch.setattr(batching, "_MEMORY", 7 * wide.plan.image_bytes)
    wrapped = nn.Sequential(wide)
    assert [len(labels) for _, labels in batching.batches_for(wrapped, data)] == [7] * 7 + [1]
    assert [len(labels) for _, labels in normalised(wide, data, 4)] == [4] * 12 + [2]
    seen: list[int] = []
    wide.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    whole = wide(normalise(data.images, (0.5,), (1.0,))).argmax(1)
    assert torch.equal(itf.evaluate(wide, data, limit=None).correct, whole == data.labels)
    assert seen[0] == 50
    assert max(seen[1:]) == 7
    monkeypatch.setattr(batching, "_MEMORY", 1)
    assert {len(labels) for _, labels in batching.batches_for(wide, data)} == {1}


def test_another_network_sees_what_suits_the_device():
    data = itf.load_data("digits").subset(50)
    assert [len(labels) for _, labels in batching.batches_for(itf.load_model("digits-mlp"), data)] == [50]
