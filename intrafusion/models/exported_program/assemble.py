"""Programs as data, and the verification of a program before it becomes a module.

A description is a JSON-serialisable table of the steps, the numbers of each layer, and which tensors are parameters. `built` is
the only way to create a Program. It applies each step's rule to shapes that hold for any number of images, and adds up the cost
of the steps.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.layers import layer_built, layer_described, layer_made, put
from intrafusion.models.exported_program.operators import OPERATORS, Made, Operator
from intrafusion.models.exported_program.program import Plan, Program, Step, Value, Weight
from intrafusion.models.exported_program.shapes import DYNAMIC, Batch, Shape, at, whole

FORMAT = 1
STEPS, LAYERS, ARGUMENTS = 8_000, 4_000, 400_000
CLASSES = 100_000
DTYPES = (torch.float32, torch.int64, torch.bool)
_SIDE, _IMAGES = 1 << 16, 3  # limit on pixels of a side; number of images for which memory is counted
_ALIVE = 1 << 30  # limit on bytes in use at a time, for `_IMAGES` images
_WORK, _MACS = 3 << 30, 6e10  # limits for one image: numbers read and written; multiply-accumulates
_PATH = re.compile(r"(?!card\b)[A-Za-z_0-9][A-Za-z_0-9-]*(\.[A-Za-z_0-9-]+){0,20}")
_NAME = re.compile(r"\w{1,40}", re.ASCII)


def is_path(name: object) -> bool:
    """Return whether a weight may have this dotted name."""
    return isinstance(name, str) and len(name) <= 300 and _PATH.fullmatch(name) is not None


def described(program: Program) -> dict[str, Any]:
    """Describe a program as a JSON-serialisable table.

    `built` recreates the program from it and the program's tensors (see `tensors_of`).
    """
    plan = program.plan
    layers = {step.run for step in plan.steps if isinstance(step.run, str)}
    return {
        "format": FORMAT,
        "image": list(plan.image),
        "given": plan.given,
        "answer": plan.answer,
        "layers": {path: layer_described(program.get_submodule(path)) for path in sorted(layers)},
        "learned": dict(plan.learned),
        "steps": [_written(step) for step in plan.steps],
    }


def tensors_of(program: Program) -> dict[str, Tensor]:
    """Return the tensors of a program that `built` needs, by their dotted names."""
    return {name: tensor for name, tensor in program.state_dict().items() if not name.endswith("num_batches_tracked")}


def built(description: Any, tensors: Mapping[str, Tensor]) -> Program:
    """Build the program of a description, in eval mode, after verifying every step for any number of images.

    Raises IntrafusionError, with a message that follows "the program", if the description is invalid, the steps do not fit each
    other or their tensors, or work or memory exceeds the limits. Nothing is computed.
    """
    with _in_words():
        return _built(description, tensors)


def check_described(description: Any) -> None:
    """Raise IntrafusionError if this is not a valid table of steps and layers.

    Only `built` checks whether they fit their tensors.
    """
    with _in_words():
        _read(description)


@contextmanager
def _in_words() -> Iterator[None]:
    """Convert the exceptions that an invalid description causes into IntrafusionError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        if isinstance(error, IntrafusionError):
            raise
        raise IntrafusionError(f"its description is invalid ({type(error).__name__})") from error


def _read(description: Any) -> tuple[tuple[int, int, int], list[Step], str, str]:
    """Return the image size, the steps that the output needs, and the names of the input and the output."""
    if description["format"] != FORMAT:
        raise IntrafusionError(f"its description has format {str(description['format'])[:20]}, but {FORMAT} is required")
    image = tuple(map(whole, description["image"]))
    if len(image) != 3 or not all(1 <= side <= _SIDE for side in image):
        raise IntrafusionError(f"its images must be (channels, height, width), not {str(image)[:60]}")
    if len(description["steps"]) > STEPS:
        raise IntrafusionError(f"it has {len(description['steps']):,} steps; the limit is {STEPS:,}")
    if sum(1 + len(list(_leaves(raw[1]))) for raw in description["steps"]) > ARGUMENTS:
        raise IntrafusionError(f"its steps have more than {ARGUMENTS:,} arguments")
    given, answer = _name(description["given"]), _name(description["answer"])
    steps = _freed([_step(raw) for raw in description["steps"]], answer)
    if not isinstance(description["layers"], dict) or not isinstance(description["learned"], dict):
        raise IntrafusionError("it has no table of layers and weights")
    return image, steps, given, answer


