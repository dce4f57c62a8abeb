import json
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import intrafusion as itf
import intrafusion.studies.session as bench_module
from intrafusion.data.datasets import normalise
from intrafusion.evaluation.accuracy import Size, layer_sizes, size
from intrafusion.spec import PLAN_FIELDS
from intrafusion.studies.measurement import Result, check_spec, run_spec
from intrafusion.studies.session import Session, open_session, pruned
from intrafusion.studies.sweeps import grid

BASE = itf.PruneSpec(model="digits-resnet", limit=200)


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(BASE)


class TestBench:
    def test_holds_what_the_spec_names(self, session):
        assert session.card.name == "digits-resnet"
        assert len(session.images()) == 597
        assert session.example.shape == (1, 1, 8, 8)
        found = itf.find_groups(session.model, session.example)
        assert [(g.name, g.size) for g in session.groups] == [(g.name, g.size) for g in found]
        assert session.size.params == session.card.details["parameters"]

    def test_dense_accuracy_is_measured_once_for_each_choice_of_images(self, monkeypatch):
        session = open_session(BASE)
        calls = []

        def counting(model, data, limit, seed):
            calls.append((limit, seed))
            return itf.evaluate(model, data, limit, seed)

        monkeypatch.setattr("intrafusion.studies.session.evaluate", counting)
        first = session.dense(100)
        assert session.dense(100) is first
        assert session.dense(50, seed=3).count == 50
        assert calls == [(100, 0), (50, 3)]

    def test_bench_without_images_says_so(self):
        bare = open_session("digits-mlp")
        for use in (bare.images, lambda: bare.dense(10), lambda: run_spec(BASE.but(model="digits-mlp"), bare)):
            with pytest.raises(itf.IntrafusionError, match="no digits images") as caught:
                use()
            assert "\n" not in str(caught.value)


class TestKnown:
    """Scores, distances and plans of a group are computed once, and are what the library gives."""

    @pytest.fixture
    def counted(self, monkeypatch):
        session, calls = open_session(BASE), []
        for name in ("score", "compare_channels", "load_calibration"):
            function = getattr(bench_module, name)
            monkeypatch.setattr(bench_module, name, lambda *a, _f=function, _n=name, **o: calls.append(_n) or _f(*a, **o))
        return session, session.groups[1], calls

    def test_distances_are_measured_once_for_every_sparsity_criterion_marginal_and_solver(self, counted):
        session, group, calls = counted
        for change in ({}, {"sparsity": 0.5}, {"criterion": "l2"}, {"solver": "sinkhorn"}, {"source": "softmax"},
                       {"anchors": "kmeans"}, {"normalise": "none"}, {"merge": "drop"}, {"limit": 7}):  # fmt: skip
            session.plan(BASE.but(**change), group)
        assert calls.count("compare_channels") == 1
        session.plan(BASE.but(p=2), group)
        session.plan(BASE.but(bias=True), group)
        assert calls.count("compare_channels") == 3

    def test_scores_are_computed_once_for_every_sparsity_and_knob(self, counted):
        session, group, calls = counted
        for change in ({}, {"sparsity": 0.5}, {"solver": "partial"}, {"p": 2}, {"calibration": 9}):
            session.scores(BASE.but(**change), group)
        assert calls == ["score"]
        session.scores(BASE.but(criterion="l2"), group)
        session.scores(BASE.but(seed=5), group)
        assert calls == ["score"] * 3

    def test_calibration_images_are_loaded_once_and_tell_scores_apart(self, counted):
        session, group, calls = counted
        for count in (20, 20, 30):
            session.geometry(BASE.but(cost="activations", calibration=count), group)
        assert calls == ["load_calibration", "compare_channels"] * 2

    def test_a_curve_of_one_group_measures_distances_once(self, counted):
        session, group, calls = counted
        for spec in grid(BASE.but(groups=(group.name,), limit=50), sparsity=[0.2, 0.4, 0.6], merge=["drop", "fusion"]):
            run_spec(spec, session)
        assert calls.count("compare_channels") == 1
        assert calls.count("score") == 1

    def test_plans_are_the_librarys(self, session):
        spec = BASE.but(sparsity=0.4, cost="activations", calibration=40, solver="sinkhorn", source="importance")
        group, data = session.groups[2], itf.load_calibration("digits", limit=40)
        scores = itf.score(session.model, group)
        expected = itf.plan(session.model, group, scores, 0.4, data=data, **spec.only(PLAN_FIELDS))
        assert torch.equal(session.plan(spec, group).coupling, expected.coupling)
        assert session.plan(spec, group) is session.plan(spec.but(merge="drop"), group)

    def test_bench_on_other_images_shares_what_is_known(self, counted):
        session, group, _ = counted
        other = session.on(session.images().subset(10))
        assert session.plan(BASE, group) is other.plan(BASE, group)
        assert other.dense(None).count == 10
        assert session.dense(None).count == 597

    def test_output_distance_is_between_logits(self, session):
        spec = BASE.but(groups=(session.groups[1].name,), sparsity=0.5, calibration=30)
        data = itf.load_calibration("digits", limit=30)
        small = itf.prune(session.model, session.example, 0.5, groups=[session.groups[1].name])
        distances = session.output_distance(spec, session.groups[1])
        images = normalise(data.images, session.card.mean, session.card.std)
        expected = (small(images) - session.model(images)).norm(dim=1)
        torch.testing.assert_close(distances, expected, rtol=1e-4, atol=1e-4)
        assert not session.output_distance(spec.but(sparsity=0), session.groups[1]).max() > 1e-3


