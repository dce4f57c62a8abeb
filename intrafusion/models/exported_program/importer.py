"""Translation of an exported graph's nodes into a description.

Weights are assigned to layers again. Checks and dropout are dropped. The description is not trusted: `built` verifies all of
it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.architectures import PadShortcut
from intrafusion.models.exported_program.archive import Written
from intrafusion.models.exported_program.assemble import FORMAT, STEPS, shape_of
from intrafusion.models.exported_program.aten import (
    CHECKS,
    COPIES,
    DROPOUTS,
    NOTHING,
    SAME,
    SAME_TENSOR,
    SIZES,
    arguments,
    check_idle,
)
from intrafusion.models.exported_program.layers import KINDS, layer_built, layer_described, layer_made
from intrafusion.models.exported_program.operators import OPERATORS, axis
from intrafusion.models.exported_program.program import Value, Weight
from intrafusion.models.exported_program.shapes import (
    DYNAMIC,
    Batch,
    Shape,
    Size,
    at,
    divided,
    fitted,
    product,
    remainder,
    scaled,
    total,
    whole,
)

_PLAIN_KINDS = {"as_int": int, "as_bool": bool, "as_float": (int, float), "as_string": str, "as_none": bool}
_LISTS = {"as_ints": int, "as_bools": bool, "as_floats": (int, float)}
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_LAST = (1 << 63) - 1  # marks an open end of a slice
_ADVICE = "call model.eval() before torch.export.export"
_IN_PLACE = "write it without in-place operations, or save program.run_decompositions()"
_FLOAT32 = 7
_INSTEAD = {  # advice for unsupported operators that networks often use
    "_weight_norm": "remove the weight norm before torch.export.export, by remove_parametrizations or remove_weight_norm",
    "conv_transpose2d": "replace it by F.interpolate and a convolution",
}


@dataclass
class _Memory:
    """Memory that several names of the file share, or may share.

    of_weights: whether it belongs to weights. changes: how many in-place changes it has had.
    """

    of_weights: bool = False
    changes: int = 0


class _Cell:
    """Current meaning of a name in the file. An in-place change gives the name another value.

    memory: shared with the tensor's views, and with what may be a view or a copy depending on strides. of: the tensor that this
    is a slice of. place: where the slice is, as (dim, start, stop). repeats: whether it may show one number in several places.
    """

    def __init__(
        self,
        value: Value | Weight,
        memory: _Memory | None = None,
        of: "_Cell | None" = None,
        place: tuple[int, int, int] | None = None,
        repeats: bool = False,
    ):
        self._value, self.memory = value, memory or _Memory()
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

    def check_in_place(self, name: str, others: Iterable["_Cell"]) -> None:
        """Refuse an in-place change, with `others` as arguments, that may change or read other numbers than its own."""
        _ = self.value
        if self.memory.of_weights:
            raise IntrafusionError(f"it changes its own weights in place ({name}_); {_ADVICE}")
        if self.repeats:
            raise IntrafusionError(f"it changes an expanded tensor in place ({name}_); {_IN_PLACE}")
        for one in others:
            if one.memory is self.memory and one is not self and not self._is_apart(one):
                raise IntrafusionError(f"it changes a tensor in place ({name}_) using a view of itself; {_IN_PLACE}")

    def _is_apart(self, other: "_Cell") -> bool:
        """Return whether both are slices of one tensor that do not overlap."""
        if self.of is None or self.of is not other.of or self.place is None or other.place is None:
            return False
        (dim, start, stop), (same, begin, end) = self.place, other.place
        return dim == same and (stop <= begin or end <= start)

    def change(self, value: Value | Weight, written: Callable[["_Cell", Value | Weight], Value]) -> None:
        """Set another value, and update the tensors that this is a slice of. Other names of this memory must not be read again.

        written: returns the tensor that a slice belongs to, with another value in place of the slice.
        """
        changed = [(self, value)]
        while (cell := changed[-1][0]).of is not None:
            changed.append((cell.of, written(*changed[-1])))
        self.memory.changes += 1
        for cell, value in changed:
            cell._value, cell._seen = value, self.memory.changes


def lifted(written: Written) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Translate a program into a description and its tensors, for `built`.

    Raises IntrafusionError, with a message that follows "the program", if this is impossible.
    """
    return _Lift(written).done()


