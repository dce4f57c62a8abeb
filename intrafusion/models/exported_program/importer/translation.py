"""Translation of an exported graph into a description, node by node: the algorithm, of which the other modules are the parts.

Weights are assigned to layers again. Checks and dropout are dropped. The description is not trusted: `built` verifies all of
it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.archive import ProgramFile
from intrafusion.models.exported_program.description import STEPS
from intrafusion.models.exported_program.importer.aliases import Binding, Memory, binding_of, bindings_in, current
from intrafusion.models.exported_program.importer.aten import CHECKS, COPIES, DROPOUTS, EVAL, NOTHING, SAME_TENSOR, arguments
from intrafusion.models.exported_program.importer.calls import translated
from intrafusion.models.exported_program.importer.draft import Draft
from intrafusion.models.exported_program.importer.nodes import argument, output_names, size_arithmetic, split_target
from intrafusion.models.exported_program.importer.signature import read_signature
from intrafusion.models.exported_program.program import Value, Weight
from intrafusion.models.exported_program.shapes import DYNAMIC, at


def lifted(written: ProgramFile) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Translate a program into a description and its tensors, for `built`.

    Raises IntrafusionError, with a message that follows "the program", if this is impossible.
    """
    return _Translation(written).done()


class _Translation:
    """Translation of one program. names: what each name in the program means; None if it must not be read."""

    def __init__(self, written: ProgramFile):
        self.graph, self.signature = written.graph, read_signature(written)
        self.draft = Draft(written.tensors, self.signature)
        self.names: dict[str, Any] = {
            name: Binding(Weight(path), Memory(of_weights=True)) for name, path in self.signature.weights.items()
        }
        self.names[self.signature.images] = Binding(self.draft.images)

    def done(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        nodes = self.graph["nodes"]
        if len(nodes) > STEPS:
            raise IntrafusionError(f"it has {len(nodes):,} steps; the limit is {STEPS:,}")
        for node in nodes:
            try:
                self._node(node)
            except IntrafusionError as error:
                if self.draft.static is None or "batch" not in str(error) or DYNAMIC in str(error):
                    raise
                raise IntrafusionError(f"{error}; {DYNAMIC}") from error
        answer = self.names.get(self.signature.answer)
        if not isinstance(answer, Binding) or not isinstance(answer.value, Value):
            raise IntrafusionError("its output is not computed by any of its steps")
        return self.draft.finished(answer.value)

    def _node(self, node: Mapping[str, Any]) -> None:
        name, overload, in_place = split_target(node["target"])
        if name in CHECKS:
            return
        gives = output_names(node["outputs"])
        if not overload:
            self.names[gives[0]] = size_arithmetic(name, [argument(one["arg"], self.names) for one in node["inputs"]])
            return
        told = arguments(name, overload, {one["name"]: argument(one["arg"], self.names) for one in node["inputs"]})
        if name in (*DROPOUTS, *NOTHING):
            self.names[gives[0]] = self._nothing(name, told)
            return
        first = next(iter(told.values()))
        if in_place:
            self._check_in_place(name, overload, told)
        steps = len(self.draft.steps)
        made = translated(self.draft, name, overload, told)
        several = "as_tensors" in node["outputs"][0]
        if several != isinstance(made, list) or (several and len(made) != len(gives)):
            raise IntrafusionError(f"it expects {len(gives)} tensors from aten.{name}.{overload}, which returns another number")
        if in_place:
            if self.draft.shape(made) != self.draft.shape(first):
                raise IntrafusionError(
                    f"it changes the shape {self.draft.shape(first)} to {self.draft.shape(made)} in place ({name}_)"
                )
            first.change(current(made), self._with_slice)
            self.names[gives[0]] = first
            return
        self.names |= dict.fromkeys(gives)
        for place, one in zip(gives, made if several else [made], strict=False):
            self.names[place] = binding_of(one, first, self.draft.steps[steps:])

    def _check_in_place(self, name: str, overload: str, told: Mapping[str, Any]) -> None:
        """Refuse an in-place call unless it only changes the values of a tensor, in a way that can be followed."""
        first, *others = told.values()
        if not isinstance(first, Binding):
            raise IntrafusionError("it works in place on a value that is not a tensor")
        found = getattr(getattr(torch.ops.aten, f"{name}_", None), overload, None)
        if found is None or torch.Tag.inplace_view in found.tags:
            raise IntrafusionError(f"it uses the operator aten.{name}_.{overload}, which is not supported")
        first.check_in_place(name, bindings_in(others))

    def _with_slice(self, part: Binding, value: Value | Weight) -> Value:
        """Return the tensor that a slice belongs to, with new numbers in that slice."""
        assert part.of is not None
        assert part.place is not None
        whole, (dim, start, stop) = part.of.value, part.place
        size = at(self.draft.shape(whole).sizes[dim], 1)
        before = [self.draft.step("slice", whole, dim, 0, start, 1)] if start else []
        after = [self.draft.step("slice", whole, dim, stop, size, 1)] if stop < size else []
        made: Value = self.draft.step("cat", (*before, value, *after), dim)
        return made

    def _nothing(self, name: str, told: Mapping[str, Any]) -> Binding:
        """Translate a call that leaves the numbers unchanged."""
        binding = next(iter(told.values()))
        if not isinstance(binding, Binding):
            raise IntrafusionError(f"it calls aten.{name} on a value that is not a tensor")
        if name in DROPOUTS:
            if told["train"]:
                raise IntrafusionError(f"it draws random numbers ({name}); {EVAL}")
            return binding
        wanted = told.get("dtype") or (self.draft.shape(told["other"]).dtype if "other" in told else None)
        if wanted not in (None, self.draft.shape(binding).dtype):
            raise IntrafusionError(f"it converts {self.draft.shape(binding).dtype} to {wanted}; export the network in float32")
        if name in COPIES or told.get("copy"):
            return Binding(binding.value)
        if name in SAME_TENSOR or (name == "to" and not any(told.get(one) for one in ("device", "memory_format", "other"))):
            return binding
        # a copy or the same tensor, depending on its strides
        return Binding(binding.value, binding.memory, repeats=binding.repeats)