def _built(description: Any, tensors: Mapping[str, Tensor]) -> Program:
    image, steps, given, answer = _read(description)
    runs = {step.run for step in steps if isinstance(step.run, str)}
    if len(runs) > LAYERS:
        raise IntrafusionError(f"it has {len(runs):,} layers; the limit is {LAYERS:,}")
    layers = {path: layer_built(path, description["layers"][path], tensors) for path in sorted(runs) if _is_path(path)}
    said = description["learned"]
    learned = {path: said[path] is True for path in _weights(steps) if _is_path(path)}
    own = {path: shape_of(path, tensors) for path in learned}
    logits, image_bytes = _proven(steps, given, answer, image, {path: layer for path, (layer, _) in layers.items()}, own)
    classes = logits.sizes[1] if len(logits.sizes) == 2 else None
    if logits.sizes[:1] != (Batch(1),) or type(classes) is not int or logits.dtype != torch.float32:
        raise IntrafusionError(f"it returns {logits} for a batch of images, not (batch, classes); {DYNAMIC}")
    if classes > CLASSES:
        raise IntrafusionError(f"it has {classes:,} classes; the limit is {CLASSES:,}")
    program = Program(Plan(tuple(steps), given, answer, image, classes, learned, image_bytes))
    for path, (layer, _) in layers.items():
        _put_layer(program, path, layer)
    for path, learns in learned.items():
        _put_tensor(program, path, tensors[path], learns)
    return program.eval().requires_grad_(False)


def _is_path(path: str) -> bool:
    if not is_path(path):
        raise IntrafusionError(f"it has weights with the invalid name {path[:80]!r}; use letters, digits, _, - and dots")
    return True


