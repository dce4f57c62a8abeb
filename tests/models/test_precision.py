import copy
import math

import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.evaluation.accuracy import stratified
from intrafusion.evaluation.incremental import Meter
from intrafusion.models.fx.sharing import differing
from intrafusion.models.precision import check_accuracy, check_bf16, has_bf16, low
from intrafusion.pruning.pruner import prune_groups
from intrafusion.studies.measurement import run_spec
from intrafusion.studies.session import Session, open_session
from intrafusion.studies.sweeps import grid, sweep

CPU = torch.device("cpu")
BASE = itf.PruneSpec(model="digits-resnet", limit=None)
needs_bf16 = pytest.mark.skipif(not has_bf16(CPU), reason="this CPU has no bf16 instructions")


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(BASE)


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bf16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False}, raising=False)


class TestHardware:
    @pytest.mark.parametrize(
        ("capabilities", "able"),
        [({}, False), ({"avx2": True}, False), ({"avx512_bf16": False, "amx_bf16": False}, False),
         ({"avx512_bf16": True}, True), ({"avx512_bf16": False, "amx_bf16": True}, True), ({"bf16": True}, True)],
        ids=str,
    )  # fmt: skip
    def test_is_asked_for_its_instructions(self, monkeypatch, capabilities, able):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        assert has_bf16(CPU) is able

    def test_an_older_torch_that_cannot_say_has_none(self, monkeypatch):
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        assert not has_bf16(CPU)

    def test_a_device_of_another_kind_has_none(self):
        assert not has_bf16(torch.device("meta"))

    @pytest.mark.usefixtures("lacking")
    def test_fast_is_refused_in_one_line_where_it_would_be_slow(self, session):
        for refused in (
            lambda: check_bf16(CPU),
            lambda: Meter(session.folded, session.images(), "fast"),
            lambda: run_spec(BASE.but(precision="fast"), session),
            lambda: next(sweep([BASE, BASE.but(precision="fast")], session)),
        ):
            with pytest.raises(
                itf.IntrafusionError, match="bf16 instructions, which cpu does not have; choose precision exact"
            ) as caught:
                refused()
            assert "\n" not in str(caught.value)

    @pytest.mark.usefixtures("lacking")
    def test_the_command_line_says_so(self, capsys):
        for command in ("curve", "sweep"):
            assert main([command, "--model", "digits-mlp", "--precision", "fast"]) == 2
            assert capsys.readouterr().err.splitlines() == [
                "error: precision fast needs bf16 instructions, which cpu does not have; choose precision exact"
            ]

    @pytest.mark.usefixtures("lacking")
    def test_exact_needs_none(self, session):
        result = run_spec(BASE, session)
        assert result.dense_accuracy == itf.evaluate(session.model, session.images(), limit=None).accuracy

    @pytest.mark.parametrize("precision", ["fp16", "", "EXACT"])
    def test_another_precision_is_one_line(self, session, precision):
        with pytest.raises(itf.IntrafusionError, match="choose one of exact, fast"):
            next(sweep([BASE, BASE.but(precision=precision)], session))


class TestAccuracy:
    @pytest.mark.parametrize(("exact", "fast"), [(0.9, 0.9), (0.9, 0.8981), (0.9, 0.9019), (0, 0)])
    def test_a_fifth_of_a_point_is_nothing(self, exact, fast):
        check_accuracy(exact, fast)

    @pytest.mark.parametrize(("exact", "fast"), [(0.9, 0.8975), (0.9, 0.9025), (1, 0)])
    def test_more_is_refused_in_one_line(self, exact, fast):
        with pytest.raises(itf.IntrafusionError, match=f"from {exact:.2%} to {fast:.2%}.*0.2 point") as caught:
            check_accuracy(exact, fast)
        assert "\n" not in str(caught.value)

    def test_a_network_that_bf16_spoils_is_refused(self, monkeypatch):
        """All its logits are large and nearly alike: bf16 keeps 8 bits, and they tell nothing."""
        monkeypatch.setattr("intrafusion.evaluation.incremental.check_bf16", lambda device: None)
        model, data = itf.load_model("digits-mlp"), itf.load_data("digits")
        model[-1].weight.data *= 1e-3
        model[-1].bias.data = model[-1].bias.data * 1e-3 + 100
        with pytest.raises(itf.IntrafusionError, match="bf16 changes the dense accuracy") as caught:
            Meter(model, data, "fast")
        assert "\n" not in str(caught.value)
        exact = Meter(model, data, "exact").dense(len(data)).float().mean()
        assert exact == pytest.approx(itf.evaluate(model, data, limit=None).accuracy)  # which fp32 does


