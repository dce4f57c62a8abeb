"""From the nodes of an exported graph to a module: weights find their layers again, checks and dropout go."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.networks import PadShortcut
from intrafusion.program.archive import Written
from intrafusion.program.assemble import assembled, put
from intrafusion.program.network import Program, Step, Value, Weight
from intrafusion.program.operators import CHECKS, VIEWS, look_up, plain, split_target

_STEPS = 20_000
_PLAIN_KINDS = {"as_int": int, "as_bool": bool, "as_float": (int, float), "as_string": str, "as_none": bool}
_LISTS = {"as_ints": int, "as_bools": bool, "as_floats": (int, float)}
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")
_ADVICE = "call model.eval() before torch.export.export"


def lifted(written: Written) -> tuple[Program, list[Any]]:
    """The module of a program, in eval mode, and the sizes of its input, as [batch, C, H, W] with None for any that is open.

    Raises IntrafusionError, in words that follow "the program", where it cannot be one.
    """
    return _Lift(written).done()


class _Lift:
    """One program on its way to be a module."""

    def __init__(self, written: Written):
        self.graph, self.tensors = written.graph, written.tensors
        self.values: dict[str, Any] = {}  # name in the program -> Value, Weight or number that it means here
        self.learned: set[str] = set()
        self.turned: dict[str, Weight] = {}  # values that are a transposed weight
        self.layers: dict[str, nn.Module] = {}
        self.configs: dict[str, tuple] = {}
        self.steps: list[Step] = []
        self.given = self._inputs(written.signature["input_specs"])
        self.answer = self._answer(written.signature["output_specs"])

    def done(self) -> tuple[Program, list[Any]]:
        nodes = self.graph["nodes"]
        if len(nodes) > _STEPS:
            raise IntrafusionError(f"it has {len(nodes):,} steps, and at most {_STEPS:,} are taken")
        for place, node in enumerate(nodes):
            self._node(node, nodes[place + 1 :])
        answer = self.values.get(self.answer)
        if not isinstance(answer, Value):
            raise IntrafusionError("it gives back something that none of its steps makes")
        program = assembled(self.steps, self.given, answer.name, self.layers, self.tensors, self.learned)
        return program.eval().requires_grad_(False), self._sizes(self.given)

    def _inputs(self, specs: list[Mapping[str, Any]]) -> str:
        """Give weights and the image batch their meanings; the batch's name."""
        given = []
        for spec in specs:
            ((kind, about),) = spec.items()
            if kind == "user_input" and "as_tensor" in about["arg"]:
                given.append(about["arg"]["as_tensor"]["name"])
            elif kind in ("parameter", "buffer", "tensor_constant"):
                path = about[f"{kind}_name"]
                if path not in self.tensors:
                    raise IntrafusionError(f"it lacks the weights {str(path)[:80]}")
                self.values[about["arg"]["name"]] = Weight(path)
                if kind == "parameter":
                    self.learned.add(path)
            else:
                raise IntrafusionError(
                    f"it takes a {kind} besides images: one batch of images is what networks take here"
                )
        if len(given) != 1:
            raise IntrafusionError(f"it takes {len(given)} tensors: one batch of images is what networks take here")
        self.values[given[0]] = Value(given[0])
        return given[0]

    def _answer(self, specs: list[Mapping[str, Any]]) -> str:
        kinds = [kind for spec in specs for kind in spec]
        if any(kind.endswith("mutation") for kind in kinds):
            raise IntrafusionError(f"it changes its own buffers: {_ADVICE}")
        if kinds != ["user_output"] or "as_tensor" not in specs[0]["user_output"]["arg"]:
            raise IntrafusionError("it gives back something else than one tensor of logits, (images, classes)")
        return str(specs[0]["user_output"]["arg"]["as_tensor"]["name"])

    def _sizes(self, name: str) -> list[Any]:
        """The sizes that the file says a value has, None where they are open."""
        return [one.get("as_int") for one in self.graph["tensor_values"][name]["sizes"]]

    def _node(self, node: Mapping[str, Any], later: list[Mapping[str, Any]]) -> None:
        name, overload, in_place = split_target(node["target"])
        if name in CHECKS:
            return
        gives = _outputs(node["outputs"])
        args, kwargs = self._arguments(name, overload, node["inputs"], in_place)
        if name in _DROPOUTS:
            if args[2]:
                raise IntrafusionError(f"it draws at random ({name}): {_ADVICE}")
            self.values[gives[0]] = args[0]
            return
        if in_place:
            self._check_in_place(node, later)
        layer = self._layer(name, overload, args, kwargs)
        if layer is not None:
            step = Step(layer[0], (layer[1],), {}, gives[0] if len(gives) == 1 else (gives[0],))
            if len(gives) > 1:  # a norm without statistics to give back: one tensor, not three
                step = Step(layer[0], (layer[1],), {}, gives[0])
        elif self._is_flatten(name, args, gives):
            step = Step(torch.flatten, (args[0], 1), {}, gives[0])
        else:
            single = len(gives) == 1 and "as_tensors" not in node["outputs"][0]
            run = plain(name, overload, args, kwargs) or look_up(name, overload)
            step = Step(run, tuple(args), kwargs, gives[0] if single else tuple(gives))
        self.steps.append(step)
        for made in gives[:1] if isinstance(step.gives, str) else gives:
            self.values[made] = Value(made)
        if in_place:
            self.values[_first(node)] = Value(gives[0])
        self._remember_turned(name, args, gives)

    def _arguments(
        self, name: str, overload: str, given: list[Mapping[str, Any]], in_place: bool
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call, by place and by name, as the operator's schema has them."""
        if name.startswith("_operator."):
            return [self._meant(one["arg"]) for one in given], {}
        told = {one["name"]: self._meant(one["arg"]) for one in given if one["name"] not in ("device", "pin_memory")}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        schema = look_up(name, overload)._schema.arguments  # type: ignore[attr-defined]
        if in_place and "self" in told:  # what the pure operator may call otherwise
            told[schema[0].name] = told.pop("self")
        if unknown := told.keys() - {one.name for one in schema}:
            raise IntrafusionError(
                f"it gives aten.{name}.{overload} an argument {sorted(unknown)[0][:80]!r}, which that does not take"
            )
        for one in schema:
            if one.kwarg_only or len(args) < schema.index(one):
                kwargs |= {one.name: told[one.name]} if one.name in told else {}
            elif one.name in told:
                args.append(told[one.name])
            elif one.has_default_value():
                if any(other.name in told for other in schema[schema.index(one) :]) or name in _DROPOUTS:
                    args.append(one.default_value)
            else:
                raise IntrafusionError(f"it calls aten.{name}.{overload} without its {one.name}")
        return args, kwargs

    def _meant(self, argument: Mapping[str, Any]) -> Any:
        """What an argument means here: a number, a Value or Weight, or a list of them."""
        ((kind, raw),) = argument.items()
        if kind == "as_none":
            return None
        if kind == "as_float" and raw in ("Infinity", "-Infinity", "NaN"):
            return float(raw)
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
        raise IntrafusionError(f"it passes an argument of kind {str(kind)[:40]!r}, which programs may not use here")

    def _named(self, name: str) -> Any:
        if name not in self.values:
            raise IntrafusionError(f"it reads {str(name)[:80]!r} before anything makes it")
        return self.values[name]

    def _check_in_place(self, node: Mapping[str, Any], later: list[Mapping[str, Any]]) -> None:
        """Refuse work in place on what another name shows a part of; everywhere else the pure operator gives the same."""
        changed = _first(node)
        if not isinstance(self.values.get(changed), Value):
            raise IntrafusionError(f"it changes its own weights in place ({changed}): {_ADVICE}")
        for other in self.graph["nodes"]:
            name = str(other["target"]).rpartition("aten.")[2].partition(".")[0]
            if name in VIEWS and (changed in _outputs(other["outputs"]) or changed in _read(other)):
                raise IntrafusionError(f"it changes {changed} in place, of which there is a view: write it without")

    def _layer(self, name: str, overload: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[str, Any] | None:
        """The name of the layer that makes this call, and what it reads; None where no layer does."""
        if kwargs:
            return None
        if name in ("conv2d", "convolution"):
            return self._convolution(name, overload, args)
        if name == "linear":
            return self._linear(args[0], args[1], args[2] if len(args) > 2 else None)
        if name in ("addmm", "mm"):
            bias, read, weight = args if name == "addmm" else (None, *args)
            turned = self.turned.get(weight.name) if isinstance(weight, Value) else None
            return self._linear(read, turned, bias) if turned else None
        if name in ("batch_norm", "_native_batch_norm_legit_no_training"):
            return self._norm(name, args)
        if name in ("pad", "constant_pad_nd"):
            return self._channel_pad(args)
        return None

    def _convolution(self, name: str, overload: str, args: list[Any]) -> tuple[str, Any] | None:
        told = [*args, *(None, 1, 0, 1, 1)[len(args) - 2 :]]
        read, weight, bias, stride, padding, dilation = told[:6]
        rest = told[6:]
        if name == "convolution" and rest[0]:
            return None
        if not self._are_weights(weight, bias) or self.tensors[weight.path].ndim != 4:
            return None
        shape, groups = self.tensors[weight.path].shape, rest[-1]
        if type(groups) is not int or not 0 < groups <= shape[0] or shape[0] % groups:
            raise IntrafusionError(f"it has a convolution of {shape[0]} channels in {str(groups)[:20]} groups")
        numbers = [value if isinstance(value, str) else _pair(value) for value in (stride, padding, dilation)]
        config = (shape[1] * groups, shape[0], tuple(shape[2:]), *numbers, groups, bias is not None)
        return self._child(nn.Conv2d, config, {"weight": weight, "bias": bias}, read)

    def _linear(self, read: Any, weight: Any, bias: Any) -> tuple[str, Any] | None:
        if not self._are_weights(weight, bias) or self.tensors[weight.path].ndim != 2:
            return None
        outputs, inputs = self.tensors[weight.path].shape
        return self._child(nn.Linear, (inputs, outputs, bias is not None), {"weight": weight, "bias": bias}, read)

    def _norm(self, name: str, args: list[Any]) -> tuple[str, Any] | None:
        read, weight, bias, mean, var = args[:5]
        if name == "batch_norm" and args[5]:
            raise IntrafusionError(f"it normalises by each batch's own statistics: {_ADVICE}")
        if (
            not self._are_weights(mean, var)
            or var is None
            or not self._are_weights(mean, weight)
            or not self._are_weights(mean, bias)
        ):
            return None
        if (weight is None) != (bias is None) or not isinstance(read, Value):
            return None
        momentum, eps = args[-3:-1] if name == "batch_norm" else args[-2:]
        kind = nn.BatchNorm2d if len(self._sizes(read.name)) == 4 else nn.BatchNorm1d
        tensors = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        return self._child(
            kind, (len(self.tensors[mean.path]), float(eps), float(momentum), weight is not None), tensors, read
        )

    def _channel_pad(self, args: list[Any]) -> tuple[str, Any] | None:
        """Zero channels around an image's, which pruning has to count."""
        read, around, *rest = args
        sizes = self._sizes(read.name) if isinstance(read, Value) else []
        if len(sizes) != 4 or type(sizes[1]) is not int or any(one not in ("constant", 0, None) for one in rest):
            return None
        if len(around) != 6 or any(around[:4]) or not all(type(one) is int and one >= 0 for one in around[4:]):
            return None
        path = f"zeros_{len(self.layers)}"
        before, after = around[4:]
        self.layers[path] = PadShortcut(sizes[1], before, after, stride=1)
        return path, read

    def _are_weights(self, first: Any, second: Any) -> bool:
        """Whether the first is a float32 weight, and the second one, too, or nothing."""
        return (
            isinstance(first, Weight)
            and self.tensors[first.path].dtype == torch.float32
            and isinstance(second, Weight | None)
        )

    def _child(
        self, kind: type[nn.Module], config: tuple, tensors: Mapping[str, Any], read: Any
    ) -> tuple[str, Any] | None:
        """The layer of these tensors, made at its first call; None where another call uses them in another way."""
        told = {name: weight.path for name, weight in tensors.items() if weight is not None}
        path = next(iter(told.values()))
        path = path.rpartition(".")[0] or path
        if self.configs.setdefault(path, (kind, config, told)) != (kind, config, told):
            return None
        if path not in self.layers:
            try:
                with torch.device("meta"):
                    layer = kind(*config)
            except (RuntimeError, ValueError, TypeError) as error:
                raise IntrafusionError(f"its layer {path} makes no sense: {one_line(error)}") from error
            for name, where in told.items():
                if self.tensors[where].shape != getattr(layer, name).shape:
                    raise IntrafusionError(f"its layer {path} has a {name} of shape {tuple(self.tensors[where].shape)}")
                put(layer, name, self.tensors[where], isinstance(getattr(layer, name), nn.Parameter))
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.num_batches_tracked = torch.tensor(0)
            self.layers[path] = layer
        return path, read

    def _is_flatten(self, name: str, args: list[Any], gives: list[str]) -> bool:
        """Whether a view writes out what flattening says for any number of channels."""
        if name not in ("view", "reshape", "_unsafe_view") or not isinstance(args[0], Value):
            return False
        before, after = self._sizes(args[0].name), self._sizes(gives[0])
        count = 1
        for size in before[1:]:
            count *= size or 0
        return len(before) > 2 and len(after) == 2 and before[0] == after[0] and after[1] == count

    def _remember_turned(self, name: str, args: list[Any], gives: list[str]) -> None:
        swap = (
            name in ("t", "numpy_T")
            or (name == "permute" and args[1:] == [[1, 0]])
            or (name == "transpose" and sorted(args[1:]) == [0, 1])
        )
        if swap and isinstance(args[0], Weight) and self.tensors[args[0].path].ndim == 2:
            self.turned[gives[0]] = args[0]


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
            raise IntrafusionError(f"it makes a value of kind {str(kind)[:40]!r}, which programs may not use here")
    return names


def _read(node: Mapping[str, Any]) -> set[str]:
    """The names of the tensors that a node reads."""
    given = [one["arg"] for one in node["inputs"]]
    single = {one["as_tensor"]["name"] for one in given if "as_tensor" in one}
    return single | {tensor["name"] for one in given for tensor in one.get("as_tensors", [])}


def _first(node: Mapping[str, Any]) -> str:
    return str(node["inputs"][0]["arg"]["as_tensor"]["name"])


def _pair(value: Any) -> tuple[int, int]:
    both = (value, value) if type(value) is int else tuple(value) if isinstance(value, list) else ()
    both = both * 2 if len(both) == 1 else both
    if len(both) != 2 or not all(type(one) is int and 0 <= one < 1 << 16 for one in both):
        raise IntrafusionError(f"it has a convolution with {str(value)[:40]} where one or two whole numbers are needed")
    return both