def _name(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise IntrafusionError(f"it has a value with the invalid name {str(name)[:40]!r}")
    return name


# -- steps as data


def _written(step: Step) -> list[Any]:
    run = {"layer": step.run} if isinstance(step.run, str) else step.run.name
    return [run, [_plain(one) for one in step.args], list(step.gives)]


def _plain(given: Any) -> Any:
    if isinstance(given, tuple):
        return [_plain(one) for one in given]
    if isinstance(given, Value):
        return {"value": given.name}
    if isinstance(given, Weight):
        return {"weight": given.path}
    return {"batch": given.times} if isinstance(given, Batch) else given


def _step(raw: Any) -> Step:
    run, args, gives = raw
    if isinstance(run, dict):
        ((_, run),) = run.items()
    elif run in OPERATORS:
        run = OPERATORS[run]
    else:
        raise IntrafusionError(f"it uses the operator {str(run)[:80]!r}, which is not supported")
    return Step(run, tuple(_meant(one) for one in args), tuple(None if one is None else _name(one) for one in gives))


def _meant(raw: Any, depth: int = 0) -> Any:
    if isinstance(raw, list) and depth < 2:
        return tuple(_meant(one, depth + 1) for one in raw)
    if isinstance(raw, dict):
        ((kind, about),) = raw.items()
        if kind == "batch":
            return Batch(whole(about))
        return {"value": Value, "weight": Weight}[kind](about)
    if raw is None or type(raw) in (int, float, bool, str):
        return raw
    raise IntrafusionError("it has an argument of an invalid kind")


def _leaves(raw: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(raw, list) and depth < 3:
        for one in raw:
            yield from _leaves(one, depth + 1)
    yield raw


def _parts(given: Any) -> Iterator[Any]:
    if isinstance(given, tuple):
        for one in given:
            yield from _parts(one)
    else:
        yield given


def _weights(steps: Sequence[Step]) -> list[str]:
    return sorted({one.path for step in steps for one in _parts(step.args) if isinstance(one, Weight)})


def _freed(steps: Sequence[Step], answer: str) -> list[Step]:
    """Keep the steps that the answer needs, and let each free the values that it is the last to read."""
    needed, kept = Counter([answer]), []
    for step in reversed(steps):
        gives = [one for one in step.gives if one is not None]
        if not any(name in needed for name in gives):
            continue
        read = {one.name for one in _parts(step.args) if isinstance(one, Value)}
        last = tuple(sorted(name for name in read | {*gives} if name not in needed))
        needed.update(read)
        kept.append(replace(step, last=last))
    return kept[::-1]


# -- verification


def shape_of(path: str, tensors: Mapping[str, Tensor]) -> Shape:
    """Return the shape of a tensor. Raises IntrafusionError if it is missing or has a type that no step may read."""
    if path not in tensors:
        raise IntrafusionError(f"it has no weights {path}")
    tensor = tensors[path]
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise IntrafusionError(f"its weights {path} are {tensor.dtype}; export the network in float32")
    shape = Shape(tuple(tensor.shape), tensor.dtype)
    return replace(shape, least=int(tensor.min()), most=int(tensor.max())) if tensor.dtype == torch.int64 else shape


def _proven(
    steps: Sequence[Step],
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
            raise IntrafusionError(f"its step {number} ({_called(step)}) is invalid: {error}") from error
        if len(made.shapes) != len(step.gives):
            raise IntrafusionError(
                f"its step {number} ({_called(step)}) gives {len(made.shapes)} tensors, not {len(step.gives)}"
            )
        for name, shape in zip(step.gives, made.shapes, strict=True):
            if name in shapes:
                raise IntrafusionError(f"it defines {name} twice")
            if name is not None:
                shapes[name] = shape
        cost.add(step, made, [one for arg in args for one in _parts(arg) if isinstance(one, Shape)])
    if answer not in shapes or answer == given:
        raise IntrafusionError("its output is not computed by any of its steps")
    return shapes[answer], -(-cost.most // _IMAGES)


def _shaped(given: Any, shapes: Mapping[str, Shape], weights: Mapping[str, Shape]) -> Any:
    if isinstance(given, tuple):
        return tuple(_shaped(one, shapes, weights) for one in given)
    if isinstance(given, Value):
        if given.name not in shapes:
            raise IntrafusionError(f"it uses {str(given.name)[:40]!r} before it is defined")
        return shapes[given.name]
    return weights[given.path] if isinstance(given, Weight) else given


def made_by(run: Operator | str, args: Sequence[Any], layers: Mapping[str, nn.Module]) -> Made:
    """Apply the rule of a step to arguments that have shapes in place of tensors."""
    if isinstance(run, Operator):
        return run.made(args)
    if len(args) != 1 or not isinstance(args[0], Shape):
        raise IntrafusionError("a layer takes one tensor")
    return layer_made(layers[run], args[0])


def _called(step: Step) -> str:
    return step.run if isinstance(step.run, str) else step.run.name


class _Cost:
    """Total cost of the steps. A value that may share another's memory keeps that memory alive and is counted too."""

    def __init__(self, given: str, shape: Shape):
        self.alive = self.most = self.work = self.macs = 0  # alive, most: bytes for `_IMAGES` images
        self.held: dict[str, _Block] = {}
        self._hold(given, shape, [])

    def add(self, step: Step, made: Made, read: Sequence[Shape]) -> None:
        sources = {one.name for one in _parts(step.args) if isinstance(one, Value)}
        views = isinstance(step.run, Operator) and step.run.views
        kept = [self.held[name] for name in sources] if views else []
        beside = 4 * at(made.beside, _IMAGES) + sum(shape.bytes(_IMAGES) for shape in read)
        for name, shape in zip(step.gives, made.shapes, strict=True):
            self._hold(name, shape, kept)
        self.most = max(self.most, self.alive + beside)
        if self.most > _ALIVE:
            raise IntrafusionError(
                f"it needs more than {_ALIVE >> 20:,} MiB of memory for {_IMAGES} images, in {_called(step)}"
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


# -- building the module


def _holder(program: nn.Module, path: str) -> nn.Module:
    """Return the module of this dotted name. Create missing ones as empty modules."""
    module = program
    for part in filter(None, path.split(".")):
        if part not in module._modules:
            _check_free(module, part, path)
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    return module


def _put_layer(program: nn.Module, path: str, layer: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    inside = _holder(program, holder)
    _check_free(inside, name, path)
    inside.add_module(name, layer)


def _put_tensor(program: nn.Module, path: str, tensor: Tensor, learns: bool) -> None:
    holder, _, name = path.rpartition(".")
    inside = _holder(program, holder)
    if name in inside._parameters or name in inside._buffers:  # it belongs to a layer, and another call uses it differently
        return
    _check_free(inside, name, path)
    put(inside, name, tensor, learns and tensor.is_floating_point())


def _check_free(module: nn.Module, name: str, path: str) -> None:
    if hasattr(module, name):
        raise IntrafusionError(f"it has weights named {path}, a name that modules already use")
