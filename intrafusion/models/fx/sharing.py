"""Copies of a network, in the plain form that everything here works on.

A copy is in eval mode; weights that are computed at each pass (weight_norm, spectral_norm, pruning masks) are written out in
it, and what torch.compile wrapped is unwrapped. Copies may share the layers in which they do not differ: a study makes
hundreds of them.
"""

import copy
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


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that hold no others, by dotted name."""
    return {name: layer for name, layer in model.named_modules() if not any(True for _ in layer.children())}


def twin(model: nn.Module, shared: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """A copy of `model` in plain form, with these layers in the places of its own; all others are copied.

    shared: layers in plain form, by one of the names that `model` has for its own. The model itself is not touched.
    Raises IntrafusionError, in one line, for a network that cannot be copied or whose weights cannot be written out.
    """
    memo: dict[int, Any] = {id(model.get_submodule(name)): layer for name, layer in (shared or {}).items()}
    kept = {id(layer) for layer in memo.values()}
    _refuse_scripts(model)
    _add_computed(model, memo)
    try:
        made = _unwrapped(copy.deepcopy(model, memo))
        own = [layer for layer in made.modules() if id(layer) not in kept]
        for layer in own:
            layer.training = False
        for layer in own:
            _write_out(layer)
    except Exception as error:  # a user's module can fail in any way
        raise IntrafusionError(f"the network cannot be copied: {type(error).__name__}: {one_line(error)}") from error
    for name, layer in made.named_modules():
        if isinstance(layer, _ConvNd | nn.Linear) and layer._parameters.get("weight") is None:
            raise IntrafusionError(
                f"the weight of {name} is computed at each pass, in a way that is not known here: make it a parameter"
            )
    return made


def plain(model: nn.Module) -> nn.Module:
    """The model itself where its weights are parameters, as those that `twin` makes; else such a copy."""
    return twin(model) if any(map(_is_computed, model.modules())) else model


def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """`model` with other layers in these places, under all their names: what holds them is copied, the rest is shared."""
    memo: dict[int, Any] = {id(layer): layer for layer in leaves(model).values()}
    memo |= {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    return copy.deepcopy(model, memo)


def put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put other layers in these places of a network, in place, under all names that it has for what was there."""
    others = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    for holder in list(model.modules()):
        for name, child in holder._modules.items():
            if id(child) in others:
                holder._modules[name] = others[id(child)]


def set_modes(model: nn.Module, like: nn.Module) -> None:
    """Put each layer into the mode, train or eval, that the layer of this name has in `like`."""
    for name, layer in like.named_modules(remove_duplicate=False):
        try:
            model.get_submodule(name).training = layer.training
        except AttributeError:  # of a wrapper that is gone
            continue


def check_call(model: object, example: object) -> None:
    """Raise IntrafusionError where these are no network and one input of it, float (1, C, H, W) or another shape of one."""
    if not isinstance(model, nn.Module):
        raise IntrafusionError(f"the model must be an nn.Module with its weights in it, not {_of(model)}")
    if not isinstance(example, Tensor) or example.ndim < 2:
        raise IntrafusionError(f"example must be one input, a tensor as torch.zeros(1, 3, 32, 32), not {_of(example)}")


def _of(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def check_finite(layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise IntrafusionError, with the layer's name, for NaN or infinite weights and statistics."""
    for name, layer in layers:
        for part, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise IntrafusionError(
                    f"{name or 'the network'} holds NaN or infinite numbers in its {part}: the network diverged in training,"
                    " or its file is damaged"
                )


def differing(dense: nn.Module, other: nn.Module) -> set[str]:
    """The layers in which two networks of one architecture differ, in shape or in any number, by dotted name."""
    theirs = dict(other.named_modules())
    return {name for name, layer in dense.named_modules() if not _same(layer, theirs.get(name))}


def _same(layer: nn.Module, other: nn.Module | None) -> bool:
    """Whether two layers are alike, apart from the layers that they hold."""
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
        raise IntrafusionError("a TorchScript network cannot be pruned: pass the nn.Module that it was scripted from")


def _add_computed(model: nn.Module, memo: dict[int, Any]) -> None:
    """Give copies of the tensors that are results of a computation, as a masked weight after training: deepcopy refuses."""
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()


def _unwrapped(model: nn.Module) -> nn.Module:
    """A network without the wrappers of torch.compile, in place."""
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
    """Whether a layer is a wrapper of torch.compile, or has weights that are computed at each pass."""
    return (
        "_orig_mod" in layer._modules
        or parametrize.is_parametrized(layer)
        or any(isinstance(hook, _COMPUTING) for hook in layer._forward_pre_hooks.values())
    )


_COMPUTING = (masks.BasePruningMethod, WeightNorm, SpectralNorm)


def _write_out(layer: nn.Module) -> None:
    """Make parameters of a layer's computed weights, in place; the layer computes the same."""
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
    if computed:  # the weight before the bias, as everywhere
        layer._parameters = computed | layer._parameters


def _end_parametrizations(layer: nn.Module) -> None:
    """What torch's remove_parametrizations does; that one would break the layer's copies, which share its class."""
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
