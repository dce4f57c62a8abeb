"""Descriptions: programs as JSON-serialisable tables of the steps, the numbers of each layer, and which tensors are parameters.

A description is not trusted. Its form is checked here; `verification` and `assemble` check what it means.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.layers import layer_described
from intrafusion.models.exported_program.operators import OPERATORS
from intrafusion.models.exported_program.program import Program, ProgramStep, Value, Weight
from intrafusion.models.exported_program.shapes import Batch, whole_number

FORMAT = 1
STEPS, ARGUMENTS = 8_000, 400_000
_SIDE = 1 << 16  # limit on pixels of a side
_PATH = re.compile(r"(?!card\b)[A-Za-z_0-9][A-Za-z_0-9-]*(\.[A-Za-z_0-9-]+){0,20}")
_NAME = re.compile(r"\w{1,40}", re.ASCII)


def is_path(name: object) -> bool:
    """Return whether a weight may have this dotted name."""
    return isinstance(name, str) and len(name) <= 300 and _PATH.fullmatch(name) is not None


def describe_program(program: Program) -> dict[str, Any]:
    """Describe a program as a JSON-serialisable table.

    `built` recreates the program from it and the program's tensors (see `tensors_of`).
    """
    plan = program.plan
    paths = {step.run for step in plan.steps if isinstance(step.run, str)}
    layers = {path: program.get_submodule(path) for path in sorted(paths)}
    return as_table(plan.image, plan.given, plan.answer, layers, plan.learned, plan.steps)


def as_table(
    image: Sequence[int],
    given: str,
    answer: str,
    layers: Mapping[str, nn.Module],
    learned: Mapping[str, bool],
    steps: Sequence[ProgramStep],
) -> dict[str, Any]:
    """Return the description with these contents, of which `Plan` says the meaning."""
    return {
        "format": FORMAT,
        "image": list(image),
        "given": given,
        "answer": answer,
        "layers": {path: layer_described(layer) for path, layer in layers.items()},
        "learned": dict(learned),
        "steps": [_written(step) for step in steps],
    }


def check_description(description: Any) -> None:
    """Raise IntrafusionError if this is not a valid table of steps and layers.

    Only `built` checks whether they fit their tensors.
    """
    with in_one_message():
        read_description(description)


@contextmanager
def in_one_message() -> Iterator[None]:
    """Convert the exceptions that an invalid description causes into IntrafusionError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        if isinstance(error, IntrafusionError):
            raise
        raise IntrafusionError(f"its description is invalid ({type(error).__name__})") from error


def read_description(description: Any) -> tuple[tuple[int, int, int], list[ProgramStep], str, str]:
    """Return the image size, the steps that the output needs, and the names of the input and the output."""
    if description["format"] != FORMAT:
        raise IntrafusionError(f"its description has format {str(description['format'])[:20]}, but {FORMAT} is required")
    image = tuple(map(whole_number, description["image"]))
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


def check_weight_name(path: str) -> bool:
    if not is_path(path):
        raise IntrafusionError(f"it has weights with the invalid name {path[:80]!r}; use letters, digits, _, - and dots")
    return True


def _name(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise IntrafusionError(f"it has a value with the invalid name {str(name)[:40]!r}")
    return name


def _written(step: ProgramStep) -> list[Any]:
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


def _step(raw: Any) -> ProgramStep:
    run, args, gives = raw
    if isinstance(run, dict):
        ((_, run),) = run.items()
    elif run in OPERATORS:
        run = OPERATORS[run]
    else:
        raise IntrafusionError(f"it uses the operator {str(run)[:80]!r}, which is not supported")
    return ProgramStep(run, tuple(_meant(one) for one in args), tuple(None if one is None else _name(one) for one in gives))


def _meant(raw: Any, depth: int = 0) -> Any:
    if isinstance(raw, list) and depth < 2:
        return tuple(_meant(one, depth + 1) for one in raw)
    if isinstance(raw, dict):
        ((kind, about),) = raw.items()
        if kind == "batch":
            return Batch(whole_number(about))
        return {"value": Value, "weight": Weight}[kind](about)
    if raw is None or type(raw) in (int, float, bool, str):
        return raw
    raise IntrafusionError("it has an argument of an invalid kind")


def _leaves(raw: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(raw, list) and depth < 3:
        for one in raw:
            yield from _leaves(one, depth + 1)
    yield raw


def flat_args(given: Any) -> Iterator[Any]:
    if isinstance(given, tuple):
        for one in given:
            yield from flat_args(one)
    else:
        yield given


def weights_of(steps: Sequence[ProgramStep]) -> list[str]:
    return sorted({one.path for step in steps for one in flat_args(step.args) if isinstance(one, Weight)})


def _freed(steps: Sequence[ProgramStep], answer: str) -> list[ProgramStep]:
    """Keep the steps that the answer needs, and let each free the values that it is the last to read."""
    needed, kept = Counter([answer]), []
    for step in reversed(steps):
        gives = [one for one in step.gives if one is not None]
        if not any(name in needed for name in gives):
            continue
        read = {one.name for one in flat_args(step.args) if isinstance(one, Value)}
        last = tuple(sorted(name for name in read | {*gives} if name not in needed))
        needed.update(read)
        kept.append(replace(step, last=last))
    return kept[::-1]
