"""Networks in float64, bfloat16 and float16: measured in their own numbers, looked at and trained in float32 at least."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion as itf
from intrafusion.evaluation import incremental as meters
from intrafusion.evaluation.accuracy import logits, size
from intrafusion.evaluation.attribution import METHODS, channel_attribution
from intrafusion.evaluation.incremental import Meter
from intrafusion.evaluation.latency import measure_latency
from intrafusion.models.precision import has_bf16, kind_of
from intrafusion.reporting import export
from intrafusion.studies.measurement import run_spec
from intrafusion.studies.session import Session
from intrafusion.studies.sweeps import Failure, sweep

KINDS = {"float64": (torch.float64, 1e-5), "bfloat16": (torch.bfloat16, 0.15), "float16": (torch.float16, 0.02)}
SPEC = itf.PruneSpec(model="resnet-pad", dataset="noise", merge="drop", sparsity=0.4, limit=None)
needs_bf16 = pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this CPU has no bf16 instructions")


@pytest.fixture(scope="module", params=KINDS)
def other(request, networks):
    """A network in other numbers, the one in float32, and how far they may be apart, as a share of the largest value."""
    network, (kind, apart) = networks("resnet-pad"), KINDS[request.param]
    return copy.deepcopy(network.model).to(kind), network, apart


def bench_of(model, network):
    return Session(model, itf.find_groups(model, network.example), size(model, network.example), network.data)


def assert_near(found, expected, apart):
    assert (found.double() - expected.double()).abs().max() <= apart * expected.abs().max()


def test_logits_are_of_its_own_numbers(other):
    model, network, apart = other
    found = logits(model, network.data)
    assert found.dtype == kind_of(model)
    assert_near(found, logits(network.model, network.data), apart)
    assert itf.evaluate(model, network.data).count == 24


def test_points_are_measured(other):
    model, network, _ = other
    result = run_spec(SPEC, bench_of(model, network))
    assert (result.count, result.prunes) == (24, True)
    *_, swept = sweep([SPEC], bench_of(model, network))
    assert swept.correct == result.correct
    assert result.dense_accuracy == itf.evaluate(bench_of(model, network).folded, network.data).accuracy


@pytest.mark.parametrize("criterion", [e.name for e in itf.registry("criterion").values() if e.needs != "nothing"])
def test_criteria_score_what_they_do_in_float32(other, criterion):
    model, network, apart = other
    group = network.prunable[0]
    found, expected = (itf.score(m, group, criterion, network.data) for m in (model, network.model))
    assert torch.isfinite(found).all()
    if criterion not in ("greedy", "hrank", "chip"):  # counts and orders jump
        assert_near(found, expected, 3 * apart)


@pytest.mark.parametrize("method", METHODS)
def test_attributions(other, method):
    model, network, _ = other
    found = channel_attribution(model, network.prunable[0], 0, network.data.images[0], method)
    assert found.pixels.dtype == found.map.dtype == torch.float32
    assert torch.isfinite(found.pixels).all()


@pytest.mark.parametrize("merge", ["fusion", "refit", "calibrated", "fold"])
def test_what_is_pruned_is_of_its_numbers_too(other, merge):
    model, network, _ = other
    small = itf.prune(model, network.example, 0.4, merge=merge, data=network.data)
    assert kind_of(small) == kind_of(model)
    assert torch.isfinite(logits(small, network.data)).all()


@pytest.mark.parametrize("recovery", ["bn-reset", "repair", "finetune", "distill"])
def test_recoveries(other, recovery):
    model, network, _ = other
    spec = SPEC.but(recovery=recovery, epochs=1.0, rate=0.01)
    session = bench_of(model, network)
    session.calibration = lambda *_: network.data  # type: ignore[method-assign]
    *_, result = sweep([spec], session)
    assert not isinstance(result, Failure), result.reason
    assert result.count == 24


def test_exports_are_in_float32_and_say_so(other, tmp_path, capsys):
    model, network, _ = other
    session = bench_of(model, network)
    *_, last = export(SPEC, session, tmp_path / "out", speed=False)
    kind = str(kind_of(model)).removeprefix("torch.")
    assert f"accuracy was measured in {kind}" in capsys.readouterr().err
    assert [one.reason for one in last.result.files if one.format == "torch.export"] == [None]
    assert kind_of(last.result.made.network) == torch.float32


def test_speed_and_size(other):
    model, network, _ = other
    assert measure_latency(model, network.example, batch=2, runs=6).macs == size(network.model, network.example).macs


class Halved(nn.Module):
    """A trunk in half precision, and a head that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3).half(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)).mean((2, 3)).float())


