from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from intrafusion.runtime.cache import held_bytes

TENSOR, ARRAY = torch.zeros(10, 10), np.zeros((4, 4))


@dataclass(frozen=True)
class Pair:
    first: object
    second: object = None


def test_bytes_of_what_results_hold():
    assert held_bytes(TENSOR) == 400
    assert held_bytes(ARRAY) == 128
    assert held_bytes(b"four") == 4
    assert held_bytes([1, "text", None, Pair]) == 0
    assert held_bytes(Pair({"a": [TENSOR, (ARRAY,)]}, MappingProxyType({b"k": 1}))) == 400 + 128 + 1
    assert held_bytes(nn.BatchNorm1d(8)) == 4 * 8 * 4 + 8


def test_what_lies_in_one_place_counts_once_and_a_part_holds_the_whole():
    assert held_bytes([TENSOR, TENSOR[0], TENSOR.T, TENSOR.detach()]) == 400
    assert held_bytes([ARRAY[0], ARRAY[1]]) == 128
    network = nn.Linear(10, 10)
    assert held_bytes([network, nn.Sequential(network), network.weight]) == 440


def test_a_circle_ends():
    circle: list = [TENSOR]
    circle.append(circle)
    assert held_bytes(circle) == 400
