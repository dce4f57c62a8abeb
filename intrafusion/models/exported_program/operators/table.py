"""The table of operators: what an operator is, and the decorator that puts one into the table, with the calls that it replaces.

A rule has the name and arguments of its operator. It is given shapes in place of tensors, and returns the shape of the result
or raises IntrafusionError. Its annotations are checked before it is called: an `int` is an integer within 2^40, a `float` is
any finite number, `Sizes` may grow with the batch, and `Literal` lists the accepted values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.shapes import Batch, Shape, Size, whole_number

Ints = tuple[int, ...]
Pair = tuple[int, int]
Shapes = tuple[Shape, ...]
_Rule = TypeVar("_Rule", bound=Callable[..., Any])


@dataclass(frozen=True)
class StepOutput:
    """Output shapes and cost of a step. All of the costs may grow with the batch.

    work: numbers that it reads one by one, besides its arguments. macs: multiply-accumulates. beside: numbers that it keeps in
    memory while it runs.
    """

    shapes: Shapes
    macs: Size = 0
    work: Size = 0
    beside: Size = 0


@dataclass(frozen=True)
class Operator:
    """An operator. run: the function. rule: its shape rule. takes: the annotations of the rule's arguments, by name.

    several: whether it returns a list of tensors. views: whether its output may share memory with its input.
    """

    name: str
    run: Callable[..., Any]
    rule: Callable[..., Any]
    takes: Mapping[str, Any]
    several: bool
    views: bool

    def made(self, args: Sequence[Any]) -> StepOutput:
        """Apply the rule to these arguments. Raises IntrafusionError if the operator does not accept them."""
        if len(args) != len(self.takes):
            raise IntrafusionError(f"{self.name} takes {len(self.takes)} arguments, not {len(args)}")
        for (name, hint), value in zip(self.takes.items(), args, strict=True):
            if not _fits(value, hint):
                raise IntrafusionError(f"{name} of {self.name} must not be {_told(value)}")
        made = self.rule(*args)
        return made if isinstance(made, StepOutput) else StepOutput((made,) if isinstance(made, Shape) else tuple(made))


OPERATORS: dict[str, Operator] = {}
DIRECT_CALLS: dict[str, tuple[str, tuple[str, ...]]] = {}  # call of PyTorch -> operator, and the arguments that it takes


def _fits(value: Any, hint: Any) -> bool:
    """Return whether an argument matches an annotation of a rule."""
    if hint is int:
        return type(value) is int and bool(whole_number(value) or True)
    if hint is float:
        finite = type(value) is float and abs(value) <= torch.finfo(torch.float32).max
        return finite or _fits(value, int)
    if hint is Batch:
        return isinstance(value, Batch) and whole_number(value.times) >= 1
    if hint in (bool, Shape, type(None)):
        return type(value) is hint
    if get_origin(hint) is Literal:
        return type(value) in (str, int) and value in get_args(hint)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        inner = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return type(value) is tuple and len(value) == len(inner) and all(map(_fits, value, inner))
    return any(_fits(value, one) for one in get_args(hint))


def _told(value: Any) -> str:
    return f"a tensor {value}" if isinstance(value, Shape) else str(value)[:60]


def rule_of(run: Callable[..., Any], *calls: str, views: bool = False, name: str = "") -> Callable[[_Rule], _Rule]:
    """Put an operator into the table, with the decorated function as its rule.

    run: the function. calls: PyTorch's calls that this operator can replace, each as the name and overload of the call and the
    arguments of it that the operator takes, such as "softmax.int self dim". views: whether the operator's output may share
    memory with its input. name: that of the rule if empty.
    """

    def register(rule: _Rule) -> _Rule:
        own, takes = name or rule.__name__.rstrip("_"), get_type_hints(rule)
        several = takes.pop("return") == Shapes
        assert own not in OPERATORS
        OPERATORS[own] = Operator(own, run, rule, takes, several, views)
        for target, *used in map(str.split, calls):
            assert target not in DIRECT_CALLS
            DIRECT_CALLS[target] = own, tuple(used)
        return rule

    return register
