"""The verification of a program: each step's rule is applied to shapes that hold for any number of images.

The cost of the steps is added up and limited. Nothing is computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.description import flat_args
from intrafusion.models.exported_program.layers import layer_made
from intrafusion.models.exported_program.operators.table import Operator, StepOutput
from intrafusion.models.exported_program.program import ProgramStep, Value, Weight
from intrafusion.models.exported_program.shapes import Batch, Shape, at

DTYPES = (torch.float32, torch.int64, torch.bool)
_IMAGES = 3  # number of images for which memory is counted
_ALIVE = 1 << 30  # limit on bytes in use at a time, for `_IMAGES` images
_WORK, _MACS = 3 << 30, 6e10  # limits for one image: numbers read and written; multiply-accumulates


def shape_of(path: str, tensors: Mapping[str, Tensor]) -> Shape:
    """Return the shape of a tensor. Raises IntrafusionError if it is missing or has a type that no step may read."""
    if path not in tensors:
        raise IntrafusionError(f"it has no weights {path}")
    tensor = tensors[path]
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise IntrafusionError(f"its weights {path} are {tensor.dtype}; export the network in float32")
    shape = Shape(tuple(tensor.shape), tensor.dtype)
    return replace(shape, least=int(tensor.min()), most=int(tensor.max())) if tensor.dtype == torch.int64 else shape


def proven(
    steps: Sequence[ProgramStep],
    given: str,
    answer: str,
    image: tuple[int, ...],
    layers: Mapping[str, nn.Module],
    weights: Mapping[str, Shape],
) -> tuple[Shape, int]:
    """Return the shape of the answer and the bytes that one image takes.

    Raises IntrafusionError if a step does not fit, or if all steps together exceed a limit.
    """
    shapes = {given: Shape((Batch(1), *image))}
    cost = _Cost(given, shapes[given])
    for number, step in enumerate(steps):
        args = [_shaped(one, shapes, weights) for one in step.args]
        try:
            made = made_by(step.run, args, layers)
        except IntrafusionError as error:
            raise IntrafusionError(f"its step {number} ({step_name(step)}) is invalid: {error}") from error
        if len(made.shapes) != len(step.gives):
            raise IntrafusionError(
                f"its step {number} ({step_name(step)}) gives {len(made.shapes)} tensors, not {len(step.gives)}"
            )
        for name, shape in zip(step.gives, made.shapes, strict=True):
            if name in shapes:
                raise IntrafusionError(f"it defines {name} twice")
            if name is not None:
                shapes[name] = shape
        cost.add(step, made, [one for arg in args for one in flat_args(arg) if isinstance(one, Shape)])
    if answer not in shapes or answer == given:
        raise IntrafusionError("it gives back something that none of its steps makes")
    return shapes[answer], -(-cost.most // _IMAGES)


def _shaped(given: Any, shapes: Mapping[str, Shape], weights: Mapping[str, Shape]) -> Any:
    if isinstance(given, tuple):
        return tuple(_shaped(one, shapes, weights) for one in given)
    if isinstance(given, Value):
        if given.name not in shapes:
            raise IntrafusionError(f"it uses {str(given.name)[:40]!r} before it is defined")
        return shapes[given.name]
    return weights[given.path] if isinstance(given, Weight) else given


def made_by(run: Operator | str, args: Sequence[Any], layers: Mapping[str, nn.Module]) -> StepOutput:
    """Apply the rule of a step to arguments that have shapes in place of tensors."""
    if isinstance(run, Operator):
        return run.made(args)
    if len(args) != 1 or not isinstance(args[0], Shape):
        raise IntrafusionError("a layer takes one tensor")
    return layer_made(layers[run], args[0])


def step_name(step: ProgramStep) -> str:
    return step.run if isinstance(step.run, str) else step.run.name


class _Cost:
    """Total cost of the steps. A value that may share another's memory keeps that memory alive and is counted too."""

    def __init__(self, given: str, shape: Shape):
        self.alive = self.most = self.work = self.macs = 0  # alive, most: bytes for `_IMAGES` images
        self.held: dict[str, _Block] = {}
        self._hold(given, shape, [])

    def add(self, step: ProgramStep, made: StepOutput, read: Sequence[Shape]) -> None:
        sources = {one.name for one in flat_args(step.args) if isinstance(one, Value)}
        views = isinstance(step.run, Operator) and step.run.views
        kept = [self.held[name] for name in sources] if views else []
        beside = 4 * at(made.beside, _IMAGES) + sum(shape.bytes(_IMAGES) for shape in read)
        for name, shape in zip(step.gives, made.shapes, strict=True):
            self._hold(name, shape, kept)
        self.most = max(self.most, self.alive + beside)
        if self.most > _ALIVE:
            raise IntrafusionError(
                f"it needs more than {_ALIVE >> 20:,} MiB of memory for {_IMAGES} images, in {step_name(step)}"
            )
        self.work += sum(shape.numbers(1) for shape in (*read, *made.shapes)) + at(made.work, 1)
        self.macs += at(made.macs, 1)
        if self.macs > _MACS:
            raise IntrafusionError(f"it needs more than {_MACS:.0e} multiply-accumulates per image")
        if self.work > _WORK:
            raise IntrafusionError(f"it reads and writes more than {_WORK:,} numbers per image")
        for name in step.last:
            if name in self.held:
                self._let_go(self.held.pop(name))

    def _hold(self, name: str | None, shape: Shape, kept: list["_Block"]) -> None:
        for block in kept:
            block.readers += 1
        block = _Block(shape.bytes(_IMAGES), kept)
        self.alive += block.bytes
        if name is not None:
            self.held[name] = block
        else:
            self._let_go(block)

    def _let_go(self, block: "_Block") -> None:
        left = [block]
        while left:
            block = left.pop()
            block.readers -= 1
            if not block.readers:
                self.alive -= block.bytes
                left += block.kept


class _Block:
    def __init__(self, size: int, kept: list["_Block"]):
        self.bytes, self.kept, self.readers = size, kept, 1
