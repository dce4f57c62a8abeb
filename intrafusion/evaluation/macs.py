"""Multiply-accumulates of one forward pass, counted per operator with torch's own formulas.

torch's FlopCounterMode tracks layers with global hooks, which passes in other threads would run too. Here the hooks are on a
copy.
"""

import copy
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    _FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_flop_count,
)

from intrafusion.models.fx.sharing import twin
from intrafusion.models.precision import inputs_for
from intrafusion.runtime.devices import device_of

_aten = torch.ops.aten
# words in the names of torch's operators that multiply; such operators without a formula are reported to the user
_MULTIPLY = ("rnn", "lstm", "trilinear", "mv", "addmv", "addr", "dot", "vdot", "inner", "cdist", "fft", "attention",
             "encoder_layer", "linear", "conv", "convolution", "mm", "addmm", "matmul")  # fmt: skip
_ONLY_POINTWISE = ("_thnn_fused_lstm_cell", "_cudnn_rnn_flatten_weight", "_compute_linear_combination")
_fast_path = threading.Lock()


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch has a formula for attention on CUDA, but not for the operator that computes it on a CPU
if (_on_cpu := getattr(_aten, "_scaled_dot_product_flash_attention_for_cpu", None)) not in {None, *flop_registry}:
    register_flop_formula(_on_cpu)(_attention)


class Macs(FlopCounterMode):
    """Counter of a network's operations. layers: multiply-accumulates by the name of the innermost module that ran them.

    left_out: operators that may multiply and have no formula in torch, with the class of the module that ran them.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(display=False)
        self.network, self.running = network, _Running(network)
        self.mod_tracker = self.running  # type: ignore[assignment]
        self.left_out: dict[str, None] = {}

    @property
    def layers(self) -> dict[str, int]:
        return {name: sum(found.values()) // 2 for name, found in self.flop_counts.items()}

    def __enter__(self) -> "Macs":
        self.flop_counts.clear()
        self.mode = _Mode(self)
        self.mode.__enter__()
        return self

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if func_packet not in self.flop_registry and _multiplies(str(func_packet)):
            self.left_out[f"{str(func_packet).removeprefix('aten.')} in {self.running.kind}"] = None
        return super()._count_flops(func_packet, out, args, kwargs)


class _Mode(_FlopCounterMode):
    """torch's mode without the wrapper that imports torch's compiler, for two seconds, to tell it not to compile this."""

    __torch_dispatch__ = inspect.unwrap(_FlopCounterMode.__torch_dispatch__)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def _multiplies(operator: str) -> bool:
    """Return whether an operator may multiply, such as "aten.mkldnn_rnn_layer" or the non-torch "torchvision.deform_conv2d"."""
    space, _, name = operator.partition(".")
    if space != "aten":
        return space not in ("prim", "prims")
    return name not in _ONLY_POINTWISE and any(f"_{word}_" in f"_{name}_" for word in _MULTIPLY)


class _Running:
    """Tracks which modules of a network run, so that the innermost is charged; replaces torch's tracker."""

    def __init__(self, network: nn.Module) -> None:
        self.inside: list[tuple[str, str]] = [("", type(network).__name__)]
        for name, module in network.named_modules():
            place = name, type(module).__name__
            module.register_forward_pre_hook(lambda *_, place=place: self.inside.append(place))
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _leave(self) -> None:
        self.inside.pop()

    @property
    def parents(self) -> set[str]:
        return {self.inside[-1][0]}

    @property
    def kind(self) -> str:
        return self.inside[-1][1]

    def __enter__(self) -> "_Running":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def count_macs(model: nn.Module, example: Tensor) -> Macs:
    """Count one pass of the first image of `example`, in eval mode, on a copy that shares the parameters."""
    counter = Macs(_copy(model))
    with torch.no_grad(), _whole_attention(), counter:
        counter.network(inputs_for(counter.network, example[:1].to(device_of(model))))
    return counter


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()}).eval()
    except Exception:  # it has weights that must be materialised first
        return twin(model)


@contextmanager
def _whole_attention() -> Iterator[None]:
    """Within this block, disable the fast path of torch's attention layers: a single operator without a formula."""
    with _fast_path:
        was = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(was)
