"""A program as a module: layers for its convolutions, linear layers and batch norms, and table operators between them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.operators.table import Operator
from intrafusion.models.exported_program.shapes import Batch


@dataclass(frozen=True)
class Value:
    """Output of an earlier step, or the input images, by name."""

    name: str


@dataclass(frozen=True)
class Weight:
    """Parameter or buffer of the network, by its dotted name."""

    path: str


@dataclass(frozen=True)
class ProgramStep:
    """One call. run: an operator of the table, or the dotted name of a layer.

    args: numbers, strings, Values, Weights and multiples of the batch, possibly in tuples. gives: a name for each output
    tensor, or None if it is not read. last: values that no later step reads.
    """

    run: Operator | str
    args: tuple[Any, ...]
    gives: tuple[str | None, ...]
    last: tuple[str, ...] = field(default=())

    def __deepcopy__(self, memo: dict) -> "ProgramStep":
        return self


@dataclass(frozen=True)
class Plan:
    """Specification of what a program runs. given, answer: names of the image batch and of the logits. image: (C, H, W).

    learned: names of the tensors that belong to no layer, and whether each is a parameter. image_bytes: memory per image of a
    batch, besides the weights.
    """

    steps: tuple[ProgramStep, ...]
    given: str
    answer: str
    image: tuple[int, int, int]
    classes: int
    learned: Mapping[str, bool]
    image_bytes: int

    def __deepcopy__(self, memo: dict) -> "Plan":
        return self


class Program(nn.Module):
    """Network that runs its steps in order: (B, C, H, W) -> logits (B, classes). Layers are children under their own names."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        self._digest = hashlib.sha256("\n".join(map(_told, plan.steps)).encode()).hexdigest()[:16]

    def extra_repr(self) -> str:
        return f"steps={len(self.plan.steps)}, digest={self._digest}"

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Any] = {self.plan.given: x}
        for step in self.plan.steps:
            run = self.get_submodule(step.run) if isinstance(step.run, str) else step.run.run
            made = run(*(self._found(given, values, x) for given in step.args))
            several = isinstance(step.run, Operator) and step.run.several
            for place, name in enumerate(step.gives):
                if name is not None:
                    values[name] = made[place] if several else made
            for name in step.last:
                values.pop(name, None)
        return values[self.plan.answer]

    def _found(self, given: Any, values: Mapping[str, Any], x: Tensor) -> Any:
        """Resolve an argument: replace values, weights and batch sizes with tensors and integers."""
        if isinstance(given, Value):
            return values[given.name]
        if isinstance(given, Weight):
            return self._tensor(given.path)
        if isinstance(given, Batch):
            return x.shape[0] if given.times == 1 else x.shape[0] * given.times
        if isinstance(given, tuple):
            return tuple(self._found(one, values, x) for one in given)
        return given

    def _tensor(self, path: str) -> Tensor:
        """Return one of the program's own tensors by its dotted name."""
        holder, _, name = path.rpartition(".")
        found = getattr(self.get_submodule(holder), name)
        assert isinstance(found, Tensor)
        return found

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        """Load weights. Refuse indices and masks that differ from the ones that were checked."""
        for path in self.plan.learned:
            own, given = self._tensor(path), state_dict.get(f"{prefix}{path}")
            if given is not None and not own.is_floating_point() and not torch.equal(own, given.to(own)):
                raise IntrafusionError(f"{path} holds indices or a mask, which cannot be replaced; leave it out")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _told(step: ProgramStep) -> str:
    """Format a step as text that is the same in every process."""
    run = step.run if isinstance(step.run, str) else f"{step.run.name}()"
    return f"{run} {step.args} {step.gives}"
