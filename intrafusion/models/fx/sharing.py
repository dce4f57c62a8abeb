"""Copies of a network in the plain form that the rest of this package works on.

A copy is in eval mode. Weights that are computed at each pass (weight_norm, spectral_norm, pruning masks) become parameters,
and torch.compile wrappers are removed. Copies may share unchanged layers, because a study creates hundreds of copies.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import prune as masks
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from intrafusion.errors import IntrafusionError, one_line
from intrafusion.runtime.devices import CPU, device_of


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers without children, by dotted name."""
    return {name: layer for name, layer in model.named_modules() if not any(True for _ in layer.children())}


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return `copy.deepcopy(model, memo)` in two thirds of the time, without its detour for the dozen empty hook dictionaries
    of each module.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        if id(module) not in memo:
            for value in vars(module).values():
                if type(value) in (dict, OrderedDict) and not value and id(value) not in memo:
                    memo[id(value)] = type(value)()
    return copy.deepcopy(model, memo)


def twin(model: nn.Module, shared: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """Copy `model` into plain form, with the layers of `shared` in place of its own. All other layers are copied.

    shared: layers in plain form, each by one of its names in `model`. The model itself is not modified. Raises
    IntrafusionError, with a one-line message, if the network cannot be copied or its weights cannot be turned into parameters.
    """
    memo: dict[int, Any] = {id(model.get_submodule(name)): layer for name, layer in (shared or {}).items()}
    kept = {id(layer) for layer in memo.values()}
    _refuse_scripts(model)
    _add_computed(model, memo)
    try:
        made = _unwrapped(copied(model, memo))
        own = [layer for layer in made.modules() if id(layer) not in kept]
        for layer in own:
            layer.training = False
        for layer in own:
            _write_out(layer)
    except Exception as error:  # a user's module can fail in any way
        raise IntrafusionError(f"cannot copy the network: {type(error).__name__}: {one_line(error)}") from error
    for name, layer in made.named_modules():
        if isinstance(layer, _ConvNd | nn.Linear) and layer._parameters.get("weight") is None:
            raise IntrafusionError(
                f"the weight of {name} is computed in each forward pass in an unsupported way; make it a parameter"
            )
    return made


def on_cpu(model: nn.Module) -> nn.Module:
    """Return the model itself if it is on the CPU, otherwise a copy of it there, made by `twin`."""
    return model if device_of(model) == CPU else twin(model).to(CPU)


def placed(small: nn.Module, weights: nn.Module, model: nn.Module) -> nn.Module:
    """Move a network from the CPU to the device of `model`, in one transfer; `small` is used up.

    weights: the copy of `model` on the CPU from which `small` was made. Layers that `small` shares with it become layers of
    `model`.
    """
    dense, theirs = leaves(model), leaves(weights)
    shared = {name: dense[name] for name, layer in leaves(small).items() if theirs.get(name) is layer}
    moved = replaced(small, shared)
    tensors = {id(t): t for t in (*moved.parameters(), *moved.buffers()) if t.device == CPU}
    _send(list(tensors.values()), device_of(model))
    return moved


def _send(tensors: list[Tensor], device: torch.device) -> None:
    """Move tensors to a device in place, with one copy for each dtype, for which CUDA does not make this process wait."""
    for kind in {tensor.dtype for tensor in tensors}:
        some = [tensor for tensor in tensors if tensor.dtype == kind]
        packed = torch.cat([tensor.detach().reshape(-1) for tensor in some])
        there = packed.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else packed.to(device)
        for tensor, part in zip(some, there.split([tensor.numel() for tensor in some]), strict=True):
            tensor.data = part.view(tensor.shape).clone()


def with_plain_weights(model: nn.Module) -> nn.Module:
    """Return the model itself if its weights are already parameters, as in a result of `twin`.

    Otherwise return a copy made by `twin`.
    """
    return twin(model) if any(map(_is_computed, model.modules())) else model


def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return `model` with these layers replaced under all their names. Their parents are copied; other layers are shared."""
    memo: dict[int, Any] = {id(layer): layer for layer in leaves(model).values()}
    memo |= {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    return copied(model, memo)


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Replace layers of a network in place, under all the names that the old layers have."""
    others = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    for holder in list(model.modules()):
        for name, child in holder._modules.items():
            if id(child) in others:
                holder._modules[name] = others[id(child)]


def set_modes(model: nn.Module, like: nn.Module) -> None:
    """Set each layer of `model` to the mode, train or eval, of the layer with the same name in `like`."""
    for name, layer in like.named_modules(remove_duplicate=False):
        try:
            model.get_submodule(name).training = layer.training
        except AttributeError:  # the name belongs to a removed wrapper
            continue


def check_call(model: object, example: object) -> None:
    """Raise IntrafusionError unless `model` is a network and `example` is one input tensor.

    The input is float (1, C, H, W), or of another shape with at least two dimensions.
    """
    if not isinstance(model, nn.Module):
        raise IntrafusionError(f"model must be an nn.Module, not {_of(model)}")
    if not isinstance(example, Tensor) or example.ndim < 2:
        raise IntrafusionError(f"example must be an input tensor such as torch.zeros(1, 3, 32, 32), not {_of(example)}")


def _of(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def check_finite(layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise IntrafusionError, naming the layer, for NaN or infinite weights and statistics."""
    for name, layer in layers:
        for part, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if tensor.is_floating_point() and not _all_finite(tensor):
                raise IntrafusionError(
                    f"{part} of {name or 'the network'} has NaN or infinite values; the file is damaged, or training diverged"
                )


def _all_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinite; a finite sum shows that without looking at each."""
    return math.isfinite(float(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


def differing(dense: nn.Module, other: nn.Module) -> set[str]:
    """Return the dotted names of layers that differ, in shape or in any number, between networks of one architecture."""
    theirs = dict(other.named_modules())
    return {name for name, layer in dense.named_modules() if not _same(layer, theirs.get(name))}


def _same(layer: nn.Module, other: nn.Module | None) -> bool:
    """Return whether two layers are equal, apart from their children."""
    if other is layer:
        return True
    if type(other) is not type(layer) or layer.extra_repr() != other.extra_repr():
        return False
    ours, theirs = ([*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)] for m in (layer, other))
    return len(ours) == len(theirs) and all(
        a == b and torch.equal(first, second) for (a, first), (b, second) in zip(ours, theirs, strict=True)
    )


def _refuse_scripts(model: nn.Module) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise IntrafusionError("a TorchScript network cannot be pruned; pass the nn.Module that was scripted")


def _add_computed(model: nn.Module, memo: dict[int, Any]) -> None:
    """Add to `memo` copies of the tensors that are results of a computation, because deepcopy refuses those.

    An example is a masked weight after training.
    """
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()


def _unwrapped(model: nn.Module) -> nn.Module:
    """Remove torch.compile wrappers from a network, in place."""
    for holder in list(model.modules()):
        for name, child in holder._modules.items():
            if child is not None and name != "_orig_mod":
                holder._modules[name] = _bare(child)
    return _bare(model)


def _bare(module: nn.Module) -> nn.Module:
    while isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
        module = inner
    return module


def _is_computed(layer: nn.Module) -> bool:
    """Return whether a layer is a torch.compile wrapper or computes its weights at each pass."""
    return (
        "_orig_mod" in layer._modules
        or parametrize.is_parametrized(layer)
        or any(isinstance(hook, _COMPUTING) for hook in layer._forward_pre_hooks.values())
    )


_COMPUTING = (masks.BasePruningMethod, WeightNorm, SpectralNorm)


def _write_out(layer: nn.Module) -> None:
    """Turn a layer's computed weights into parameters, in place. The layer computes the same."""
    names = list(layer._parameters)
    if parametrize.is_parametrized(layer):
        _end_parametrizations(layer)
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, masks.BasePruningMethod):
            masks.remove(layer, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(layer, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
    computed = {name: tensor for name, tensor in layer._parameters.items() if name not in names}
    if computed:  # the weight before the bias, as in other layers
        layer._parameters = computed | layer._parameters


def _end_parametrizations(layer: nn.Module) -> None:
    """Remove parametrizations as torch's remove_parametrizations does, but safely for copies of the layer.

    The torch function would break the copies because they share the layer's class.
    """
    steps: Any = layer.parametrizations
    with torch.no_grad():
        computed = {name: getattr(layer, name).clone() for name in steps}
    learns = {name: [p.requires_grad for p in step.parameters()] for name, step in steps.items()}
    layer.__class__ = type(layer).__bases__[0]
    del layer._modules["parametrizations"]
    for name, tensor in computed.items():
        if learns[name]:
            layer.register_parameter(name, nn.Parameter(tensor, any(learns[name])))
        else:
            layer.register_buffer(name, tensor)
