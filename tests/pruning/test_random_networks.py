"""Properties of every network: random small ones, of the parts that people's networks are made of."""

import copy
import os

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import intrafusion as itf
from intrafusion._registry import RECOVERIES
from intrafusion.data.datasets import ImageData
from intrafusion.models.card import ModelCard
from intrafusion.pruning.groups.surgery import shrink
from intrafusion.pruning.merge import MERGES
from intrafusion.pruning.pruner import cut
from intrafusion.training.recovery import RecoveryOptions, recover

EXAMPLES = int(os.environ.get("INTRAFUSION_EXAMPLES", "12"))
several = settings(
    max_examples=EXAMPLES, deadline=None, derandomize="INTRAFUSION_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

WIDTHS = st.sampled_from([2, 3, 4, 6, 8])
NORMS = {
    "none": lambda n, d: nn.Identity(),
    "batch": lambda n, d: (nn.BatchNorm1d, nn.BatchNorm2d)[d - 1](n),
    "plain": lambda n, d: (nn.BatchNorm1d, nn.BatchNorm2d)[d - 1](n, affine=False, eps=0.1),
    "batches' own": lambda n, d: (nn.BatchNorm1d, nn.BatchNorm2d)[d - 1](n, track_running_stats=False),
    "instance": lambda n, d: (nn.InstanceNorm1d, nn.InstanceNorm2d)[d - 1](n, affine=True),
    "group": lambda n, d: nn.GroupNorm(1, n),
    "response": lambda n, d: nn.LocalResponseNorm(3, alpha=1e-3),
}
ACTS = {
    "relu": lambda n: nn.ReLU(inplace=True),
    "silu": lambda n: nn.SiLU(),
    "tanh": lambda n: nn.Tanh(),
    "slope": lambda n: nn.PReLU(),
    "slopes": lambda n: nn.PReLU(n),
    "none": lambda n: nn.Identity(),
}
# norms that fold are what most networks have
norm = st.sampled_from(["batch"] * 6 + list(NORMS))
act = st.sampled_from(["relu"] * 4 + list(ACTS))
layer = st.tuples(st.just("layer"), WIDTHS, st.sampled_from([1, 3]), st.booleans(), norm, act)
single = st.one_of(
    layer, layer,
    st.tuples(st.just("depthwise"), norm, act),
    st.tuples(st.just("grouped"), st.sampled_from([2, 4]), norm, act),
    st.tuples(st.just("transposed"), WIDTHS, st.booleans(), norm, act),
    st.tuples(st.just("pre"), norm, act, WIDTHS),
    st.tuples(st.just("twice"), norm, act),
    st.tuples(st.just("tied"), norm, act),
    st.tuples(st.just("read"), WIDTHS, st.sampled_from(["detach", "compare"])),
    st.tuples(st.just("gate"), WIDTHS),
    st.just(("pool",)), st.just(("dropout",)), st.just(("half",)),
)  # fmt: skip
block = st.one_of(
    single, single, single,
    st.tuples(st.just("sum"), st.lists(layer, max_size=2), norm),
    st.tuples(st.just("beside"), layer, layer),
)  # fmt: skip
networks = st.tuples(
    st.sampled_from([2, 2, 2, 1]), st.lists(block, min_size=1, max_size=5), st.sampled_from(["mean", "flat", "flat norm"]),
    st.booleans(),
)  # fmt: skip


class Block(nn.Module):
    """One part of a random network, of `width` channels in, `self.width` out."""

    def __init__(self, kind, width, d, *choices):
        super().__init__()
        self.kind, self.d, self.width = kind, d, width
        getattr(self, f"make_{kind}")(width, *choices)

    def conv(self, n_in, n_out, kernel=3, **options):
        make = (nn.Conv1d, nn.Conv2d)[self.d - 1]
        return make(n_in, n_out, kernel, padding=kernel // 2, **options)

    def make_layer(self, n, width, kernel, bias, norm, act):
        self.a, self.norm, self.act, self.width = (
            self.conv(n, width, kernel, bias=bias), NORMS[norm](width, self.d), ACTS[act](width), width,
        )  # fmt: skip

    def make_depthwise(self, n, norm, act):
        self.a, self.norm, self.act = self.conv(n, n, groups=n), NORMS[norm](n, self.d), ACTS[act](n)

    def make_grouped(self, n, groups, norm, act):
        self.make_depthwise(n, norm, act)
        self.a = self.conv(n, n, groups=groups if n % groups == 0 else 1)

    def make_transposed(self, n, width, grouped, norm, act):
        make = (nn.ConvTranspose1d, nn.ConvTranspose2d)[self.d - 1]
        groups = 2 if grouped and n % 2 == width % 2 == 0 else 1
        self.a, self.norm, self.act, self.width = (
            make(n, width, 3, padding=1, groups=groups), NORMS[norm](width, self.d), ACTS[act](width), width,
        )  # fmt: skip

    def make_pre(self, n, norm, act, width):
        self.norm, self.act, self.b, self.width = NORMS[norm](n, self.d), ACTS[act](n), self.conv(n, width), width

    make_twice = make_depthwise

    def make_tied(self, n, norm, act):
        self.make_depthwise(n, norm, act)
        self.a, self.b = self.conv(n, n), self.conv(n, n)
        self.b.weight = self.a.weight

    def make_read(self, n, width, how):
        self.a, self.norm, self.width, self.how = self.conv(n, width), NORMS["batch"](width, self.d), width, how

    def make_gate(self, n, width):
        self.down, self.up = nn.Linear(n, width), nn.Linear(width, n)

    def make_pool(self, n):
        pass

    make_dropout = make_half = make_pool

    def make_sum(self, n, inner, norm):
        blocks = [Block("layer", n if i == 0 else inner[i - 1][1], self.d, *one[1:]) for i, one in enumerate(inner)]
        last = self.conv(inner[-1][1] if inner else n, n)
        self.inner, self.norm = nn.Sequential(*blocks, last), NORMS[norm](n, self.d)

    def make_beside(self, n, one, other):
        self.one, self.other = Block("layer", n, self.d, *one[1:]), Block("layer", n, self.d, *other[1:])
        self.width = self.one.width + self.other.width

    def forward(self, x):
        if self.kind == "pool":
            return (F.avg_pool1d, F.avg_pool2d)[self.d - 1](x, 3, 1, 1)
        if self.kind == "dropout":
            return F.dropout(x, 0.5, self.training)
        if self.kind == "half":
            return x * torch.tensor(0.5) + 0.1
        if self.kind == "gate":
            gate = self.up(F.relu(self.down(x.flatten(2).mean(2)))).sigmoid()
            return x * gate.view(*gate.shape, *[1] * self.d)
        if self.kind == "sum":
            return F.relu(x + self.norm(self.inner(x)))
        if self.kind == "beside":
            return torch.cat([self.one(x), self.other(x)], 1)
        if self.kind == "pre":
            return self.b(self.act(self.norm(x)))
        if self.kind == "read":
            y = self.a(x)
            return self.norm(y) * (y.detach().sigmoid() if self.how == "detach" else (y > 0).to(y.dtype) + 0.5)
        x = self.act(self.norm(self.a(x)))
        if self.kind == "twice":
            x = self.a(x)
        return self.b(x) if self.kind == "tied" else x


class Net(nn.Module):
    def __init__(self, d, blocks, end, two_names):
        super().__init__()
        self.d, parts, width = d, [], 3
        for kind, *choices in blocks:
            parts.append(Block(kind, width, d, *choices))
            width = parts[-1].width
        if two_names:
            self.known_as = nn.ModuleDict({"first": parts[0]})
        self.body, self.end = nn.Sequential(*parts), end
        wide = width if end == "mean" else width * 6**d
        self.hidden, self.norm = nn.Linear(wide, 6), nn.BatchNorm1d(6) if end == "flat norm" else nn.Identity()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.body(x if self.d == 2 else x.mean(2)).flatten(2)
        x = x.mean(2) if self.end == "mean" else x.flatten(1)
        return self.head(F.relu(self.norm(self.hidden(x))))


def built(recipe):
    """A network of this recipe with live numbers in it; skipped where torch itself cannot run it."""
    torch.manual_seed(0)
    model = Net(*recipe).eval()
    for module in model.modules():
        for name in ("running_mean", "running_var"):
            if getattr(module, name, None) is not None:
                nn.init.uniform_(getattr(module, name), 0.5, 2)
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    model.card = ModelCard("random", (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), (3, 6, 6), 4, "digits")
    try:
        model(torch.zeros(2, 3, 6, 6))
    except (RuntimeError, ValueError):
        assume(False)
    return model


def images(count=24):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 3, 6, 6), dtype=torch.uint8, generator=generator)
    return ImageData("digits", "train", pixels, torch.arange(count) % 4, tuple("abcd"))


