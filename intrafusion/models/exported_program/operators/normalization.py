"""Normalisation by statistics of the input, and the rule of batch norms, which are layers."""

import torch.nn.functional as F

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.operators.checks import check_floats, check_shape
from intrafusion.models.exported_program.operators.table import Ints, rule_of
from intrafusion.models.exported_program.shapes import Shape


def normed(x: Shape, channels: int, ranks: tuple[int, ...]) -> Shape:
    """Rule of a batch norm with `channels` channels, for inputs with one of these numbers of dimensions."""
    check_floats(x)
    if len(x.sizes) not in ranks or x.sizes[1] != channels:
        raise IntrafusionError(f"statistics of {channels} channels do not fit {x}")
    return x


@rule_of(
    F.layer_norm,
    "layer_norm.default input normalized_shape weight bias eps",
    "native_layer_norm.default input normalized_shape weight bias eps",
)
def layer_norm(x: Shape, sizes: Ints, weight: Shape | None, bias: Shape | None, eps: float) -> Shape:
    check_floats(x)
    if not sizes or len(sizes) > len(x.sizes) or x.sizes[len(x.sizes) - len(sizes) :] != sizes:
        raise IntrafusionError(f"it cannot normalise {x} over {sizes}")
    check_shape(weight, *sizes)
    check_shape(bias, *sizes, what="a bias")
    return x


@rule_of(F.group_norm, "group_norm.default input num_groups weight bias eps")
def group_norm(x: Shape, groups: int, weight: Shape | None, bias: Shape | None, eps: float) -> Shape:
    check_floats(x)
    if len(x.sizes) < 2 or groups < 1 or not isinstance(x.sizes[1], int) or x.sizes[1] % groups:
        raise IntrafusionError(f"it cannot normalise {x} in {groups} groups")
    check_shape(weight, x.sizes[1])
    check_shape(bias, x.sizes[1], what="a bias")
    return x
