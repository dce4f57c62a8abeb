"""What tells values and networks apart, and what does not."""

import copy
import functools
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune

import intrafusion as itf
from intrafusion.runtime.canonical import described

SCALE = 2.0


def scaled(x: Tensor) -> Tensor:
    return x * SCALE


class Own(nn.Module):
    """A network of a user's own, with attributes of all kinds."""

    def __init__(self, **attributes: Any):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.layer(x))


def buffered(value: float) -> nn.Module:
    network = Own()
    network.register_buffer("shift", torch.tensor(value), persistent=False)
    return network


def normed(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options))


def attention(heads: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, heads)


def tied(shared: bool) -> nn.Module:
    torch.manual_seed(0)
    first = nn.Linear(3, 3)
    return nn.Sequential(first, first if shared else copy.deepcopy(first))


def tied_weights(shared: bool) -> nn.Module:
    network = tied(False)
    if shared:
        network[1].weight = network[0].weight
    return network


def hooked(how: Callable[..., Any] | None) -> nn.Module:
    network = Own()
    if how:
        network.layer.register_forward_hook(how)
    return network


def masked(amount: float) -> nn.Module:
    network = Own()
    prune.l1_unstructured(network.layer, "weight", amount=amount)
    network.layer.weight = network.layer.weight.detach()  # or it could not be copied
    return network


def traced(function: Callable[[Tensor], Tensor]) -> nn.Module:
    class Network(Own):
        def forward(self, x: Tensor) -> Tensor:
            return function(self.layer(x))

    return fx.symbolic_trace(Network())


def class_with(**members: Any) -> nn.Module:
    return type("Network", (Own,), members)()


def closing_over(value: float) -> Callable[..., Tensor]:
    return lambda self, x: self.layer(x) * value


DIFFERENT = {
    "a number": (Own(k=1), Own(k=2)),
    "a number of another kind": (Own(k=1), Own(k=1.0)),
    "the sign of a zero": (Own(k=0.0), Own(k=-0.0)),
    "a tuple": (Own(k=(1, 2)), Own(k=(2, 1))),
    "a list in a mapping": (Own(k={"a": [1]}), Own(k={"a": [2]})),
    "a set": (Own(k={"a", "b"}), Own(k={"a", "c"})),
    "a string": (Own(k="mean"), Own(k="sum")),
    "nothing": (Own(k=None), Own(k=0)),
    "a dtype": (Own(k=torch.float32), Own(k=torch.float64)),
    "an attribute's name": (Own(k=1), Own(j=1)),
    "a tensor that is no buffer": (Own(k=torch.ones(2)), Own(k=torch.zeros(2))),
    "a sparse tensor": (Own(k=torch.eye(2).to_sparse()), Own(k=torch.ones(2, 2).to_sparse())),
    "complex numbers": (Own(k=torch.ones(2) * 1j), Own(k=(torch.ones(2) * 1j).conj())),
    "a function of a library": (Own(k=F.relu), Own(k=F.gelu)),
    "a partial function": (Own(k=functools.partial(F.elu, alpha=1.0)), Own(k=functools.partial(F.elu, alpha=2.0))),
    "a function of one's own": (Own(k=lambda x: x + 1), Own(k=lambda x: x + 2)),
    "a class": (Own(k=nn.ReLU), Own(k=nn.GELU)),
    "a layer in a list": (Own(k=[nn.ReLU()]), Own(k=[nn.GELU()])),
    "a buffer that is not kept": (buffered(1.0), buffered(2.0)),
    "heads of an attention": (attention(2), attention(4)),
    "a norm's eps": (normed(), normed(eps=0.1)),
    "a norm's momentum": (normed(), normed(momentum=0.3)),
    "a dropout's share": (nn.Dropout(0.1), nn.Dropout(0.2)),
    "one layer twice": (tied(True), tied(False)),
    "one weight twice": (tied_weights(True), tied_weights(False)),
    "a hook": (hooked(None), hooked(lambda module, given, made: made * 2)),
    "another hook": (hooked(lambda module, given, made: made * 3), hooked(lambda module, given, made: made * 2)),
    "a mask": (masked(0.2), masked(0.5)),
    "a parametrization": (Own(), parametrizations.weight_norm(Own().layer)),
    "a graph": (traced(F.relu), traced(F.gelu)),
    "a class of the same name": (class_with(), class_with(forward=lambda self, x: self.layer(x))),
    "a class attribute": (class_with(k=1), class_with(k=2)),
    "another method": (class_with(step=lambda self: 1), class_with(step=lambda self: 2)),
    "what a forward closes over": (class_with(forward=closing_over(1.0)), class_with(forward=closing_over(2.0))),
    "numbers of another kind": (Own(), Own().double()),
    "half of the precision": (Own().half(), Own().bfloat16()),
}