class TestLow:
    def test_a_copy_in_bf16(self, session):
        before = copy.deepcopy(session.folded.state_dict())
        cheap = low(session.folded)
        assert {p.dtype for p in cheap.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in session.folded.parameters()} == {torch.float32}
        assert all(torch.equal(tensor, before[name]) for name, tensor in session.folded.state_dict().items())
        for name, tensor in cheap.state_dict().items():
            assert torch.equal(tensor, before[name].bfloat16())

    def test_layers_that_do_not_differ_are_those_of_another_copy(self, session):
        small = prune_groups(session.folded, session.groups, 0.5, groups=("layer2.0.conv1",))
        changed = differing(session.folded, small)
        dense = low(session.folded)
        cheap = low(small, dense, changed)
        assert {n for n, m in cheap.named_modules() if isinstance(m, nn.Conv2d) and m is not dense.get_submodule(n)} == {
            name for name in changed if isinstance(small.get_submodule(name), nn.Conv2d)
        }
        for name, tensor in cheap.state_dict().items():
            assert torch.equal(tensor, small.state_dict()[name].bfloat16())
        assert {p.dtype for p in small.parameters()} == {torch.float32}


@needs_bf16
class TestFast:
    def test_runs_in_bf16_and_is_nearly_exact(self, session):
        specs = grid(BASE, groups=[("layer1.0.conv1",), ("layer3.1.conv1",)], sparsity=[0.2, 0.5])
        exact = {result.spec: result for result in sweep(specs, session)}
        fast = {
            result.spec.but(precision="exact"): result for result in sweep([s.but(precision="fast") for s in specs], session)
        }
        for spec in specs:
            assert fast[spec].complete
            assert fast[spec].accuracy == pytest.approx(exact[spec].accuracy, abs=0.01)
            assert fast[spec].dense_accuracy == pytest.approx(exact[spec].dense_accuracy, abs=0.002)
            assert (fast[spec].params, fast[spec].macs) == (exact[spec].params, exact[spec].macs)

    def test_its_numbers_are_bf16s(self, session):
        """Answers are those of the network whose weights and images are bf16, to the few where it rounds on the way."""
        small = prune_groups(session.folded, session.groups, 0.5, merge="drop", groups=("layer2.0.conv1",))
        data, seen = session.images(), []
        hook = session.folded.linear.register_forward_hook(lambda _, given, out: seen.append((given[0].dtype, out.dtype)))
        meter = Meter(session.folded, data, "fast")  # whose copy of the layer has the hook, too
        hook.remove()
        seen.clear()
        found = meter.correct(small, differing(session.folded, small), 0, len(data))
        assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
        exact = itf.evaluate(small, data, limit=None).correct[stratified(data.labels)]
        assert (found != exact).sum() <= 6  # of 597


@pytest.mark.reference
class TestExact:
    """By way of bf16 or not, the answers are those of plain fp32."""

    def test_on_cifar10(self, reference, monkeypatch):
        monkeypatch.setattr("intrafusion.evaluation.incremental.has_bf16", lambda device: True)
        monkeypatch.setattr("intrafusion.evaluation.incremental._PAYS", math.inf, raising=False)
        base = itf.PruneSpec(
            "cifar10-resnet20", "cifar10", str(reference("weights/cifar10_resnet20.th")),
            str(reference("data/cifar10_test.npz")), limit=2000, merge="drop",
        )  # fmt: skip
        session = open_session(base, limit=base.limit)
        data, meter = session.images().subset(base.limit), session.meter(base)
        order, wrong, count = stratified(data.labels), 0, 0
        for name, sparsity in (("layer3.1.conv1", 0.1), ("layer3.0.conv1", 0.7), ("layer2.1.conv1", 0.3)):
            small = prune_groups(session.folded, session.groups, sparsity, groups=(name,), share=True)
            found = meter.correct(small, differing(session.folded, small), 0, len(data))
            plain = itf.evaluate(small, data, limit=None).correct[order]
            wrong, count = wrong + int((found != plain).sum()), count + len(plain)
        assert count == 6_000
        assert wrong <= count / 10_000


class Twice(nn.Module):
    """One layer in two places, and a number of its own."""

    def __init__(self, twice: bool):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        if twice:
            self.again = self.first
        else:
            self.shift = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.again(x) if hasattr(self, "again") else x + self.shift)


@pytest.mark.parametrize("twice", [True, False])
def test_what_is_no_tree_of_layers_is_copied_whole(twice):
    dense = Twice(twice).requires_grad_(False)
    other = copy.deepcopy(dense)
    other.first.weight += 1
    cheap, x = low(other, low(dense), {"first"}), torch.ones(1, 4, 2, 2)
    torch.testing.assert_close(cheap(x.bfloat16()).float(), other(x), rtol=0.05, atol=0.05)