INPUT = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(2))


def close(model, other, tolerance):
    """Whether two networks give the same logits, in float64, to so much of the largest."""
    with torch.no_grad():
        found, expected = (copy.deepcopy(one).eval().double()(INPUT.double()) for one in (model, other))
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@given(networks)
@several
def test_folding_and_pruning_by_nothing_keep_the_logits(recipe):
    model = built(recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(recipe[0] == 2)
    assert close(itf.fold(model, INPUT[:1]), model, 1e-4)
    assert close(itf.prune(model, INPUT[:1], 0.0), model, 1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@given(networks)
@several
def test_accepted_groups_can_be_pruned_alone_and_together(recipe):
    model = built(recipe)
    found = itf.find_groups(model, INPUT[:1])
    usable = [group for group in found if group.reason is None]
    for some in [*([group] for group in usable), usable]:
        small, zeroed = itf.fold(model, INPUT[:1]), itf.fold(model, INPUT[:1])
        kept = {}
        for group in some:
            plan = itf.plan(model, group, itf.score(model, group, "random", seed=3), 0.4)
            for network in (small, zeroed):
                MERGES["drop"](network, group, plan)
            kept[group] = plan.kept
        shrink(small, kept)
        assert close(small, zeroed, 1e-4)


@given(networks, st.sampled_from(sorted(MERGES)), st.sampled_from(sorted(RECOVERIES)))
@several
def test_every_merge_and_recovery_runs_or_refuses_in_one_line(recipe, merge, recovery):
    model, data = built(recipe), images()
    found = itf.find_groups(model, INPUT[:1])
    if all(group.reason for group in found):
        return
    try:
        pruned = cut(model, found, 0.4, merge=merge, data=data)
        recover(pruned, recovery, data, RecoveryOptions(epochs=0.5, rate=0.01))
    except itf.IntrafusionError:  # one line, by its class
        return
    with torch.no_grad():
        assert torch.isfinite(pruned.small(INPUT)).all()