@pytest.mark.parametrize(("first", "second"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_may_compute_otherwise_is_told_apart(first, second):
    assert described(first) != described(second)
    for network in (first, second):
        assert described(copy.deepcopy(network)) == described(network)


def after(change: Callable[[Any], Any]) -> nn.Module:
    network = nn.Sequential(normed(), nn.ReLU(), Own(k=(1, 1), j=[2, 2]))
    change(network)
    return network


def run(network: Any) -> None:
    network[0](torch.ones(2, 3, 8, 8))
    network.load_state_dict({k: v for k, v in after(lambda same: None).state_dict().items() if "num_batches" not in k}, False)


def with_equal_values(network: Any) -> None:
    network[2].k = tuple(int(text) for text in ("1", "1"))  # as after reading a file: not the very same object
    network[2].j = [2, 2]


SAME = {
    "training mode": after(lambda network: network.train()),
    "evaluation mode": after(lambda network: network.eval()),
    "frozen": after(lambda network: network.requires_grad_(False)),
    "a count of batches": after(run),
    "a card": after(lambda network: setattr(network, "card", itf.load_model("digits-mlp").card)),
    "the order of memory": after(lambda network: network.to(memory_format=torch.channels_last)),
    "other objects of the same value": after(with_equal_values),
    "another order of attributes": after(lambda network: network[2].__dict__.update(k=network[2].__dict__.pop("k"))),
    "a gradient": after(lambda network: setattr(network[0][0].weight, "grad", torch.ones(8, 3, 3, 3))),
}


@pytest.mark.parametrize("network", SAME.values(), ids=SAME)
def test_what_computes_the_same_is_told_alike(network):
    assert described(network) == described(after(lambda same: None))


def test_a_file_of_the_whole_network_tells_the_same():
    network, file = Own(k=(1, 1), j={"a": [F.relu]}), io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    assert described(torch.load(file, weights_only=False)) == described(network)


def test_a_global_that_a_forward_reads_counts(monkeypatch):
    before = described(Own())
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
    assert described(Own()) != before
    monkeypatch.undo()
    assert described(Own()) == before
    monkeypatch.setattr(sys.modules[__name__], "scaled", lambda x: x)
    assert described(Own()) != before


def test_objects_that_hold_each_other_end():
    network = Own(items=[])
    network.items.append(network.items)
    network.__dict__["parent"] = network
    assert described(copy.deepcopy(network)) == described(network)


NETWORK = """
import enum, torch
from torch import nn
class Kind(enum.Enum):
    A = 1
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.kinds, self.kind, self.act = nn.Identity(), {"x", "y", "z"}, Kind.A, torch.relu
        self.held = [object(), functools.partial(torch.relu)]
    def forward(self, x):
        return self.layer(x) if "x" in {"a", "b", "x"} else x
"""


def test_every_process_tells_the_same(tmp_path, monkeypatch):
    (tmp_path / "other_network.py").write_text(f"import functools{NETWORK}")
    script = "from other_network import Net; from intrafusion.runtime.canonical import described; print(described(Net()))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    assert done.stdout.strip() == described(importlib.import_module("other_network").Net())
    assert " at 0x" not in done.stdout
