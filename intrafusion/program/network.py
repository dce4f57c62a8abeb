"""A program as a module: layers where it has convolutions, linear layers and batch norms, plain calls in between."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Value:
    """What an earlier step made, by its name in the program."""

    name: str


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer of the network, by its dotted name."""

    path: str


@dataclass(frozen=True)
class Step:
    """One call. run: a function, or the dotted name of a layer. args, kwargs: numbers, Values and Weights, also in lists.

    gives: a name for what it returns, or a list of names for what it returns several of. last: values that nobody reads later.
    """

    run: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gives: str | tuple[str | None, ...]
    last: tuple[str, ...] = field(default=())

    def __deepcopy__(self, memo: dict) -> "Step":
        return self


class Program(nn.Module):
    """Runs steps one after the other: (B, C, H, W) -> logits (B, classes). Its layers are children under their own names."""

    def __init__(self, steps: Sequence[Step], given: str, answer: str):
        super().__init__()
        self.steps, self.given, self.answer = tuple(steps), given, answer
        self._digest = hashlib.sha256("\n".join(map(_told, steps)).encode()).hexdigest()[:16]

    def extra_repr(self) -> str:
        return f"steps={len(self.steps)}, digest={self._digest}"

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Any] = {self.given: x}
        for step in self.steps:
            run = self.get_submodule(step.run) if isinstance(step.run, str) else step.run
            args, kwargs = (self._found(given, values) for given in (step.args, step.kwargs))
            made = run(*args, **kwargs)
            if isinstance(step.gives, str):
                values[step.gives] = made
            else:
                values |= {name: made[place] for place, name in enumerate(step.gives) if name is not None}
            for name in step.last:
                values.pop(name, None)
        return values[self.answer]

    def _found(self, given: Any, values: dict[str, Any]) -> Any:
        """The arguments with values and weights in their places."""
        if isinstance(given, Value):
            return values[given.name]
        if isinstance(given, Weight):
            layer, _, name = given.path.rpartition(".")
            return getattr(self.get_submodule(layer), name)
        if isinstance(given, dict):
            return {name: self._found(one, values) for name, one in given.items()}
        if isinstance(given, list | tuple):
            return type(given)(self._found(one, values) for one in given)
        return given


def _told(step: Step) -> str:
    """A step in words that are the same in every process."""
    run = step.run if isinstance(step.run, str) else f"{getattr(step.run, '__module__', '')}.{step.run.__name__}"
    return f"{run} {step.args} {step.kwargs} {step.gives}"
