"""On an accelerator every method gives what the CPU gives, and data and models may lie on different devices."""

import functools
import threading

import pretend_device
import pytest
import torch
from torch import Tensor, nn

import intrafusion as itf
from intrafusion._registry import TRAINERS
from intrafusion.evaluation.attribution import METHODS, channel_attribution
from intrafusion.evaluation.latency import compare_latency
from intrafusion.pruning.importance import CRITERIA
from intrafusion.pruning.merge import MERGES
from intrafusion.pruning.transport.solvers import SOLVERS
from intrafusion.reporting.artifact import making
from intrafusion.runtime.devices import device_of
from intrafusion.studies import sweeps
from intrafusion.studies.measurement import Result
from intrafusion.studies.session import Session, merged, open_session, pruned
from intrafusion.studies.weight_space import Solutions, networks_between, sharpness, slices
from intrafusion.training.augment import shift_and_flip
from intrafusion.training.loop import Recipe, train
from intrafusion.training.methods.runs import run_training
from intrafusion.training.methods.spec import TrainSpec
from intrafusion.training.recovery import RECOVERIES, RecoveryOptions, recover

pytestmark = pytest.mark.gpu
BASE = itf.PruneSpec(model="digits-resnet", dataset="digits", sparsity=0.4, calibration=64, training=200, limit=200)
TRAINED = [name for name, entry in RECOVERIES.items() if entry.needs == "labels"]


@functools.cache
def session(device: str, model: str = BASE.model) -> Session:
    return open_session(BASE.but(model=model), device)


def same(spec: itf.PruneSpec, tolerance: float = 1e-3) -> None:
    ours, theirs = (pruned(spec, session(device, spec.model)) for device in ("cuda", "cpu"))
    assert {tensor.device.type for tensor in (*ours.parameters(), *ours.buffers())} == {"cuda"}
    for (name, found), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        close(found, expected, tolerance, name)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-3, name: str = "") -> None:
    torch.testing.assert_close(
        found.cpu(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()), msg=lambda said: f"{name}: {said}"
    )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria(criterion):
    same(BASE.but(criterion=criterion, model="digits-vgg"))


@pytest.mark.parametrize("merge", MERGES)
def test_merges(merge):
    same(BASE.but(merge=merge))


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers(solver):
    same(BASE.but(solver=solver))


@pytest.mark.parametrize(
    "options", [{"anchors": "kmeans"}, {"anchors": "gmm"}, {"cost": "activations"}, {"source": "importance"}], ids=str
)
def test_ways_to_plan(options):
    same(BASE.but(**options))


@pytest.mark.parametrize("recovery", [name for name in RECOVERIES if name not in TRAINED])
def test_recoveries_without_training(recovery):
    same(BASE.but(recovery=recovery))


@pytest.mark.parametrize("recovery", TRAINED)
def test_recoveries_with_training_take_images_from_the_cpu(recovery):
    here = session("cuda")
    made = merged(BASE.but(recovery=recovery), here)
    told: list = []
    images = itf.load_data("digits", "train", limit=200)
    recover(made, recovery, images, RecoveryOptions(epochs=1.0, rate=0.01), report=told.append)
    assert device_of(made.small).type == "cuda"
    assert told[0].where == f"bf16 on {torch.cuda.get_device_name()}"
    assert itf.evaluate(made.small, here.images()).accuracy > 0.3


@pytest.mark.parametrize("method", [name for name in TRAINERS if name not in ("fap", "paf")])
def test_training_methods(method, tmp_path, monkeypatch):
    accuracies = []
    for device, where in (("cuda", f"bf16 on {torch.cuda.get_device_name()}"), ("cpu", "fp32 on cpu")):
        monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path / device))
        *_, run = run_training(TrainSpec(model="digits-mlp", method=method, training=200, epochs=2), device)
        accuracies.append(run.outcome.accuracy)
        assert run.outcome.where == where
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_attribution(method):
    here, there = session("cpu", "digits-vgg"), session("cuda", "digits-vgg")
    image = here.images().images[0]
    expected, found = (channel_attribution(one.model, one.groups[1], 0, image, method) for one in (here, there))
    close(found.pixels, expected.pixels)


