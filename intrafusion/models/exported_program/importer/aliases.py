"""What the names of a graph mean after changes in place, and which names may share memory.

Each name has a binding. An in-place change becomes a new value for the bindings that certainly mean the changed numbers. Other
bindings that may share them must not be read again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.importer.aten import EVAL
from intrafusion.models.exported_program.operators import OPERATORS
from intrafusion.models.exported_program.operators.table import Operator
from intrafusion.models.exported_program.program import ProgramStep, Value, Weight

_IN_PLACE = "write it without in-place operations, or save program.run_decompositions()"


@dataclass
class Memory:
    """Memory that several names of the file share, or may share.

    of_weights: whether it belongs to weights. changes: how many in-place changes it has had.
    """

    of_weights: bool = False
    changes: int = 0


class Binding:
    """Current meaning of a name in the file. An in-place change gives the name another value.

    memory: shared with the tensor's views, and with what may be a view or a copy depending on strides. of: the tensor that this
    is a slice of. place: where the slice is, as (dim, start, stop). repeats: whether it may show one number in several places.
    """

    def __init__(
        self,
        value: Value | Weight,
        memory: Memory | None = None,
        of: "Binding | None" = None,
        place: tuple[int, int, int] | None = None,
        repeats: bool = False,
    ):
        self._value, self.memory = value, memory or Memory()
        self.of, self.place, self.repeats = of, place, repeats
        self._seen = self.memory.changes

    @property
    def value(self) -> Value | Weight:
        """Return the current value.

        Raises IntrafusionError if an in-place change under another name may have changed it.
        """
        if self._seen != self.memory.changes:
            raise IntrafusionError(f"it reads a tensor that it may have changed in place under another name; {_IN_PLACE}")
        return self._value

    @property
    def last(self) -> Value | Weight:
        """Return the value when it was last known. Its shape and dtype stay the same."""
        return self._value

    def check_in_place(self, name: str, others: Iterable["Binding"]) -> None:
        """Refuse an in-place change, with `others` as arguments, that may change or read other numbers than its own."""
        _ = self.value
        if self.memory.of_weights:
            raise IntrafusionError(f"it changes its own weights in place ({name}_); {EVAL}")
        if self.repeats:
            raise IntrafusionError(f"it changes an expanded tensor in place ({name}_); {_IN_PLACE}")
        for one in others:
            if one.memory is self.memory and one is not self and not self._is_apart(one):
                raise IntrafusionError(f"it changes a tensor in place ({name}_) using a view of itself; {_IN_PLACE}")

    def _is_apart(self, other: "Binding") -> bool:
        """Return whether both are slices of one tensor that do not overlap."""
        if self.of is None or self.of is not other.of or self.place is None or other.place is None:
            return False
        (dim, start, stop), (same, begin, end) = self.place, other.place
        return dim == same and (stop <= begin or end <= start)

    def change(self, value: Value | Weight, written: Callable[["Binding", Value | Weight], Value]) -> None:
        """Set another value, and update the tensors that this is a slice of. Other names of this memory must not be read again.

        written: returns the tensor that a slice belongs to, with another value in place of the slice.
        """
        changed = [(self, value)]
        while (binding := changed[-1][0]).of is not None:
            changed.append((binding.of, written(*changed[-1])))
        self.memory.changes += 1
        for binding, value in changed:
            binding._value, binding._seen = value, self.memory.changes


def current(given: Any) -> Any:
    """Replace bindings in an argument with their current values, and lists with tuples."""
    if isinstance(given, Binding):
        return given.value
    return tuple(current(one) for one in given) if isinstance(given, list | tuple) else given


def bindings_in(given: Any) -> Iterator[Binding]:
    if isinstance(given, Binding):
        yield given
    elif isinstance(given, list | tuple):
        for one in given:
            yield from bindings_in(one)


def binding_of(made: Any, first: Any, steps: Sequence[ProgramStep]) -> Any:
    """Wrap the result of these steps in a binding if it is a tensor.

    first: the call's first argument, whose memory the result shares if it is a view.
    """
    if not isinstance(made, Value | Weight):
        return made
    run = steps[-1].run if steps else None
    if not isinstance(first, Binding) or not isinstance(run, Operator) or not run.views:
        return Binding(made)
    repeats = first.repeats or any(step.run is OPERATORS["expand"] for step in steps)
    if len(steps) == 1 and run is OPERATORS["slice"] and steps[0].args[4] == 1:
        return Binding(made, first.memory, first, steps[0].args[1:4], repeats)
    return Binding(made, first.memory, repeats=repeats)
