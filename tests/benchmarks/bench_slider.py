"""Time the Transport page on the server, moving the sparsity against opening, for a narrow, a wide and a very wide layer.

python -m pytest tests/benchmarks/bench_slider.py -s
"""

import statistics
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from opening import open_page

LAYERS = {
    32: {"model": "digits-resnet"},
    512: {"model": "cifar10-vgg16_bn", "weights": "random", "group": "features.34"},
    2048: {"model": "ImageNet (torchvision)", "imagenet": "resnet50", "weights": "random", "group": "layer4.0.conv3"},
}


@pytest.mark.parametrize("channels", LAYERS)
def test_moving_the_slider(channels):
    app = open_page("overview", **LAYERS[channels])
    app._default_timeout = 300
    start = time.perf_counter()
    app.switch_page("pages/transport.py").run()
    opening = time.perf_counter() - start
    moves = []
    for percent in (35, 40, 45, 50, 55, 60, 70, 80):
        start = time.perf_counter()
        app.slider(key="sparsity").set_value(percent).run()
        moves.append(time.perf_counter() - start)
    assert not app.exception
    middle, worst = statistics.median(moves), max(moves)
    print(
        f"\n{channels:5d} channels: opened in {opening:5.2f} s, moved in {middle * 1e3:5.0f} ms "
        f"(at most {worst * 1e3:5.0f}), ratio {opening / middle:5.1f}"
    )
