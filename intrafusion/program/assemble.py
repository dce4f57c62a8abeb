"""Steps, layers and tensors put together as a module."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.program.network import Program, Step, Value, Weight


def assembled(
    steps: Sequence[Step], given: str, answer: str, layers: Mapping[str, nn.Module], tensors: Mapping[str, Tensor],
    learned: Collection[str],
) -> Program:  # fmt: skip
    """The program of these steps, with its layers and its own tensors under their dotted names.

    given, answer: names of the batch of images and of the logits. learned: names of the tensors that are parameters.
    Raises IntrafusionError where a name is taken.
    """
    program = Program(_freed(steps, answer), given, answer)
    for name, layer in layers.items():
        _put_layer(program, name, layer)
    for path in {weight.path for step in steps for weight in _weights([step.args, step.kwargs])}:
        _put_tensor(program, path, tensors[path], path in learned)
    return program


def _values(given: Any) -> Iterator[str]:
    if isinstance(given, Value):
        yield given.name
    elif isinstance(given, list | tuple | dict):
        for one in given.values() if isinstance(given, dict) else given:
            yield from _values(one)


def _weights(given: Any) -> Iterator[Weight]:
    if isinstance(given, Weight):
        yield given
    elif isinstance(given, list | tuple | dict):
        for one in given.values() if isinstance(given, dict) else given:
            yield from _weights(one)


def _freed(steps: Sequence[Step], answer: str) -> list[Step]:
    """The steps that the answer needs, each of which lets go of what is read for the last time."""
    needed, kept = Counter([answer]), []
    for step in reversed(steps):
        gives = [step.gives] if isinstance(step.gives, str) else [one for one in step.gives if one]
        if not any(name in needed for name in gives):
            continue
        read = set(_values([step.args, step.kwargs]))
        last = tuple(sorted(name for name in read | {*gives} if name not in needed))
        needed.update(read)
        kept.append(Step(step.run, step.args, step.kwargs, step.gives, last))
    return kept[::-1]


def _holder(program: nn.Module, path: str) -> nn.Module:
    """The module of this dotted name, made of empty ones where there is none."""
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
    if name in inside._parameters or name in inside._buffers:  # of a layer that another call uses in its own way
        return
    _check_free(inside, name, path)
    put(inside, name, tensor, learns and tensor.is_floating_point())


def put(module: nn.Module, name: str, tensor: Tensor, learns: bool) -> None:
    if learns:
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(name, tensor)


def _check_free(module: nn.Module, name: str, path: str) -> None:
    if hasattr(module, name):
        raise IntrafusionError(f"it has weights named {path}, where modules have something else")
