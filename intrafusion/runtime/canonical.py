"""Canonical text of values and networks: the same in every process, wherever files and tensors are stored."""

import enum
import functools
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

_LIBRARIES = {"captum", "intrafusion", "numpy", "scipy", "sklearn", "torch", "torchvision"}  # libraries with known versions
_PLAIN = (bool, int, float, complex, str, bytes, range, slice, type(None), type(...), torch.dtype, torch.layout)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OWN = {*vars(nn.Module()), "card"}  # attributes of every module: described otherwise, or irrelevant
_COUNTER = "num_batches_tracked"
_CALLED = ("__call__", "__getattr__", "__getattribute__")
_SHARED = (Tensor, nn.Module, FunctionType, CodeType, type)  # repeated references to one such object are described as such


def described(value: Any) -> str:
    """Return a value as text, equal only for values that compute the same.

    The text of a module covers its class, the values of its parameters and buffers, its other attributes, its hooks and its
    children. It omits what no result depends on: the mode, the device, which parameters require gradients, the card, and the
    number of batches that a norm has seen. Functions and classes of libraries are described by name. Others are described by
    their code, without comments and file locations, and by what they refer to.
    """
    return _Description().of(value)


class _Description:
    def __init__(self) -> None:
        self.known: dict[int, int] = {}  # index of each object already described, by id
        self.within: list[int] = []  # ids of the objects being described

    def of(self, value: Any) -> str:
        if isinstance(value, enum.Enum):
            return f"{_name(type(value))}.{value.name}"
        if isinstance(value, _PLAIN):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, torch.device | torch.Generator):
            return type(value).__name__
        if isinstance(value, ModuleType):
            return f"module {value.__name__}"
        if id(value) in self.known:
            return f"again {self.known[id(value)]}"
        if id(value) in self.within:
            return f"around {len(self.within) - self.within.index(id(value))}"
        if isinstance(value, _SHARED):
            self.known[id(value)] = len(self.known)
        self.within.append(id(value))
        parts = self._parts(value)
        self.within.pop()
        return f"{_name(type(value))}({parts})"

    def _parts(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return _numbers(value)
        if isinstance(value, np.ndarray | np.generic):
            return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Mapping):
            return self._all(part for item in value.items() for part in item)
        if isinstance(value, set | frozenset):
            return ", ".join(sorted(map(self.of, value)))
        if isinstance(value, list | tuple):
            return self._all(value)
        if isinstance(value, CodeType):
            return self._all((value.co_code, value.co_names, value.co_varnames, value.co_freevars, value.co_consts))
        if isinstance(value, type):
            return _name(value) if all(map(is_library, value.__mro__)) else self._class(value)
        if isinstance(value, FunctionType):
            return _name(value) if is_library(value) else self._function(value)
        if isinstance(value, MethodType):
            return self._all((value.__func__, value.__self__))
        if isinstance(value, functools.partial):
            return self._all((value.func, value.args, value.keywords))
        if isinstance(value, staticmethod | classmethod):
            return self.of(value.__func__)
        if isinstance(value, property):
            return self._all((value.fget, value.fset))
        if isinstance(value, fx.Graph):
            return str(value)
        return self._object(value)

    def _all(self, values: Any) -> str:
        return ", ".join(map(self.of, values))

    def _object(self, value: Any) -> str:
        """Describe an object; a library's object only by its name, because its contents may change from call to call."""
        kind = type(value)
        is_told = is_dataclass(value) or kind.__module__.startswith("torch.nn.utils") or not is_library(kind)
        if isinstance(value, BuiltinFunctionType) or not hasattr(value, "__dict__") or not is_told:
            return _name(value)
        return self._all((kind, vars(value)))

    def _module(self, module: nn.Module) -> str:
        tensors = {**module._parameters, **{k: v for k, v in module._buffers.items() if k != _COUNTER}}
        attributes = {name: value for name, value in sorted(vars(module).items()) if name not in _OWN}
        hooks = [[*vars(module)[name].values()] for name in _HOOKS]
        return self._all((type(module), tensors, attributes, hooks, dict(module._modules)))

    def _class(self, kind: type) -> str:
        """Describe what a user's class defines, and its bases in resolution order."""
        bases = [base for base in kind.__mro__[1:] if base is not object]
        own = {name: value for name, value in vars(kind).items() if not name.startswith("__") or name in _CALLED}
        return self._all((_name(kind), own, bases))

    def _function(self, function: FunctionType) -> str:
        """Describe a function's code, its defaults, and the outside names that it uses."""
        names = sorted(_names(function.__code__))
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        used = {name: function.__globals__[name] for name in names if name in function.__globals__}
        for module in [one for one in used.values() if isinstance(one, ModuleType) and not is_library(one)]:
            used |= {f"{module.__name__}.{name}": vars(module)[name] for name in names if name in vars(module)}
        return self._all((function.__code__, function.__defaults__, function.__kwdefaults__, cells, used))


def _numbers(tensor: Tensor) -> str:
    plain = tensor.dequantize() if tensor.is_quantized else tensor if tensor.layout is torch.strided else tensor.to_dense()
    values = plain.detach().cpu().resolve_conj().resolve_neg().contiguous()
    raw = values.reshape(-1).view(torch.uint8).numpy().data
    return f"{values.dtype} {tuple(values.shape)} {hashlib.sha256(raw).hexdigest()}"


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names, *(name for one in inner for name in _names(one))}


def _name(value: Any) -> str:
    """Return a value's dotted name, or that of its class if it has none."""
    if not hasattr(value, "__name__"):
        value = type(value)
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"


def is_library(value: Any) -> bool:
    """Return whether a class, function or module belongs to Python, this package or a library with a known version."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or "builtins"
    top = name.partition(".")[0]
    return top != "__main__" and (top in _LIBRARIES or top in sys.stdlib_module_names)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
