"""Multiply-accumulates by hand, by torch's own counter and as published, whatever computes them."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from intrafusion.cli.main import main
from intrafusion.evaluation.accuracy import Size, layer_sizes, size

IMAGE = torch.zeros(1, 3, 8, 8)


class Tokens(nn.Module):
    """16 patches of 2 x 2, something that works on tokens of width 6, their mean, a linear head."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.patches, self.body, self.head = nn.Conv2d(3, 6, 2, 2), body, nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


PATCHES, HEAD = 16 * 6 * 12, 6 * 5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Functions(nn.Module):
    """A product with a parameter, one of matrices, one in Einstein's notation, a convolution with another layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(6, 7))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x @ self.matrix, self.matrix)
        return torch.einsum("btc,bsc->bts", x, y) @ y


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.recurrent = kind(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0]


class Across(nn.Module):
    """Over the channels of images or of sequences, then their means."""

    def __init__(self, *layers: nn.Module, flat: bool = False):
        super().__init__()
        self.body, self.flat = nn.Sequential(*layers), flat

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(2) if self.flat else x).flatten(2).mean(2)


# outputs times what each of them adds up; of transposed convolutions inputs times what each of them spreads
COUNTED = {
    "attention": (lambda: Tokens(Attention()), PATCHES + 4 * 16 * 36 + 2 * 16 * 16 * 6 + HEAD),
    "encoder layer": (
        lambda: Tokens(nn.TransformerEncoderLayer(6, 2, 10, batch_first=True)),
        PATCHES + 4 * 16 * 36 + 2 * 16 * 16 * 6 + 2 * 16 * 60 + HEAD,
    ),
    "functions": (lambda: Tokens(Functions()), PATCHES + 2 * 16 * 42 + 16 * 16 * 6 * 2 + HEAD),
    "conv1d": (lambda: Across(nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(4, 5, 1), flat=True), 64 * (36 + 20)),
    "conv3d": (lambda: Across(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 5, 3, padding=1)), 3 * 64 * 5 * 27),
    "transposed": (lambda: Across(nn.ConvTranspose2d(3, 4, 2, 2), nn.Conv2d(4, 5, 1)), 64 * 48 + 256 * 20),
    "grouped, dilated": (lambda: Across(nn.Conv2d(3, 6, 3, groups=3, dilation=2)), 16 * 6 * 9),
    "gru": (lambda: Tokens(Recurrent(nn.GRU)), PATCHES + 16 * 2 * 3 * 36 + HEAD),
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_whatever_multiplies_is_counted(name, kind):
    make, expected = COUNTED[name]
    model = make().to(kind)
    found = size(model, IMAGE)
    assert (found.macs, found.left_out, found.note) == (expected, (), "")
    assert sum(layer.macs for layer in layer_sizes(model, IMAGE).values()) == expected


@pytest.mark.parametrize("name", COUNTED)
def test_torch_counts_the_same(name):
    model = COUNTED[name][0]().eval()
    with FlopCounterMode(display=False) as counter:  # with gradients, attention takes no fast path
        model(IMAGE)
    assert size(model, IMAGE).macs == counter.get_total_flops() // 2


def test_every_small_network_counts_what_torch_does(network):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.model(network.example)
    assert size(network.model, network.example).macs == counter.get_total_flops() // 2


@pytest.mark.parametrize(("name", "published"), [
    ("vit_b_16", 17.564), ("swin_t", 4.491), ("convnext_tiny", 4.456), ("mobilenet_v2", 0.301), ("resnext50_32x4d", 4.23),
])  # fmt: skip
def test_published_numbers(name, published):
    from torchvision import models  # their cards say them, in 10⁹

    with torch.device("meta"):
        model = getattr(models, name)()
        assert size(model, torch.zeros(1, 3, 224, 224)).macs / 1e9 == pytest.approx(published, abs=0.001)


def test_what_has_no_formula_is_named():
    found = size(Tokens(Recurrent(nn.LSTM)), IMAGE)
    assert found == Size(78 + 4 * 6 * (6 + 6 + 2) + 35, PATCHES + HEAD, ("mkldnn_rnn_layer in LSTM",))
    assert found.note == "MACs leave out mkldnn_rnn_layer in LSTM"


def test_an_operator_that_is_not_torch_s_is_named():
    @torch.library.custom_op("intrafusion_tests::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    assert size(Tokens(Twice()), IMAGE).left_out == ("intrafusion_tests.twice in Twice",)


def test_layers_are_charged_with_what_they_hold():
    layers = layer_sizes(Tokens(Attention()), IMAGE)
    assert {name: layer.macs for name, layer in layers.items()} == {
        "patches": PATCHES, "body.attention": 4 * 16 * 36 + 2 * 16 * 16 * 6, "head": HEAD,
    }  # fmt: skip
    assert {name: layer.macs for name, layer in layer_sizes(Tokens(Functions()), IMAGE).items()} == {
        "patches": PATCHES, "body": 2 * 16 * 42 + 16 * 16 * 6 * 2, "head": HEAD,
    }  # fmt: skip


class Counting(nn.Module):
    """A norm in training mode, a dropout, and a buffer that every pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.drop(self.norm(self.conv(x))).mean((2, 3))


def test_the_network_is_not_touched():
    model = Counting().train()
    model.norm.eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    learns = [p.requires_grad for p in model.parameters()]
    for measure in (size, layer_sizes):
        measure(model, torch.randn(4, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == learns
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fast_path_of_attention_is_as_before(enabled):
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        size(Tokens(Attention()), IMAGE)
        with pytest.raises(RuntimeError):
            size(Tokens(Attention()), torch.zeros(1, 4, 8, 8))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def test_threads_count_each_their_own():
    models, found = [Tokens(Attention()), Across(nn.Conv2d(3, 5, 3))] * 4, {}
    threads = [threading.Thread(target=lambda i=i, m=m: found.update({i: size(m, IMAGE).macs})) for i, m in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(8)] == [COUNTED["attention"][1], 36 * 5 * 27] * 4


def test_computed_weights_are_layers_as_others():
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4))
    normed = copy.deepcopy(plain)
    normed[0] = nn.utils.parametrizations.weight_norm(normed[0])
    assert layer_sizes(normed, IMAGE) == layer_sizes(plain, IMAGE)
    assert size(normed, IMAGE).params == size(plain, IMAGE).params + 5


def test_groups_and_prune_say_what_is_left_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "read_in_rows.py").write_text(ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["groups", "--model", "read_in_rows:make"]) == 0
    assert capsys.readouterr().err.splitlines() == ["MACs leave out mkldnn_rnn_layer in LSTM"]
    assert main(["prune", "--model", "read_in_rows:make", "--out", "made", "--formats", "safetensors"]) == 0
    assert capsys.readouterr().out.count("MACs, not counting mkldnn_rnn_layer in LSTM") == 1
    assert (tmp_path / "made/report.md").read_text().count("not counting mkldnn_rnn_layer in LSTM") == 1


ROWS = """
import torch
from torch import nn
CARD = {"mean": [0.5], "std": [0.3], "input_size": [1, 8, 8], "classes": 10, "dataset": "digits"}

class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.recurrent, self.head = nn.LSTM(32, 6, batch_first=True), nn.Linear(6, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(self.recurrent(x.transpose(1, 2).flatten(2))[0][:, -1])

def make():
    torch.manual_seed(0)
    return Rows()
"""