def test_a_slice_a_spectrum_and_a_path():
    spec, found = BASE.but(model="digits-vgg", sparsity=0.5, limit=64), {}
    for device in ("cpu", "cuda"):
        solutions = Solutions(spec, session(device, spec.model))
        *_, slice_ = slices(solutions, size=3)
        *_, sharp = sharpness(solutions, images=32, count=2, steps=6)
        found[device] = torch.from_numpy(slice_.surface.loss), sharp.values
        *_, path = networks_between(solutions, ("dense", "fused"), 0.5, 0.01, 200)
        assert len(path.rows()) > 10
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_sweeps(precision, memory):
    specs = itf.grid(BASE.but(precision=precision), merge=("drop", "fusion"), sparsity=(0.3, 0.6))
    last = {
        device: {result.spec: result.accuracy for result in itf.sweep(specs, session(device), memory=memory)}
        for device in ("cuda", "cpu")
    }
    assert last["cuda"] == pytest.approx(last["cpu"], abs=0.01)


def test_the_next_point_is_pruned_while_one_is_evaluated(monkeypatch):
    threads = []

    def noted(*arguments):
        threads.append(threading.current_thread() is threading.main_thread())
        return pruned(*arguments)

    monkeypatch.setattr(sweeps, "pruned", noted)
    results = list(itf.sweep(itf.grid(BASE, sparsity=(0.2, 0.3, 0.4)), session("cuda")))
    assert threads == [True, False, False]
    assert all(isinstance(result, Result) for result in results)


def test_an_export_and_its_speed():
    here = session("cuda")
    *_, last = making(BASE, here)
    assert device_of(last.result.network).type == "cpu"
    *_, found = compare_latency(here.model, pruned(BASE, here), here.card.example(), batch=2, runs=6)
    assert found.device == torch.cuda.get_device_name()


class TestMixedDevices:
    """The documented calls, with the model on the device and everything else where it was loaded."""

    @pytest.fixture
    def model(self) -> nn.Module:
        return itf.load_model("digits-vgg", device="cuda")

    @pytest.fixture
    def images(self) -> itf.ImageData:
        return itf.load_data("digits", limit=100)

    def test_calls_with_an_example(self, model):
        example = model.card.example()
        plain = itf.load_model("digits-vgg")
        small = itf.prune(model, example, 0.5)
        assert {tensor.device.type for tensor in small.state_dict().values()} == {"cuda"}
        for (name, found), expected in zip(
            small.state_dict().items(), itf.prune(plain, example, 0.5).state_dict().values(), strict=True
        ):
            close(found, expected, 1e-6, name)
        assert device_of(itf.fold(model, example)).type == "cuda"
        assert itf.size(small, example) == itf.size(small, example.cuda())
        assert len(itf.find_groups(model, example)) == len(itf.find_groups(plain, example.cuda()))

    def test_calls_with_images(self, model, images):
        group = itf.find_groups(model, model.card.example())[1]
        assert itf.evaluate(model, images).accuracy > 0.9
        for criterion in ("l1", "taylor", "chip", "conductance"):
            assert itf.score(model, group, criterion, images).device.type == "cpu"
        scores = itf.score(model, group, "l1")
        assert itf.plan(model, group, scores, 0.5, cost="activations", data=images).matrix.device.type == "cpu"
        small = itf.prune(model, model.card.example(), 0.5, merge="refit", data=images)
        assert device_of(small).type == "cuda"

    def test_networks_of_two_devices_are_fused_on_the_first(self, model, images):
        other = itf.load_model("digits-vgg", "random")
        fused = itf.fuse_models([model, other], model.card.example(), images)
        assert device_of(fused).type == "cuda"
        assert device_of(itf.fuse_models([other, model], model.card.example(), images)).type == "cpu"


