"""The description under construction: its steps, its layers, and the shapes of the values so far."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.architectures import PadShortcut
from intrafusion.models.exported_program.description import STEPS, as_table
from intrafusion.models.exported_program.importer.aliases import Binding, current
from intrafusion.models.exported_program.importer.signature import Signature
from intrafusion.models.exported_program.layers import layer_built, layer_made
from intrafusion.models.exported_program.operators import OPERATORS
from intrafusion.models.exported_program.operators.table import Operator
from intrafusion.models.exported_program.program import ProgramStep, Value, Weight
from intrafusion.models.exported_program.shapes import Batch, Shape, whole_number
from intrafusion.models.exported_program.verification import shape_of


class Draft:
    """Description under construction.

    images: the image batch. static: its size, if the file is only valid for this one. tensors: those of the file. learned: the
    names of its parameters. turned: values that are transposed weights.
    """

    def __init__(self, tensors: Mapping[str, Tensor], signature: Signature):
        self.tensors, self.learned, self.static, self._image = tensors, signature.learned, signature.batch, signature.image
        self.images = Value("images")
        self.turned: dict[Value, Weight] = {}
        self.steps: list[ProgramStep] = []
        self._shapes: dict[Value, Shape] = {self.images: Shape((Batch(1), *signature.image))}
        self._weights: dict[str, Shape] = {}
        self._layers: dict[str, nn.Module] = {}
        self._configs: dict[str, tuple] = {}
        self._found: dict[str, Tensor] = {}  # the tensors of the layers

    def finished(self, answer: Value) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the description and its tensors, for `built`.

        Raises IntrafusionError if a layer has another's weights, and steps read the weights whose name it has.
        """
        names = self._names_of_weights()
        if other := [
            path for path, name in names.items() if self._found.get(name, self.tensors[path]) is not self.tensors[path]
        ]:
            raise IntrafusionError(f"it has a layer with shared weights and uses {other[0]} elsewhere, which is not supported")
        learned = {name: path in self.learned for path, name in names.items()}
        steps = [replace(step, args=_renamed(step.args, names)) for step in self.steps]
        description = as_table(self._image, self.images.name, answer.name, self._layers, learned, steps)
        return description, {name: self.tensors[path] for path, name in names.items()} | self._found

    def _names_of_weights(self) -> dict[str, str]:
        """Return the description's names for weights that steps read: those of the file, unless a layer has that name."""
        owned = {where: f"{path}.{name}" for path, (_, _, parts) in self._configs.items() for name, where in parts.items()}
        return {path: owned[path] if path in self._layers else path for path in self._weights}

    def step(self, name: str, *args: Any) -> Any:
        """Add a step that runs an operator of the table. Return its Value, or its list of Values."""
        meant = tuple(current(one) for one in args)
        run = OPERATORS[name]
        return self._add(run, meant, run.made([self._shaped(one) for one in meant]).shapes)

    def layer(self, kind: str, config: dict[str, Any], parts: Mapping[str, Weight | None], x: Any) -> Any:
        """Add a step that runs the layer of these tensors, which is created at its first call.

        Return its Value, or None if another call uses the layer's tensors differently.
        """
        paths = {name: weight.path for name, weight in parts.items() if weight is not None}
        path = next(iter(paths.values()))
        path = path.rpartition(".")[0] or path
        if self._configs.setdefault(path, (kind, config, paths)) != (kind, config, paths):
            return None
        if path not in self._layers:
            whole = {"whole": parts["bias"] is not None}
            told = {name: list(one) if isinstance(one, tuple) else one for name, one in config.items()}
            own = {f"{path}.{name}": self.tensors[where] for name, where in paths.items()}
            self._layers[path], _ = layer_built(path, {"kind": kind, **told, **whole}, own)
            self._found |= own
        return self._add(path, (current(x),), layer_made(self._layers[path], self.shape(x)).shapes)

    def zeros(self, x: Any, channels: int, before: int, after: int) -> Any:
        """Add zero channels around those of an image, as a layer, because pruning must count them."""
        path = f"zeros_{len(self._layers)}"
        self._layers[path] = PadShortcut(channels, whole_number(before), whole_number(after), stride=1)
        return self._add(path, (current(x),), layer_made(self._layers[path], self.shape(x)).shapes)

    def _add(self, run: Operator | str, args: tuple[Any, ...], shapes: Sequence[Shape]) -> Any:
        if len(self.steps) >= STEPS:  # an in-place change of nested slices takes many steps
            raise IntrafusionError(f"it has more than {STEPS:,} steps")
        made = [Value(f"v{len(self._shapes) + place}") for place in range(len(shapes))]
        self._shapes |= dict(zip(made, shapes, strict=True))
        self.steps.append(ProgramStep(run, args, tuple(one.name for one in made)))
        return made if isinstance(run, Operator) and run.several else made[0]

    def _shaped(self, given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(self._shaped(one) for one in given)
        return self.shape(given) if isinstance(given, Value | Weight) else given

    def shape(self, given: Any) -> Shape:
        value = given.last if isinstance(given, Binding) else given
        if isinstance(value, Value):
            return self._shapes[value]
        if isinstance(value, Weight):
            return self._weight(value)
        raise IntrafusionError("it computes with a value that is not a tensor")

    def _weight(self, weight: Weight) -> Shape:
        if weight.path not in self._weights:
            self._weights[weight.path] = shape_of(weight.path, self.tensors)
        return self._weights[weight.path]


Call = Callable[[Draft, dict[str, Any]], Any]


def _renamed(given: Any, names: Mapping[str, str]) -> Any:
    """Return the arguments of a step with the weights renamed."""
    if isinstance(given, tuple):
        return tuple(_renamed(one, names) for one in given)
    return Weight(names[given.path]) if isinstance(given, Weight) else given
