"""The only way to create a Program: from a description and its tensors, after verifying every step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.errors import IntrafusionError
from intrafusion.models.exported_program.description import check_weight_name, in_one_message, read_description, weights_of
from intrafusion.models.exported_program.layers import layer_built, register_tensor
from intrafusion.models.exported_program.program import Plan, Program
from intrafusion.models.exported_program.shapes import DYNAMIC, Batch
from intrafusion.models.exported_program.verification import proven, shape_of

LAYERS, CLASSES = 4_000, 100_000


def tensors_of(program: Program) -> dict[str, Tensor]:
    """Return the tensors of a program that `built` needs, by their dotted names."""
    return {name: tensor for name, tensor in program.state_dict().items() if not name.endswith("num_batches_tracked")}


def built(description: Any, tensors: Mapping[str, Tensor]) -> Program:
    """Build the program of a description, in eval mode, after verifying every step for any number of images.

    Raises IntrafusionError, with a message that follows "the program", if the description is invalid, the steps do not fit each
    other or their tensors, or work or memory exceeds the limits. Nothing is computed.
    """
    with in_one_message():
        return _built(description, tensors)


def _built(description: Any, tensors: Mapping[str, Tensor]) -> Program:
    image, steps, given, answer = read_description(description)
    runs = {step.run for step in steps if isinstance(step.run, str)}
    if len(runs) > LAYERS:
        raise IntrafusionError(f"it has {len(runs):,} layers; the limit is {LAYERS:,}")
    layers = {path: layer_built(path, description["layers"][path], tensors) for path in sorted(runs) if check_weight_name(path)}
    said = description["learned"]
    learned = {path: said[path] is True for path in weights_of(steps) if check_weight_name(path)}
    own = {path: shape_of(path, tensors) for path in learned}
    logits, image_bytes = proven(steps, given, answer, image, {path: layer for path, (layer, _) in layers.items()}, own)
    classes = logits.sizes[1] if len(logits.sizes) == 2 else None
    if logits.sizes[:1] != (Batch(1),) or type(classes) is not int or logits.dtype != torch.float32:
        raise IntrafusionError(f"it returns {logits} for a batch of images, not (batch, classes); {DYNAMIC}")
    if classes > CLASSES:
        raise IntrafusionError(f"it has {classes:,} classes; the limit is {CLASSES:,}")
    program = Program(Plan(tuple(steps), given, answer, image, classes, learned, image_bytes))
    for path, (layer, _) in layers.items():
        _put_layer(program, path, layer)
    for path, learns in learned.items():
        _put_tensor(program, path, tensors[path], learns)
    return program.eval().requires_grad_(False)


def _holder(program: nn.Module, path: str) -> nn.Module:
    """Return the module of this dotted name. Create missing ones as empty modules."""
    module = program
    for part in filter(None, path.split(".")):
        if part not in module._modules:
            _check_free(module, part, path)
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    return module


def _put_layer(program: nn.Module, path: str, layer: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    inside = _holder(program, holder)
    _check_free(inside, name, path)
    inside.add_module(name, layer)


def _put_tensor(program: nn.Module, path: str, tensor: Tensor, learns: bool) -> None:
    holder, _, name = path.rpartition(".")
    inside = _holder(program, holder)
    if name in inside._parameters or name in inside._buffers:  # it belongs to a layer, and another call uses it differently
        return
    _check_free(inside, name, path)
    register_tensor(inside, name, tensor, learns and tensor.is_floating_point())


def _check_free(module: nn.Module, name: str, path: str) -> None:
    if hasattr(module, name):
        raise IntrafusionError(f"it has weights named {path}, a name that modules already use")