class TestWithoutFloat64:
    """As on Apple's GPUs."""

    @pytest.fixture(autouse=True)
    def no_double(self):
        with pretend_device.present(no_double=True):
            yield

    @pytest.mark.parametrize("merge", MERGES)
    def test_merges(self, merge):
        same(BASE.but(merge=merge, sparsity=0.35))

    @pytest.mark.parametrize("criterion", CRITERIA)
    def test_criteria(self, criterion):
        same(BASE.but(criterion=criterion, model="digits-vgg", sparsity=0.35))

    @pytest.mark.parametrize("recovery", ["repair", "bn-reset", "finetune", "overparam-sp"])
    def test_recoveries(self, recovery):
        made = merged(BASE.but(recovery=recovery), session("cuda"))
        recover(made, recovery, itf.load_data("digits", "train", limit=200), RecoveryOptions(epochs=0.5, rate=0.01))
        assert itf.evaluate(made.small, session("cuda").images()).accuracy > 0.2

    @pytest.mark.parametrize("method", ["sgd", "sdprun", "smooth-svd", "aslp"])
    def test_training_methods(self, method):
        *_, run = run_training(TrainSpec(model="digits-mlp", method=method, training=200, epochs=1), "cuda")
        assert 0 < run.outcome.accuracy < 1

    @pytest.mark.parametrize("precision", ["exact", "fast"])
    def test_a_sweep(self, precision):
        specs = itf.grid(BASE.but(precision=precision, sparsity=0.35), merge=("drop", "fusion"))
        found, expected = (
            {result.spec: result.accuracy for result in itf.sweep(specs, session(device), decide=True)}
            for device in ("cuda", "cpu")
        )
        assert found == pytest.approx(expected, abs=0.01)

    def test_a_slice_a_spectrum_a_path_and_an_attribution(self):
        here = session("cuda", "digits-vgg")
        solutions = Solutions(BASE.but(model="digits-vgg", sparsity=0.5, limit=32), here)
        *_, slice_ = slices(solutions, size=3)
        *_, sharp = sharpness(solutions, images=16, count=1, steps=3)
        *_, path = networks_between(solutions, ("dense", "fused"), 0.1, 0.01, 100)
        assert slice_.surface.share == 1
        assert sharp.values.isfinite().all()
        assert len(path.rows()) > 10
        for method in METHODS:
            assert channel_attribution(here.model, here.groups[1], 0, here.images().images[0], method).pixels.isfinite().all()

    @pytest.mark.parametrize(
        "method", [name for name in TRAINERS if name not in ("fap", "paf", "sgd", "sdprun", "smooth-svd", "aslp")]
    )
    def test_other_training_methods(self, method):
        *_, run = run_training(TrainSpec(model="digits-mlp", method=method, training=100, epochs=1), "cuda")
        assert 0 < run.outcome.accuracy < 1

    def test_an_export(self):
        *_, last = making(BASE, session("cuda"))
        assert device_of(last.result.network).type == "cpu"
        images = itf.load_data("digits", limit=50)
        assert device_of(itf.fuse_models([session("cuda").model] * 2, torch.zeros(1, 1, 8, 8), images)).type == "cuda"


class TestWaits:
    """What crosses between the CPU and the device, on a session that has measured one point already."""

    pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only the pretended device counts")

    @pytest.mark.parametrize("merge", ["drop", "fusion"])
    def test_a_pruned_point(self, merge):
        here = session("cuda")
        pruned(BASE.but(merge=merge, sparsity=0.3), here)
        with pretend_device.counting() as found:
            pruned(BASE.but(merge=merge, sparsity=0.6), here)
        assert found["copies"] <= 30
        assert found["waits"] <= 5

    @pytest.mark.parametrize(("precision", "most"), [("fast", 1), ("exact", 5)])
    def test_an_evaluated_point(self, precision, most):
        here = session("cuda")
        meter = here.meter(BASE.but(precision=precision, limit=None))
        meter.batch = 64
        networks = [pruned(BASE.but(sparsity=share), here) for share in (0.3, 0.6)]
        changed = {name for name, _ in here.folded.named_modules()}
        meter.correct(networks[0], changed, 0, len(meter))
        with pretend_device.counting() as found:
            meter.correct(networks[1], changed, 0, len(meter))
        assert found["waits"] <= most
        assert meter.precision == precision
        assert (meter._cheap is not None) == (precision == "exact")

    def test_a_training_step(self):
        images, card = itf.load_data("digits", "train"), itf.load_model("digits-mlp").card
        counts = []
        for epochs in (1.0, 2.0):
            model = itf.load_model("digits-mlp", device="cuda")
            with pretend_device.counting() as found:
                *_, last = train(model, images, Recipe(epochs, shift_and_flip, batch=32), card.mean, card.std, looks=1)
            counts.append((last.step, found["copies"], found["waits"]))
        steps, copies, waits = (second - first for first, second in zip(*counts, strict=True))
        assert steps > 20
        assert max(copies, waits) <= 2 * steps