class TestRun:
    def test_result_is_what_the_parts_give(self, session):
        spec = BASE.but(sparsity=0.3, seed=2)
        result = run_spec(spec, session)
        small = itf.prune(session.model, session.example, 0.3, "l1", "fusion")
        expected = itf.evaluate(small, session.images(), 200, seed=2)
        assert result.spec == spec
        assert (result.accuracy, result.interval, result.count) == (expected.accuracy, expected.interval, 200)
        assert result.dense_accuracy == itf.evaluate(session.model, session.images(), 200, seed=2).accuracy
        assert result.params == sum(p.numel() for p in small.parameters())
        assert Size(result.params_before, result.macs_before) == session.size
        assert Size(result.params, result.macs) == size(small, session.example)
        assert result.seconds > 0

    @pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95])
    @pytest.mark.parametrize("groups", ["all", ("layer2.0.conv1",), ("conv1", "layer3.0.conv2")])
    def test_channels_are_those_of_the_small_network(self, session, sparsity, groups):
        spec = BASE.but(sparsity=sparsity, groups=groups)
        result, small = run_spec(spec, session), pruned(spec, session)
        chosen = [g for g in session.groups if g.reason is None and (groups == "all" or g.name in groups)]
        assert result.channels_before == sum(group.size for group in chosen)
        assert result.channels == sum(small.get_submodule(group.name).weight.shape[0] for group in chosen)
        assert result.channels == sum(max(1, int(group.size * (1 - sparsity))) for group in chosen)
        low, high = result.interval
        assert low <= result.accuracy <= high
        assert result.accuracy * result.count == pytest.approx(round(result.accuracy * result.count))

    def test_channels_of_a_zero_padded_group_are_those_of_the_small_network(self):
        session = open_session("cifar10-resnet20", weights="random")
        session.data = itf.ImageData(
            "cifar10", "test", torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ("a",)
        )
        spec = itf.PruneSpec(model="cifar10-resnet20", weights="random", groups=("conv1",), sparsity=0.45)
        result = run_spec(spec, session)
        small = pruned(spec, session)
        stages = [small.conv1, small.layer2[0].conv2, small.layer3[0].conv2]
        assert result.channels_before == 64
        assert result.channels == max(conv.out_channels for conv in stages) == small.linear.in_features

    @pytest.mark.parametrize("merge", itf.registry("merge"))
    @pytest.mark.parametrize("model", ["digits-mlp", "digits-vgg", "digits-resnet"])
    def test_sparsity_zero_is_the_dense_network(self, model, merge):
        spec = itf.PruneSpec(model=model, sparsity=0, merge=merge, limit=None)
        result = run_spec(spec, open_session(spec))
        assert result.accuracy == result.dense_accuracy
        assert result.count == 597
        assert result.channels == result.channels_before
        assert result.macs == result.macs_before
        assert result.params <= result.params_before  # folded norms are gone

    @pytest.mark.parametrize("model", ["digits-vgg", "digits-resnet"])
    def test_fusion_beats_dropping_by_ten_points_at_twenty_percent(self, model):
        base = itf.PruneSpec(model=model, sparsity=0.2, limit=None)
        session = open_session(base)
        fused, dropped = (run_spec(base.but(merge=merge), session) for merge in ("fusion", "drop"))
        assert fused.accuracy > dropped.accuracy + 0.10
        assert (fused.channels, fused.params, fused.macs) == (dropped.channels, dropped.params, dropped.macs)

    def test_dense_model_stays_as_it_was(self, session):
        before = {key: value.clone() for key, value in session.model.state_dict().items()}
        run_spec(BASE.but(sparsity=0.5), session)
        assert all(torch.equal(value, before[key]) for key, value in session.model.state_dict().items())

    def test_row_is_flat_and_json_able_and_holds_every_knob(self, session):
        result = run_spec(BASE.but(sparsity=0.5, groups=("conv1",)), session)
        row = result.to_row()
        assert json.loads(json.dumps(row)) == row
        spec = {"dataset": row["data"], **{key: row[key] for key in result.spec.to_dict() if key != "dataset"}}
        assert itf.PruneSpec.from_dict(spec) == result.spec
        assert (row["low"], row["high"]) == result.interval
        fields = set(Result.__dataclass_fields__) - {"spec", "interval", "correct"}
        assert {name: row[name] for name in fields} == {name: getattr(result, name) for name in fields}

    @pytest.mark.parametrize(("model", "arrays"), [
        ("digits-resnet", ((3, 32, 32), 10)), ("digits-resnet", ((1, 8, 8), 11)), ("digits-resnet", ((1, 9, 8), 10)),
    ])  # fmt: skip
    def test_data_of_another_kind_are_one_line(self, model, arrays):
        shape, classes = arrays
        session = open_session(model)
        session.data = itf.ImageData(
            "other", "test", torch.zeros(4, *shape, dtype=torch.uint8), torch.zeros(4).long(), ("x",) * classes
        )
        with pytest.raises(itf.IntrafusionError, match=r"digits-resnet needs 10 classes.*other has") as caught:
            run_spec(BASE, session)
        assert "\n" not in str(caught.value)


