"""Images whose label nobody knows: they count in no accuracy and no loss, and whatever needs no label sees them."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.evaluation.accuracy import logits, size
from intrafusion.evaluation.incremental import Meter
from intrafusion.reporting.artifact import making
from intrafusion.studies.measurement import run_spec
from intrafusion.studies.session import Session
from intrafusion.studies.sweeps import sweep
from intrafusion.studies.weight_space import Solutions
from intrafusion.training.recovery.finetune import hold_out

SPEC = itf.PruneSpec(model="mlp", dataset="noise", merge="drop", sparsity=0.3, limit=None)


@pytest.fixture(scope="module")
def some(networks):
    """A network, images of which every third has no label, and those that have."""
    network = networks("mlp")
    images = torch.randint(0, 256, (90, 3, 2, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    whole = itf.ImageData("noise", "train", images, torch.arange(90) % 5, network.data.classes)
    labels = logits(network.model, whole).argmax(1)
    labels[::4] = (labels[::4] + 1) % 5  # wrong
    labels[::3] = -1
    data = replace(whole, labels=labels)
    return network, data, replace(data, images=images[labels >= 0], labels=labels[labels >= 0])


def session_of(network, data):
    model = copy.deepcopy(network.model)
    return Session(model, list(network.groups), size(model, network.example), data)


def test_accuracy_is_of_the_others(some):
    network, data, known = some
    found = itf.evaluate(network.model, data, limit=None)
    assert (found.count, found.unlabelled) == (60, 30)
    assert found.accuracy == itf.evaluate(network.model, known, limit=None).accuracy == 45 / 60
    assert itf.evaluate(network.model, known).unlabelled == 0
    assert itf.evaluate(network.model, data, limit=20).count == 20


def test_so_are_points_and_sweeps(some):
    network, data, known = some
    expected = run_spec(SPEC, session_of(network, known))
    for found in (run_spec(SPEC, session_of(network, data)), *sweep([SPEC], session_of(network, data))):
        assert (found.count, found.total, found.correct) == (60, 60, expected.correct)
        assert (found.accuracy, found.dense_accuracy) == (expected.accuracy, 0.75)
    meter = Meter(network.model, data)
    assert len(meter) == 60
    assert int(meter.dense(60).sum()) == 45


def test_so_are_exports_and_the_answers_that_pruning_changes(some):
    network, data, _ = some
    *_, last = making(SPEC, session_of(network, data))
    assert last.result.result.count == 60
    assert last.result.note == "60 of 90 images have labels; accuracies are measured on these"
    assert int(Solutions(SPEC, session_of(network, data)).images.labels.min()) >= 0


def test_training_leaves_them_out(some):
    _, data, _ = some
    learned, held = hold_out(data)
    assert len(learned) + len(held) == 60
    assert int(torch.cat([learned.labels, held.labels]).min()) >= 0
    with pytest.raises(itf.IntrafusionError, match="at least 20 labelled images, not 10"):
        hold_out(replace(data, labels=torch.where(torch.arange(90) < 80, -1, 0)))


@pytest.mark.parametrize("criterion", ["taylor", "obd", "activation-gradient"])
def test_criteria_that_need_labels_do_not_see_them(some, criterion):
    network, data, known = some
    group = network.prunable[0]
    scores = [itf.score(network.model, group, criterion, images) for images in (data, known)]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("criterion", ["chip", "hrank", "greedy"])
def test_criteria_that_need_images_alone_do(networks, some, criterion):
    network, data, known = some
    group = network.prunable[0]
    none = replace(data, labels=torch.full_like(data.labels, -1))
    whole, unlabelled, few = (itf.score(network.model, group, criterion, images) for images in (data, none, known))
    torch.testing.assert_close(whole, unlabelled)
    assert criterion == "hrank" or not torch.equal(whole, few)


def test_where_nothing_has_a_label_it_is_one_line(some):
    network, data, _ = some
    none = replace(data, labels=torch.full_like(data.labels, -1))
    tries = [
        lambda: itf.evaluate(network.model, none), lambda: Meter(network.model, none),
        lambda: run_spec(SPEC, session_of(network, none)),
        lambda: itf.score(network.model, network.prunable[0], "taylor", none),
    ]  # fmt: skip
    for attempt in tries:
        with pytest.raises(itf.IntrafusionError, match="no image of noise has a label"):
            attempt()
    itf.prune(network.model, network.example, 0.3, merge="refit", data=none)


def test_a_folder_with_unknown_classes_says_how_many_count(tmp_path, monkeypatch, capsys, caplog):
    generator = np.random.default_rng(0)
    for folder, count in (("cats", 3), ("dogs", 2), ("later", 4)):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / folder / f"{i}.png")
    (tmp_path / "images/labels.json").write_text(json.dumps({"cats": 281, "dogs": 207, "later": -1}))
    (tmp_path / "tiny_network.py").write_text(TINY)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--model", "tiny_network:make", "--data", "imagenet", "--data-path", str(tmp_path / "images")]
    assert main(["curve", *words, "--sparsity", "0.5", "--merge", "drop", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["count"] == 5
    assert "5 of 9 images have labels; accuracies are measured on these" in caplog.text
    assert main(["data", "imagenet", "--data-path", str(tmp_path / "images"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labelled"] == 5


TINY = """
import torch
CARD = {"mean": [0.5] * 3, "std": [0.3] * 3, "input_size": [3, 32, 32], "classes": 1000, "dataset": "imagenet"}
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1000))
"""