class _Lift:
    """Translation of one program into a description."""

    def __init__(self, written: Written):
        self.graph, self.tensors = written.graph, written.tensors
        self.names: dict[str, Any] = {}  # name in the program -> cell or size; None if it must not be read
        self.shapes: dict[Value, Shape] = {}
        self.weights: dict[str, Shape] = {}
        self.learned: set[str] = set()
        self.turned: dict[Value, Weight] = {}  # values that are transposed weights
        self.layers: dict[str, nn.Module] = {}
        self.configs: dict[str, tuple] = {}
        self.found: dict[str, Tensor] = {}  # the tensors of the description
        self.steps: list[list[Any]] = []
        self.static: int | None = None  # batch size, if it was exported for this one only
        self.image = self._inputs(written.signature["input_specs"])
        self.answer = self._answer(written.signature["output_specs"])

    def done(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        nodes = self.graph["nodes"]
        if len(nodes) > STEPS:
            raise IntrafusionError(f"it has {len(nodes):,} steps; the limit is {STEPS:,}")
        for node in nodes:
            try:
                self._node(node)
            except IntrafusionError as error:
                if self.static is None or "batch" not in str(error) or DYNAMIC in str(error):
                    raise
                raise IntrafusionError(f"{error}; {DYNAMIC}") from error
        answer = self.names.get(self.answer)
        if not isinstance(answer, _Cell) or not isinstance(answer.value, Value):
            raise IntrafusionError("its output is not computed by any of its steps")
        names = self._names_of_weights()
        if other := [
            path for path, name in names.items() if self.found.get(name, self.tensors[path]) is not self.tensors[path]
        ]:
            raise IntrafusionError(f"it has a layer with shared weights and uses {other[0]} elsewhere, which is not supported")
        description = {
            "format": FORMAT,
            "image": self.image,
            "given": "images",
            "answer": answer.value.name,
            "layers": {path: layer_described(layer) for path, layer in self.layers.items()},
            "learned": {name: path in self.learned for path, name in names.items()},
            "steps": _renamed(self.steps, names),
        }
        return description, {name: self.tensors[path] for path, name in names.items()} | self.found

    def _names_of_weights(self) -> dict[str, str]:
        """Return the description's names for weights that steps read: those of the file, unless a layer has that name."""
        owned = {where: f"{path}.{name}" for path, (_, _, parts) in self.configs.items() for name, where in parts.items()}
        return {path: owned[path] if path in self.layers else path for path in self.weights}

    # -- inputs and outputs

    def _inputs(self, specs: list[Mapping[str, Any]]) -> list[int]:
        """Define the weights and the image batch by name. Return the image size (C, H, W)."""
        given = []
        for spec in specs:
            ((kind, about),) = spec.items()
            if kind == "user_input" and "as_tensor" in about["arg"]:
                given.append(about["arg"]["as_tensor"]["name"])
            elif kind in ("parameter", "buffer", "tensor_constant"):
                path = about[f"{kind}_name"]
                if path not in self.tensors:
                    raise IntrafusionError(f"it has no weights {str(path)[:80]}")
                self.names[about["arg"]["name"]] = _Cell(Weight(path), _Memory(of_weights=True))
                if kind == "parameter":
                    self.learned.add(path)
            else:
                raise IntrafusionError(f"it must take one batch of images, but it also takes a {kind}")
        if len(given) != 1:
            raise IntrafusionError(f"it must take one batch of images, not {len(given)} tensors")
        about = self.graph["tensor_values"][given[0]]
        sizes = [one.get("as_int") for one in about["sizes"]]
        if len(sizes) != 4 or any(type(one) is not int or one < 1 for one in sizes[1:]) or about["dtype"] != _FLOAT32:
            raise IntrafusionError(
                f"its images must be float32 (batch, channels, height, width) of a fixed size, not {str(sizes)[:60]}"
            )
        self.static = sizes[0]
        self.names[given[0]] = _Cell(Value("images"))
        self.shapes[Value("images")] = Shape((Batch(1), *sizes[1:]))
        return sizes[1:]

    def _answer(self, specs: list[Mapping[str, Any]]) -> str:
        kinds = [kind for spec in specs for kind in spec]
        if any(kind.endswith("mutation") for kind in kinds):
            raise IntrafusionError(f"it changes its own buffers; {_ADVICE}")
        if kinds != ["user_output"] or "as_tensor" not in specs[0]["user_output"]["arg"]:
            raise IntrafusionError("it must return one tensor of logits, (images, classes)")
        return str(specs[0]["user_output"]["arg"]["as_tensor"]["name"])

    # -- nodes

    def _node(self, node: Mapping[str, Any]) -> None:
        name, overload, in_place = split_target(node["target"])
        if name in CHECKS:
            return
        gives = _outputs(node["outputs"])
        if not overload:
            self.names[gives[0]] = _arithmetic(name, [self._meant(one["arg"]) for one in node["inputs"]])
            return
        told = arguments(name, overload, {one["name"]: self._meant(one["arg"]) for one in node["inputs"]})
        if name in (*DROPOUTS, *NOTHING):
            self.names[gives[0]] = self._nothing(name, told)
            return
        first = next(iter(told.values()))
        if in_place:
            self._check_in_place(name, overload, told)
        steps = len(self.steps)
        made = self._call(name, overload, told)
        several = "as_tensors" in node["outputs"][0]
        if several != isinstance(made, list) or (several and len(made) != len(gives)):
            raise IntrafusionError(f"it expects {len(gives)} tensors from aten.{name}.{overload}, which returns another number")
        if in_place:
            if self._shape(made) != self._shape(first):
                raise IntrafusionError(f"it changes the shape {self._shape(first)} to {self._shape(made)} in place ({name}_)")
            first.change(_value(made), self._with_slice)
            self.names[gives[0]] = first
            return
        self.names |= dict.fromkeys(gives)
        for place, one in zip(gives, made if several else [made], strict=False):
            self.names[place] = _cell_of(one, first, self.steps[steps:])

    def _check_in_place(self, name: str, overload: str, told: Mapping[str, Any]) -> None:
        """Refuse an in-place call unless it only changes the values of a tensor, in a way that can be followed."""
        first, *others = told.values()
        if not isinstance(first, _Cell):
            raise IntrafusionError("it works in place on a value that is not a tensor")
        found = getattr(getattr(torch.ops.aten, f"{name}_", None), overload, None)
        if found is None or torch.Tag.inplace_view in found.tags:
            raise IntrafusionError(f"it uses the operator aten.{name}_.{overload}, which is not supported")
        first.check_in_place(name, _cells(others))

    def _with_slice(self, part: _Cell, value: Value | Weight) -> Value:
        """Return the tensor that a slice belongs to, with new numbers in that slice."""
        assert part.of is not None
        assert part.place is not None
        whole, (dim, start, stop) = part.of.value, part.place
        size = at(self._shape(whole).sizes[dim], 1)
        before = [self._step("slice", whole, dim, 0, start, 1)] if start else []
        after = [self._step("slice", whole, dim, stop, size, 1)] if stop < size else []
        made: Value = self._step("cat", (*before, value, *after), dim)
        return made

    def _nothing(self, name: str, told: Mapping[str, Any]) -> _Cell:
        """Translate a call that leaves the numbers unchanged."""
        cell = next(iter(told.values()))
        if not isinstance(cell, _Cell):
            raise IntrafusionError(f"it calls aten.{name} on a value that is not a tensor")
        if name in DROPOUTS:
            if told["train"]:
                raise IntrafusionError(f"it draws random numbers ({name}); {_ADVICE}")
            return cell
        wanted = told.get("dtype") or (self._shape(told["other"]).dtype if "other" in told else None)
        if wanted not in (None, self._shape(cell).dtype):
            raise IntrafusionError(f"it converts {self._shape(cell).dtype} to {wanted}; export the network in float32")
        if name in COPIES or told.get("copy"):
            return _Cell(cell.value)
        if name in SAME_TENSOR or (name == "to" and not any(told.get(one) for one in ("device", "memory_format", "other"))):
            return cell
        return _Cell(cell.value, cell.memory, repeats=cell.repeats)  # a copy or the same tensor, depending on its strides

    def _call(self, name: str, overload: str, told: dict[str, Any]) -> Any:
        """Translate a call. Return a Value, a size, or a list of Values."""
        target = f"{name}.{overload}"
        if target in SAME:
            ours, used = SAME[target]
            check_idle(name, overload, told, used)
            takes = OPERATORS[ours].takes.values()
            return self._step(ours, *(_as_taken(told[one], hint) for one, hint in zip(used, takes, strict=True)))
        return _CALLS[target](self, told)

    def _step(self, name: str, *args: Any) -> Any:
        """Add a step that runs an operator of the table. Return its Value, or its list of Values."""
        meant = tuple(_value(one) for one in args)
        return self._written(name, meant, OPERATORS[name].made([self._shaped(one) for one in meant]).shapes)

    def _written(self, run: Any, args: tuple[Any, ...], shapes: Sequence[Shape]) -> Any:
        if len(self.steps) >= STEPS:  # an in-place change of nested slices takes many steps
            raise IntrafusionError(f"it has more than {STEPS:,} steps")
        made = [Value(f"v{len(self.shapes) + place}") for place in range(len(shapes))]
        self.shapes |= dict(zip(made, shapes, strict=True))
        self.steps.append([run, [self._plain(one) for one in args], [one.name for one in made]])
        return made if isinstance(run, str) and OPERATORS[run].several else made[0]

    def _plain(self, given: Any) -> Any:
        if isinstance(given, tuple):
            return [self._plain(one) for one in given]
        if isinstance(given, Value):
            return {"value": given.name}
        if isinstance(given, Weight):
            self._weight(given)
            return {"weight": given.path}
        return {"batch": given.times} if isinstance(given, Batch) else given

    def _shaped(self, given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(self._shaped(one) for one in given)
        return self._shape(given) if isinstance(given, Value | Weight) else given

    def _shape(self, given: Any) -> Shape:
        value = given.last if isinstance(given, _Cell) else given
        if isinstance(value, Value):
            return self.shapes[value]
        if isinstance(value, Weight):
            return self._weight(value)
        raise IntrafusionError("it computes with a value that is not a tensor")

    def _weight(self, weight: Weight) -> Shape:
        if weight.path not in self.weights:
            self.weights[weight.path] = shape_of(weight.path, self.tensors)
        return self.weights[weight.path]

    def _meant(self, argument: Mapping[str, Any]) -> Any:
        """Translate an argument of the file: a number, a cell, or a list of them."""
        ((kind, raw),) = argument.items()
        if kind == "as_none":
            return None
        if kind in _PLAIN_KINDS and isinstance(raw, _PLAIN_KINDS[kind]) and len(str(raw)) < 40:  # type: ignore[arg-type]
            return raw
        if kind in _LISTS and isinstance(raw, list) and all(isinstance(one, _LISTS[kind]) for one in raw):  # type: ignore[arg-type]
            return list(raw)
        if kind in ("as_tensor", "as_optional_tensor"):
            return None if raw.get("as_none") else self._named(raw.get("as_tensor", raw)["name"])
        if kind in ("as_sym_int", "as_sym_bool", "as_sym_float"):
            return self._named(raw["as_name"]) if "as_name" in raw else self._meant(raw)
        if kind in ("as_sym_ints", "as_sym_floats"):
            return [self._named(one["as_name"]) if "as_name" in one else self._meant(one) for one in raw]
        if kind == "as_tensors":
            return [self._named(one["name"]) for one in raw]
        if kind == "as_optional_tensors":
            return [None if one.get("as_none") else self._named(one["as_tensor"]["name"]) for one in raw]
        if kind == "as_scalar_type" and raw in _DTYPES:
            return _DTYPES[raw]
        if kind == "as_memory_format" and raw in _FORMATS:
            return _FORMATS[raw]
        if kind == "as_layout" and raw == 7:
            return torch.strided
        if kind == "as_device":
            return str(raw)
        if kind == "as_float":
            raise IntrafusionError("it computes with NaN or infinity; write torch.finfo(torch.float32).min for -inf")
        raise IntrafusionError(f"it passes an argument of kind {str(kind)[:40]!r}, which is not supported")

    def _named(self, name: str) -> Any:
        if self.names.get(name) is None:
            raise IntrafusionError(f"it uses {str(name)[:80]!r} before it is defined")
        return self.names[name]

    # -- layers

    def _convolution(self, told: dict[str, Any]) -> Any:
        groups, bias = told["groups"], _value(told["bias"])
        if told.get("transposed"):
            raise IntrafusionError(f"it has a transposed convolution; {_INSTEAD['conv_transpose2d']}")
        padding = told["padding"] if isinstance(told["padding"], str) else _pair(told["padding"])
        numbers = (_pair(told["stride"]), padding, _pair(told["dilation"]), groups)
        weight = _value(told["weight"])
        if self._are_weights(weight, bias):
            outputs, inputs, *kernel = self._dims(weight, 4)
            if type(groups) is not int or not 0 < groups <= outputs or outputs % groups:
                raise IntrafusionError(f"it has a convolution of {outputs} channels in {str(groups)[:20]} groups")
            config = dict(zip(KINDS["Conv2d"].numbers, (inputs * groups, outputs, tuple(kernel), *numbers), strict=True))
            layer = self._layer("Conv2d", config, {"weight": weight, "bias": bias}, told["input"])
            if layer is not None:
                return layer
        return self._step("conv2d", told["input"], weight, bias, *numbers)

    def _linear(self, x: Any, weight: Any, bias: Any) -> Any:
        weight, bias = _value(weight), _value(bias)
        if self._are_weights(weight, bias):
            outputs, inputs = self._dims(weight, 2)
            config = {"in_features": inputs, "out_features": outputs}
            layer = self._layer("Linear", config, {"weight": weight, "bias": bias}, x)
            if layer is not None:
                return layer
        return self._step("linear", x, weight, bias)

    def _dims(self, weight: Weight, rank: int) -> list[int]:
        sizes = self.tensors[weight.path].shape
        if len(sizes) != rank:
            raise IntrafusionError(f"it has a layer whose weight {weight.path} has {len(sizes)} dimensions, not {rank}")
        return list(sizes)

    def _addmm(self, bias: Any, x: Any, weight: Any, beta: Any = 1, alpha: Any = 1) -> Any:
        if beta != 1 or alpha != 1:
            raise IntrafusionError("it scales the terms of a matrix product (alpha, beta); write the scaling as separate steps")
        turned = self.turned.get(_value(weight))
        if turned is not None and self._are_weights(turned, _value(bias)):
            return self._linear(x, turned, bias)
        made = self._step("matmul", x, weight)
        return made if bias is None else self._step("add", made, bias)

    def _addcmul(self, x: Any, first: Any, second: Any, value: Any) -> Any:
        made = self._step("mul", first, second)
        made = made if value == 1 else self._step("mul", made, value)
        return self._step("add", x, made)

    def _norm(self, told: dict[str, Any]) -> Any:
        if told.get("training"):
            raise IntrafusionError(f"it normalises by each batch's own statistics; {_ADVICE}")
        parts = {name: _value(told[name]) for name in ("running_mean", "running_var", "weight", "bias")}
        mean, var, weight, bias = parts.values()
        if mean is None or var is None:
            raise IntrafusionError(f"it normalises by each batch's own statistics; {_ADVICE}")
        if not self._are_weights(mean, var) or not self._are_weights(mean, weight) or not self._are_weights(mean, bias):
            raise IntrafusionError("it has a batch norm whose statistics and weights are not all stored in the file")
        if (weight is None) != (bias is None):
            raise IntrafusionError("it has a batch norm with only a weight or only a bias, which is not supported")
        kind = "BatchNorm2d" if len(self._shape(told["input"]).sizes) == 4 else "BatchNorm1d"
        config = {"num_features": self._dims(mean, 1)[0], "eps": told["eps"], "momentum": told["momentum"]}
        ordered = {name: parts[name] for name in ("weight", "bias", "running_mean", "running_var")}
        layer = self._layer(kind, config, ordered, told["input"])
        if layer is None:
            raise IntrafusionError("it has batch norms that share some of their weights and statistics, which is not supported")
        return layer

    def _are_weights(self, first: Any, second: Any) -> bool:
        """Return whether the first is a float32 weight, and the second a weight or None."""
        return (
            isinstance(first, Weight) and self.tensors[first.path].dtype == torch.float32 and isinstance(second, Weight | None)
        )

    def _layer(self, kind: str, config: dict[str, Any], parts: Mapping[str, Weight | None], x: Any) -> Any:
        """Add a step that runs the layer of these tensors, which is created at its first call.

        Return its Value, or None if another call uses the layer's tensors differently.
        """
        paths = {name: weight.path for name, weight in parts.items() if weight is not None}
        path = next(iter(paths.values()))
        path = path.rpartition(".")[0] or path
        if self.configs.setdefault(path, (kind, config, paths)) != (kind, config, paths):
            return None
        if path not in self.layers:
            whole = {"whole": parts["bias"] is not None}
            told = {name: list(one) if isinstance(one, tuple) else one for name, one in config.items()}
            own = {f"{path}.{name}": self.tensors[where] for name, where in paths.items()}
            self.layers[path], _ = layer_built(path, {"kind": kind, **told, **whole}, own)
            self.found |= own
        return self._written({"layer": path}, (_value(x),), layer_made(self.layers[path], self._shape(x)).shapes)

    def _pad(self, told: dict[str, Any]) -> Any:
        x, around = told["self"], _ints(told["pad"])
        mode, value = told.get("mode", "constant"), told["value"]
        if mode != "constant":
            return self._step("pad_as", x, around, mode)
        sizes = self._shape(x).sizes
        if (
            isinstance(_value(x), Value)
            and len(sizes) == 4
            and len(around) == 6
            and value in (None, 0)
            and not any(around[:4])
            and min(around) >= 0
            and isinstance(sizes[1], int)
        ):
            return self._zeros(x, sizes[1], around[4], around[5])
        return self._step("pad", x, around, 0.0 if value is None else value)

    def _zeros(self, x: Any, channels: int, before: int, after: int) -> Any:
        """Add zero channels around those of an image, as a layer, because pruning must count them."""
        path = f"zeros_{len(self.layers)}"
        self.layers[path] = PadShortcut(channels, whole(before), whole(after), stride=1)
        return self._written({"layer": path}, (_value(x),), layer_made(self.layers[path], self._shape(x)).shapes)

    # -- shapes

    def _reshaped(self, x: Any, sizes: Any) -> Any:
        shape, told = self._shape(x), _value(_tuple(sizes))
        if self.static is not None and shape.sizes[:1] == (Batch(1),) and told[:1] == (self.static,):
            told = (Batch(1), *told[1:])  # the file is only valid for this batch size
        after = fitted(shape, told)
        if len(shape.sizes) > 2 and after == (shape.sizes[0], product(shape.sizes[1:])):  # works for any number of channels
            return self._step("flatten", x, 1)
        return self._step("reshape", x, told)

    def _flattened(self, x: Any, start: int, end: int) -> Any:
        shape = self._shape(x)
        first, last = axis(shape, start), axis(shape, end)
        if first == 1 and last == len(shape.sizes) - 1:
            return self._step("flatten", x, 1)
        joined = product(shape.sizes[first : last + 1])
        return self._step("reshape", x, (*shape.sizes[:first], joined, *shape.sizes[last + 1 :]))

    def _unflattened(self, x: Any, dim: int, sizes: Any) -> Any:
        shape = self._shape(x)
        place = axis(shape, dim)
        return self._step("reshape", x, (*shape.sizes[:place], *_tuple(sizes), *shape.sizes[place + 1 :]))

    def _sliced(self, x: Any, dim: int, start: Any, end: Any, step: int) -> Any:
        shape = self._shape(x)
        place = axis(shape, dim)
        size = shape.sizes[place]
        begin = 0 if start is None else start
        if begin == 0 and step == 1 and (end in (None, _LAST) or end == size):
            return x
        if isinstance(size, Batch) or not all(type(one) is int for one in (begin, step)) or step < 1:
            raise IntrafusionError(f"it slices {shape} along the batch, which is not supported")
        stop = size if end in (None, _LAST) else whole(end)
        begin, stop = (max(0, one + size) if one < 0 else min(one, size) for one in (whole(begin), stop))
        return self._step("slice", x, place, begin, stop, step)

    def _split(self, x: Any, length: int, dim: int) -> Any:
        size = self._shape(x).sizes[axis(self._shape(x), dim)]
        if isinstance(size, Batch) or type(length) is not int or length < 1 or size > length * 1024:
            raise IntrafusionError(f"it splits {self._shape(x)} into parts of {str(length)[:20]}, which is not supported")
        lengths = tuple(min(length, size - start) for start in range(0, size, length))
        return self._step("split", x, lengths, dim)

    def _transposed(self, x: Any, first: int, second: int) -> Any:
        made, shape, weight = self._step("transpose", x, first, second), self._shape(x), _value(x)
        if isinstance(weight, Weight) and len(shape.sizes) == 2 and axis(shape, first) != axis(shape, second):
            self.turned[made] = weight
        return made

    def _permuted(self, x: Any, dims: Sequence[int]) -> Any:
        if len(dims) == len(self._shape(x).sizes) == 2 and [axis(self._shape(x), dim) for dim in dims] == [1, 0]:
            return self._transposed(x, 0, 1)
        return self._step("permute", x, tuple(dims))

    def _filled(self, x: Any, value: Any) -> Any:
        """Return a tensor of x's shape filled with one number, which may be a constant of the file."""
        number = _value(value)
        if isinstance(number, Weight) and self.tensors[number.path].numel() == 1 and number.path not in self.learned:
            number = self.tensors[number.path].item()
        return self._step("full", x, self._shape(x).sizes, number)

    def _copied(self, x: Any, source: Any) -> Any:
        if self._shape(source) == self._shape(x):
            return _value(source)
        return self._step("expand", source, self._shape(x).sizes)

    def _squeezed(self, x: Any, dims: Sequence[int]) -> Any:
        shape = self._shape(x)
        for place in sorted({axis(shape, dim) for dim in dims}, reverse=True):
            x = self._step("squeeze", x, place)
        return x

    def _all_of(self, x: Any, dims: Any) -> tuple[int, ...]:
        return tuple(range(len(self._shape(x).sizes))) if dims is None or dims == [] else _ints(dims)

    def _index(self, x: Any, indices: list[Any]) -> Any:
        if len(indices) != 1 or indices[0] is None:
            raise IntrafusionError("it indexes along other dimensions than the first, which is not supported")
        return self._step("index", x, indices[0])

    def _einsum(self, equation: Any, tensors: list[Any]) -> Any:
        """Translate a batched matrix product: "..id, ..jd -> ..ij" or "..ij, ..jd -> ..id"."""
        left, _, right = str(equation).replace(" ", "").partition("->")
        first, _, second = left.partition(",")
        stack, (row, inner) = first[:-2], (first[-2:-1], first[-1:])
        if len(tensors) == 2 and len({*first, *second}) == len(stack) + 3 and second[:-2] == stack == right[:-2]:
            if second[-1] == inner and right[-2:] == row + second[-2]:
                return self._step("matmul", tensors[0], self._step("transpose", tensors[1], -2, -1))
            if second[-2] == inner and right[-2:] == row + second[-1]:
                return self._step("matmul", *tensors)
        raise IntrafusionError(f"it uses the einsum {str(equation)[:40]!r}, which is not supported")

    def _attention(self, told: dict[str, Any]) -> Any:
        if told["dropout_p"] or told["is_causal"] or told.get("enable_gqa"):
            raise IntrafusionError("it has attention with dropout, a causal mask or shared heads, which is not supported")
        return self._step("attention", *(told[name] for name in ("query", "key", "value", "attn_mask", "scale")))

    def _pool(self, name: str, told: dict[str, Any]) -> Any:
        kernel, stride = _pair(told["kernel_size"]), _pair(told["stride"] or told["kernel_size"])
        if name == "max_pool2d":
            rest = (_pair(told["dilation"]), told["ceil_mode"])
        elif told["divisor_override"] is not None:
            raise IntrafusionError("it has pooling with divisor_override, which is not supported")
        else:
            rest = (told["ceil_mode"], told["count_include_pad"])
        return self._step(name, told["self"], kernel, stride, _pair(told["padding"]), *rest)

    def _upsampled(self, name: str, told: dict[str, Any], *corners: bool) -> Any:
        """Translate an upsampling to a given size, or by factors that give integer sizes."""
        sides, factors = told["output_size"], told.get("scale_factors")
        if sides is None and isinstance(factors, list):
            now = self._shape(told["input"]).sizes[2:]
            sides = [_enlarged(at(size, 1), float(one)) for size, one in zip(now, factors, strict=True)]
        return self._step(name, told["input"], _pair(sides), *corners)

    def _sum(self, name: str, told: dict[str, Any]) -> Any:
        other = told["other"] if told["alpha"] == 1 else self._step("mul", told["other"], told["alpha"])
        return self._step(name, told["self"], other)

    def _gated(self, x: Any, dim: int) -> Any:
        half = at(self._shape(x).sizes[axis(self._shape(x), dim)], 1) // 2
        first, second = self._step("split", x, (half, half), dim)
        return self._step("mul", first, self._step("sigmoid", second))

    def _new(self, told: dict[str, Any], sizes: Any, value: Any) -> Any:
        if told["dtype"] not in (None, torch.float32):
            raise IntrafusionError(f"it creates a tensor of {told['dtype']}; export the network in float32")
        return self._step("full", told["self"], _tuple(sizes), value)

    def _deviation(self, told: dict[str, Any], root: bool) -> Any:
        correction = 1 if told["correction"] is None else told["correction"]
        if correction not in (0, 1):
            raise IntrafusionError(f"it has a variance with correction={str(correction)[:20]}; only 0 and 1 are supported")
        made = self._step("var", told["self"], self._all_of(told["self"], told["dim"]), int(correction), told["keepdim"])
        return self._step("sqrt", made) if root else made

    def _length(self, told: dict[str, Any]) -> Any:
        if told["ord"] != 2 or told["dtype"] not in (None, torch.float32):
            raise IntrafusionError("it has a norm other than the Euclidean norm in float32, which is not supported")
        return self._step("norm", told["self"], self._all_of(told["self"], told["dim"]), told["keepdim"])

    def _instance_norm(self, told: dict[str, Any]) -> Any:
        if told["running_mean"] is not None or told["running_var"] is not None or not told["use_input_stats"]:
            raise IntrafusionError("it has an instance norm with running statistics, which is not supported")
        channels = self._shape(told["input"]).sizes[1]
        return self._step("group_norm", told["input"], channels, told["weight"], told["bias"], told["eps"])

    def _native_group_norm(self, told: dict[str, Any]) -> Any:
        return self._step("group_norm", told["input"], told["group"], told["weight"], told["bias"], told["eps"])


_Call = Callable[[_Lift, dict[str, Any]], Any]
_CALLS: dict[str, _Call] = {
    "add.Tensor": lambda on, t: on._sum("add", t),
    "sub.Tensor": lambda on, t: on._sum("sub", t),
    "glu.default": lambda on, t: on._gated(t["self"], t["dim"]),
    "std.dim": lambda on, t: on._deviation(t | {"correction": int(t["unbiased"])}, root=True),
    "var.dim": lambda on, t: on._deviation(t | {"correction": int(t["unbiased"])}, root=False),
    "addcmul.default": lambda on, t: on._addcmul(t["self"], t["tensor1"], t["tensor2"], t["value"]),
    "addmm.default": lambda on, t: on._addmm(t["self"], t["mat1"], t["mat2"], t["beta"], t["alpha"]),
    "avg_pool2d.default": lambda on, t: on._pool("avg_pool2d", t),
    "batch_norm.default": _Lift._norm,
    "_native_batch_norm_legit_no_training.default": _Lift._norm,
    "clamp_max.default": lambda on, t: on._step("clamp", t["self"], None, t["max"]),
    "clamp_min.default": lambda on, t: on._step("clamp", t["self"], t["min"], None),
    "conv2d.default": _Lift._convolution,
    "conv2d.padding": _Lift._convolution,
    "convolution.default": _Lift._convolution,
    "constant_pad_nd.default": _Lift._pad,
    "embedding.default": lambda on, t: on._step("index", t["weight"], t["indices"]),
    "copy.default": lambda on, t: on._copied(t["self"], t["src"]),
    "einsum.default": lambda on, t: on._einsum(t["equation"], t["tensors"]),
    "expand.default": lambda on, t: on._step("expand", t["self"], _tuple(t["size"])),
    "expand_as.default": lambda on, t: on._step("expand", t["self"], on._shape(t["other"]).sizes),
    "fill.Scalar": lambda on, t: on._filled(t["self"], t["value"]),
    "fill.Tensor": lambda on, t: on._filled(t["self"], t["value"]),
    "flatten.using_ints": lambda on, t: on._flattened(t["self"], t["start_dim"], t["end_dim"]),
    "index.Tensor": lambda on, t: on._index(t["self"], t["indices"]),
    "instance_norm.default": _Lift._instance_norm,
    "linalg_vector_norm.default": _Lift._length,
    "linear.default": lambda on, t: on._linear(t["input"], t["weight"], t["bias"]),
    "max.dim": lambda on, t: on._step("amax", t["self"], (t["dim"],), t["keepdim"]),
    "max_pool2d.default": lambda on, t: on._pool("max_pool2d", t),
    "max_pool2d_with_indices.default": lambda on, t: on._pool("max_pool2d", t),
    "min.dim": lambda on, t: on._step("amin", t["self"], (t["dim"],), t["keepdim"]),
    "mm.default": lambda on, t: on._addmm(None, t["self"], t["mat2"]),
    "narrow.default": lambda on, t: on._sliced(t["self"], t["dim"], t["start"], total(t["start"], t["length"]), 1),
    "native_group_norm.default": _Lift._native_group_norm,
    "new_zeros.default": lambda on, t: on._new(t, t["size"], 0),
    "zeros_like.default": lambda on, t: on._new(t, on._shape(t["self"]).sizes, 0),
    "ones_like.default": lambda on, t: on._new(t, on._shape(t["self"]).sizes, 1),
    "full_like.default": lambda on, t: on._new(t, on._shape(t["self"]).sizes, t["fill_value"]),
    "numpy_T.default": lambda on, t: on._permuted(t["self"], range(len(on._shape(t["self"]).sizes))[::-1]),
    "pad.default": _Lift._pad,
    "permute.default": lambda on, t: on._permuted(t["self"], _ints(t["dims"])),
    "reshape.default": lambda on, t: on._reshaped(t["self"], t["shape"]),
    "scaled_dot_product_attention.default": _Lift._attention,
    "slice.Tensor": lambda on, t: on._sliced(t["self"], t["dim"], t["start"], t["end"], t["step"]),
    "split.Tensor": lambda on, t: on._split(t["self"], t["split_size"], t["dim"]),
    "squeeze.dims": lambda on, t: on._squeezed(t["self"], t["dim"]),
    "std.correction": lambda on, t: on._deviation(t, root=True),
    "sym_size.int": lambda on, t: on._shape(t["self"]).sizes[axis(on._shape(t["self"]), t["dim"])],
    "t.default": lambda on, t: on._transposed(t["self"], 0, 1),
    "transpose.int": lambda on, t: on._transposed(t["self"], t["dim0"], t["dim1"]),
    "unflatten.int": lambda on, t: on._unflattened(t["self"], t["dim"], t["sizes"]),
    "upsample_bilinear2d.vec": lambda on, t: on._upsampled("upsample_bilinear", t, t["align_corners"]),
    "upsample_nearest2d.vec": lambda on, t: on._upsampled("upsample_nearest", t),
    "_unsafe_view.default": lambda on, t: on._reshaped(t["self"], t["size"]),
    "var.correction": lambda on, t: on._deviation(t, root=False),
    "view.default": lambda on, t: on._reshaped(t["self"], t["size"]),
    "view_as.default": lambda on, t: on._reshaped(t["self"], on._shape(t["other"]).sizes),
    "zero.default": lambda on, t: on._filled(t["self"], 0),
}


def split_target(target: Any) -> tuple[str, str, bool]:
    """Split an operator's target into its name, its overload, and whether it works in place.

    For example, aten.relu_.default gives ("relu", "default", True). Arithmetic on sizes gives ("add", "", False). Raises
    IntrafusionError for an operator that programs may not use.
    """
    told = target if isinstance(target, str) else ""
    if told.startswith("_operator.") and told.removeprefix("_operator.") in SIZES:
        return told.removeprefix("_operator."), "", False
    if found := re.fullmatch(r"torch\.ops\.aten\.(\w{1,60})\.(\w{1,60})", told):
        name, overload = found.groups()
        in_place = name.endswith("_")
        name = name.removesuffix("_")
        if name in (*CHECKS, *DROPOUTS, *NOTHING) or f"{name}.{overload}" in SAME or f"{name}.{overload}" in _CALLS:
            return name, overload, in_place
    instead = next((f"; {advice}" for start, advice in _INSTEAD.items() if told.startswith(f"torch.ops.aten.{start}")), "")
    raise IntrafusionError(f"it uses the operator {str(target)[:80]!r}, which is not supported{instead}")


def _arithmetic(name: str, args: list[Any]) -> Size | None:
    """Evaluate the file's arithmetic on sizes. Return None for a comparison, whose result must not be read."""
    for one in args:
        whole(one.times if isinstance(one, Batch) else one)
    if name == "neg":
        return scaled(args[0], -1)
    first, second = args
    if name == "sub":
        return total(first, scaled(second, -1))
    does = {"add": total, "mul": scaled, "floordiv": divided, "mod": remainder}
    return does[name](first, second) if name in does else None


def _enlarged(side: int, factor: float) -> int:
    """Return side * factor.

    Raises IntrafusionError if it is not an integer, or if interpolation by this factor and to this size would differ.
    """
    made = side * factor
    scales = torch.tensor([1 / factor if factor else 0.0, side / made if made else 1.0], dtype=torch.float32)
    if not made.is_integer() or scales[0] != scales[1]:
        raise IntrafusionError(f"it scales a side of {side} by {factor:g}; pass F.interpolate a size instead of scale_factor")
    return whole(int(made))


def _renamed(raw: Any, names: Mapping[str, str]) -> Any:
    """Return the steps with the weights renamed."""
    if isinstance(raw, list):
        return [_renamed(one, names) for one in raw]
    return {"weight": names[raw["weight"]]} if isinstance(raw, dict) and "weight" in raw else raw


def _value(given: Any) -> Any:
    """Replace cells in an argument with their current values, and lists with tuples."""
    if isinstance(given, _Cell):
        return given.value
    return tuple(_value(one) for one in given) if isinstance(given, list | tuple) else given


def _cells(given: Any) -> Iterator[_Cell]:
    if isinstance(given, _Cell):
        yield given
    elif isinstance(given, list | tuple):
        for one in given:
            yield from _cells(one)


def _cell_of(made: Any, first: Any, steps: Sequence[list[Any]]) -> Any:
    """Wrap the result of these steps in a cell if it is a tensor.

    first: the call's first argument, whose memory the result shares if it is a view.
    """
    if not isinstance(made, Value | Weight):
        return made
    run, args = steps[-1][:2] if steps else (None, [])
    if not isinstance(first, _Cell) or not isinstance(run, str) or not OPERATORS[run].views:
        return _Cell(made)
    repeats = first.repeats or any(step[0] == "expand" for step in steps)
    if len(steps) == 1 and run == "slice" and args[4] == 1:
        return _Cell(made, first.memory, first, tuple(args[1:4]), repeats)
    return _Cell(made, first.memory, repeats=repeats)


def _as_taken(given: Any, hint: Any) -> Any:
    """Convert an argument to the table's form: repeat a single number for a pair, and wrap one dimension in a tuple."""
    if hint == tuple[int, int]:
        return _pair(given)
    if hint == tuple[int, ...] and type(given) is int:
        return (given,)
    return given


def _tuple(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _ints(given: Any) -> tuple[int, ...]:
    return tuple(whole(one) for one in _tuple(given))


def _pair(given: Any) -> tuple[int, int]:
    numbers = _ints(given)
    numbers = numbers * 2 if len(numbers) == 1 else numbers
    if len(numbers) != 2:
        raise IntrafusionError(f"it has {str(given)[:40]} instead of one or two integers")
    return numbers[0], numbers[1]


def _outputs(outputs: list[Mapping[str, Any]]) -> list[str]:
    names: list[str] = []
    for output in outputs:
        ((kind, raw),) = output.items()
        if kind == "as_tensors":
            names += [one["name"] for one in raw]
        elif kind == "as_tensor":
            names.append(raw["name"])
        elif kind in ("as_sym_int", "as_sym_bool"):
            names.append(raw["as_name"])
        elif kind != "as_none":
            raise IntrafusionError(f"it returns a value of kind {str(kind)[:40]!r}, which is not supported")
    return names