REFUSED = {
    "criterion": ({"criterion": "luck"}, "unknown criterion 'luck'.*l1"),
    "merge": ({"merge": "melt"}, "unknown merge 'melt'.*fusion"),
    "solver": ({"solver": "guess"}, "unknown solver 'guess'.*exact"),
    "recovery": ({"recovery": "hope"}, "unknown recovery 'hope'.*none"),
    "group": ({"groups": ("conv9",)}, "no group 'conv9'.*conv1"),
    "output group": ({"groups": ("conv1", "linear")}, "linear cannot be pruned.*outputs"),
    "source": ({"source": "rain"}, "source.*'rain'.*uniform"),
    "target": ({"target": "rain"}, "target.*'rain'.*uniform"),
    "anchors": ({"anchors": "rain"}, "anchors.*'rain'.*important"),
    "normalise": ({"normalise": "rain"}, "normalise.*'rain'.*source"),
}


@pytest.mark.parametrize(("changes", "match"), REFUSED.values(), ids=REFUSED)
def test_check_refuses_what_cannot_run(session, changes, match):
    with pytest.raises(itf.IntrafusionError, match=match) as caught:
        check_spec(BASE.but(**changes), session)
    assert "\n" not in str(caught.value)


def test_check_lets_pass_what_runs(session):
    for changes in ({}, {"groups": ("conv1",)}, {"criterion": "bn_scale"}, {"source": "softmax", "anchors": "kmeans"}):
        check_spec(BASE.but(**changes), session)


class Tiny(nn.Module):
    """Two convolutions, one of them grouped and called twice, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(self.twice(self.twice(x)).flatten(1))


class TestSize:
    # outputs x weights read by each: 8 channels of 4x4 x 27; twice 8 of 4x4 x (2 inputs x 9); 10 x 128
    EXPECTED = {  # noqa: RUF012
        "stem": Size(8 * 27, 8 * 16 * 27),
        "twice": Size(8 * 18 + 8, 2 * 8 * 16 * 18),
        "head": Size(10 * 128 + 10, 10 * 128),
    }

    def test_layers_match_hand_computed_numbers(self):
        assert layer_sizes(Tiny().eval(), torch.zeros(1, 3, 8, 8)) == self.EXPECTED

    def test_whole_is_the_sum_and_counts_norms_among_the_parameters(self):
        whole = size(Tiny().eval(), torch.zeros(1, 3, 8, 8))
        assert whole.macs == sum(layer.macs for layer in self.EXPECTED.values()) == 3456 + 4608 + 1280
        assert whole.params == 216 + 16 + 152 + 1290

    def test_one_image_counts_however_many_there_are(self):
        assert size(Tiny().eval(), torch.zeros(5, 3, 8, 8)) == size(Tiny().eval(), torch.zeros(1, 3, 8, 8))

    def test_others_that_run_the_model_meanwhile_are_not_counted(self):
        model, inside, go = Tiny().eval(), threading.Event(), threading.Event()

        def pause(*_):
            if not inside.is_set():
                inside.set()
                assert go.wait(10)

        model.head.register_forward_hook(pause)
        found = []
        worker = threading.Thread(target=lambda: found.append(layer_sizes(model, torch.zeros(1, 3, 8, 8))))
        worker.start()
        assert inside.wait(10)
        model(torch.zeros(2, 3, 8, 8))
        go.set()
        worker.join()
        assert found == [self.EXPECTED]

    def test_no_hook_stays_behind(self):
        model = Tiny().eval()
        with pytest.raises(RuntimeError):
            layer_sizes(model, torch.zeros(1, 4, 8, 8))
        layer_sizes(model, torch.zeros(1, 3, 8, 8))
        assert not any(module._forward_hooks for module in model.modules())

    def test_published_macs_of_resnet20(self):
        model = itf.load_model("cifar10-resnet20", weights="random")
        measured = size(model, model.card.example())
        assert measured.macs / 1e6 == pytest.approx(40.6, abs=0.3)  # He et al. 2016 count 40.6 million
        assert measured.params / 1e6 == pytest.approx(0.27, abs=0.005)


def test_nothing_is_scored_where_nothing_goes(session, monkeypatch):
    fresh = open_session(BASE)
    monkeypatch.setattr(bench_module, "score", lambda *a, **o: pytest.fail("scored"))
    assert run_spec(BASE.but(sparsity=0, groups=(fresh.groups[1].name,), criterion="conductance"), fresh).channels == 16