def test_several_number_types_are_one_line(networks):
    network, model = networks("resnet-pad"), Halved().eval()
    model.card = network.model.card
    tries = [
        lambda: itf.find_groups(model, network.example), lambda: itf.evaluate(model, network.data),
        lambda: size(model, network.example), lambda: itf.prune(model, network.example),
        lambda: Meter(model, network.data), lambda: measure_latency(model, network.example, batch=2, runs=6),
    ]  # fmt: skip
    for attempt in tries:
        with pytest.raises(itf.IntrafusionError, match=r"weights of float16 and float32; .* model\.float\(\)") as caught:
            attempt()
        assert "\n" not in str(caught.value)


class Asking(nn.Module):
    """A forward that asks for float32 in one of several ways."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.first, self.second = how, nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x)))).mean((2, 3))
        if self.how == "float":
            return self.head(x.float())
        if self.how == "ones":
            return self.head(x @ torch.eye(32))
        if self.how == "coordinates":
            return self.head(torch.cat([x[:, :31], torch.linspace(0, 1, len(x))[:, None]], 1) @ torch.ones(32, 32))
        return self.head((x.double() * torch.ones(32, dtype=torch.float64)).float())


@pytest.fixture(params=["float", "ones", "coordinates", "double"])
def asking(request, networks):
    torch.manual_seed(0)
    model, network = Asking(request.param).eval(), networks("resnet-pad")
    model.card = network.model.card
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (300, 3, 8, 8), generator=generator, dtype=torch.uint8)
    data = itf.ImageData("noise", "test", images, torch.randint(0, 5, (300,), generator=generator), tuple("abcde"))
    return model, network.example, data


@needs_bf16
@pytest.mark.parametrize("pays", [True, False])
def test_a_forward_that_asks_for_float32_is_measured_without_a_screen(asking, monkeypatch, pays):
    model, example, data = asking
    monkeypatch.setattr(meters, "_PAYS", 100.0 if pays else 0.75)  # whether a screen would be taken where it runs
    session = Session(model, itf.find_groups(model, example), size(model, example), data)
    *_, result = sweep([SPEC], session)
    small = itf.prune(model, example, SPEC.sparsity, merge="drop")
    assert result.count == 300
    assert result.dense_accuracy == itf.evaluate(model, data, limit=None).accuracy
    assert result.accuracy == itf.evaluate(small, data, limit=None).accuracy


@needs_bf16
def test_precision_fast_falls_back_and_says_so(networks, capsys):
    network = networks("resnet-pad")
    torch.manual_seed(0)
    model = Asking("float").eval()
    model.card = network.model.card
    meter = Meter(model, network.data, "fast")
    assert meter.precision == "exact"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("measuring without precision fast: the network does not run in bf16 (")
    assert float(meter.dense(24).double().mean()) == itf.evaluate(model, network.data).accuracy


@needs_bf16
def test_a_screen_that_fails_behind_a_cut_is_given_up(networks, monkeypatch):
    network = networks("resnet-pad")
    monkeypatch.setattr(meters, "_PAYS", 100.0)
    meter, expected = Meter(network.model, network.data), itf.evaluate(network.model, network.data).correct
    assert meter._cheap is not None

    def fail(*_):
        raise RuntimeError("expected scalar type Float but found BFloat16")

    monkeypatch.setattr("intrafusion.evaluation.bf16_screening.Screen.predictions", fail)
    assert int(meter.dense(24).sum()) == int(expected.sum())
    assert meter._cheap is None
