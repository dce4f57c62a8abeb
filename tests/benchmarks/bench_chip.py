"""Time chip's nuclear norms, as a plain loop over images and channels and as one batch, and a full-size case.

python -m pytest tests/benchmarks/bench_chip.py -s
"""

import time

import pytest
import torch

import intrafusion as itf
from intrafusion.pruning.importance.feature_map import nuclear_losses


def plain_loop(maps):
    losses = torch.zeros(maps.shape[:2], dtype=torch.float64)
    for image, rows in enumerate(maps.flatten(2).double()):
        whole = torch.linalg.matrix_norm(rows, "nuc")
        for channel in range(len(rows)):
            without = rows.clone()
            without[channel] = 0
            losses[image, channel] = whole - torch.linalg.matrix_norm(without, "nuc")
    return losses


def seconds(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


@pytest.mark.parametrize("shape", [(16, 32, 32), (64, 8, 8), (256, 4, 4), (512, 2, 2)])
def test_all_at_once_against_a_plain_loop(shape):
    maps = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)).relu()
    nuclear_losses(maps[:1])  # warm up LAPACK
    ours, losses = seconds(lambda: nuclear_losses(maps))
    plain, expected = seconds(lambda: plain_loop(maps))
    gap = float((losses - expected).abs().max())
    print(f"\n8 images of {shape}: plain loop {plain:.2f} s, all at once {ours:.2f} s, ratio {plain / ours:.1f}")
    assert gap < 1e-6


def test_full_case():
    model = itf.load_model("cifar10-resnet20", weights="random")
    group = next(g for g in itf.find_groups(model, model.card.example()) if g.name == "layer3.0.conv1")
    images = torch.randint(256, (640, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = itf.ImageData("noise", "test", images, torch.zeros(640, dtype=torch.int64), ("any",))
    taken, scores = seconds(lambda: itf.score(model, group, "chip", data, calibration=None))
    print(f"\nchip of {group.size} channels on 640 CIFAR-sized images, forward passes included: {taken:.1f} s")
    assert scores.shape == (64,)
