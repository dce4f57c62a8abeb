import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import intrafusion as itf
from intrafusion.runtime import paths
from intrafusion.runtime.cancellation import Cancelled, stoppable
from intrafusion.studies import sweeps as local
from intrafusion.studies.cluster import connection, driver
from intrafusion.studies.measurement import Result, run_spec
from intrafusion.studies.session import Session, open_session
from intrafusion.studies.store.sqlite import Store
from intrafusion.studies.sweeps import Failure, grid, origin

ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")

BASE = itf.PruneSpec(model="digits-mlp", limit=None)
SPECS = grid(BASE, groups=[("1",), ("3",)], merge=["drop", "fusion"], sparsity=[0.2, 0.5, 0.8])
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 5}


@pytest.fixture(scope="module", autouse=True)
def usual_priority() -> Iterator[None]:
    """Run Ray's workers at the priority of other processes. At Ray's own, 15 lower, they starve beside other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(BASE)


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A cluster of a head, which takes no tasks, and two workers, of which a test may kill one."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20, "_system_config": QUICK}
        machines = Cluster(initialize_head=True, head_node_args=head)
        yield machines
        ray.shutdown()
        machines.shutdown()


@pytest.fixture
def workers(machines: Any) -> Any:
    """The cluster with two living workers, Ray connected to it."""
    while len(machines.worker_nodes) < 2:
        machines.add_node(**NODE)
    if not ray.is_initialized():
        ray.init(machines.address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    return machines


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    with Store(tmp_path / "s.sqlite") as opened:
        yield opened


@pytest.fixture
def tamper(monkeypatch) -> Callable[[Callable[[itf.PruneSpec], None]], None]:
    """Has workers call a function before each measurement: to be slow, to fail, or to die."""

    def tamper(first: Callable[[itf.PruneSpec], None]) -> None:
        def task(*arguments):
            from intrafusion.studies import sweeps
            from intrafusion.studies.cluster import worker

            measure = sweeps.measure
            sweeps.measure = lambda spec, *rest: first(spec) or measure(spec, *rest)
            try:
                yield from worker.measure_remotely(*arguments)
            finally:
                sweeps.measure = measure

        monkeypatch.setattr(driver, "measure_remotely", task)

    return tamper


def last(found: Iterable[Result | Failure]) -> dict[itf.PruneSpec, Result]:
    return {result.spec: result for result in found if isinstance(result, Result)}


def numbers(found: dict[itf.PruneSpec, Result]) -> dict[itf.PruneSpec, tuple]:
    """What must not depend on where a point was measured."""
    return {s: (r.correct, r.count, r.total, r.accuracy, r.dense_accuracy, r.params, r.macs) for s, r in found.items()}


def idle() -> bool:
    """Whether all workers are free again, within the time that a busy machine takes."""
    for _ in range(1200):
        if ray.available_resources().get("CPU") == ray.cluster_resources().get("CPU"):
            return True
        time.sleep(0.05)
    return False


def new_lines(file: Path) -> Iterator[str]:
    """Lines as they are added to a file, from now on."""
    known = len(file.read_text().splitlines())
    for _ in range(1000):
        lines = file.read_text().splitlines()
        yield from lines[known:]
        known = len(lines)
        time.sleep(0.01)


class TestChunks:
    def pieces(self, specs: list[itf.PruneSpec], slots: int, session: Session) -> list[list[itf.PruneSpec]]:
        families = driver._families(local.checked_specs(specs, session))
        return [chunk.specs for chunk in driver._split(families, session, slots)]

    @pytest.mark.parametrize("slots", [1, 2, 3, 100])
    def test_hold_every_point_once_and_families_whole(self, session, slots):
        pieces = self.pieces(SPECS, slots, session)
        assert sorted(spec.key() for piece in pieces for spec in piece) == sorted(spec.key() for spec in SPECS)
        for piece in pieces:
            assert len({spec.groups for spec in piece}) == 1
            assert {spec.merge for spec in piece} == {"drop", "fusion"}

    @pytest.mark.parametrize(("slots", "count"), [(1, 9), (2, 9), (8, 27)])
    def test_a_group_is_cut_up_only_where_workers_would_wait(self, slots, count):
        session = open_session(itf.PruneSpec(model="digits-resnet"))
        groups = [(group.name,) for group in session.groups if group.reason is None]
        specs = grid(BASE, groups=groups, merge=["drop", "fusion"], sparsity=[s / 10 for s in range(1, 10)])
        assert len(self.pieces(specs, slots, session)) == count


class TestSweep:
    @pytest.mark.usefixtures("workers")
    def test_results_are_those_of_the_local_sweep(self, session):
        specs = [*SPECS[:6], BASE.but(criterion="taylor"), BASE.but(limit=50, cost="activations", seed=3)]
        found = last(driver.sweep_on_cluster(specs, session))
        assert numbers(found) == numbers(last(local.sweep(specs, session)))
        assert all(result.complete for result in found.values())

    @pytest.mark.usefixtures("workers")
    def test_the_network_and_the_images_go_out_once(self, session, monkeypatch):
        sent: list[Any] = []
        monkeypatch.setattr(ray, "put", lambda value, put=ray.put: sent.append(value) or put(value))
        assert len(last(driver.sweep_on_cluster(SPECS, session))) == 12
        assert len(sent) == 1

    @pytest.mark.usefixtures("workers")
    def test_results_reach_the_store_as_they_come_and_serve_the_next_study(self, session, store, tamper, monkeypatch):
        tamper(lambda spec: time.sleep(0.05))
        points = [(spec, origin(spec, session)) for spec in SPECS]
        held = []
        for result in driver.sweep_on_cluster(SPECS, session, store):
            stored = store.get(points)
            assert stored[result.spec].count >= result.count
            held.append(len(stored))
        assert held[0] < held[len(held) // 2] <= held[-1] == len(SPECS)
        monkeypatch.setattr(driver, "SESSION", None)  # Ray is not even asked for
        again = list(driver.sweep_on_cluster(SPECS, session, store))
        assert len(again) == len(SPECS)
        assert numbers(last(again)) == numbers(last(local.sweep(SPECS, session)))

    @pytest.mark.usefixtures("workers")
    def test_a_partial_point_goes_on_from_where_it_was(self, session, store, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr("intrafusion.evaluation.incremental.Meter._probe", lambda meter, network: 50)
            looks = local.sweep(SPECS[:1], open_session(BASE), store)
            assert next(looks).count == 100
            looks.close()
        first, *rest = driver.sweep_on_cluster(SPECS[:1], session, store)
        assert first.count == 100
        assert rest[-1].correct == run_spec(SPECS[0], session).correct
        assert all(result.count > 100 for result in rest)

    @pytest.mark.usefixtures("workers")
    def test_points_that_another_process_has_claimed_are_left_to_it(self, session, store, tmp_path):
        taken, point = SPECS[0], origin(SPECS[0], session)
        with Store(tmp_path / "s.sqlite") as other:
            assert other.claim(taken, point)
            found = []
            for result in driver.sweep_on_cluster(SPECS, session, store):
                found.append(result)
                finished = {r.spec for r in found if r.complete}
                if len(finished) == len(SPECS) - 2:  # the taken one's partner waits with it
                    theirs = run_spec(taken, session)
                    other.put(theirs, point)
                    other.release(taken, point)
        assert [result for result in found if result.spec == taken] == [theirs]
        assert set(last(found)) == set(SPECS)

    @pytest.mark.usefixtures("workers")
    def test_a_point_that_fails_is_told_in_one_line_and_the_others_go_on(self, session, store, tamper):
        def first(spec, bad=SPECS[1]):
            if spec == bad:
                raise RuntimeError("no such shape\nlots of it")

        tamper(first)
        store.save_study("s", "", [(spec, origin(spec, session)) for spec in SPECS])
        found = list(driver.sweep_on_cluster(SPECS, session, store))
        assert [f for f in found if isinstance(f, Failure)] == [Failure(SPECS[1], "RuntimeError: no such shape")]
        assert set(last(found)) == {*SPECS} - {SPECS[1]}
        assert store.failures("s") == {SPECS[1]: "RuntimeError: no such shape"}

    @pytest.mark.usefixtures("workers")
    def test_decided_points_are_not_refined(self, session):
        data = session.images()
        many = session.on(
            itf.ImageData(data.name, data.split, data.images.repeat(9, 1, 1, 1), data.labels.repeat(9), data.classes)
        )
        specs = grid(BASE, sparsity=[0.8], merge=["drop", "fusion"])  # 58 % and 83 %
        dropped, fused = last(driver.sweep_on_cluster(specs, many, decide=True)).values()
        assert max(dropped.count, fused.count) < dropped.total

    @pytest.mark.parametrize("changes", [{"merge": "melt"}, {"groups": ("nine",)}], ids=str)
    def test_a_bad_spec_is_refused_before_anything_starts(self, session, monkeypatch, changes):
        monkeypatch.setattr(driver, "SESSION", None)
        with pytest.raises(itf.IntrafusionError):
            next(driver.sweep_on_cluster([*SPECS, BASE.but(**changes)], session))


class TestStopping:
    @pytest.mark.usefixtures("workers")
    @pytest.mark.parametrize("cancelled", [True, False])
    def test_leaves_no_task_and_no_claim(self, session, store, tmp_path, tamper, monkeypatch, cancelled):
        asked, cancel = [], ray.cancel
        monkeypatch.setattr(ray, "cancel", lambda task, force=False: asked.append(force) or cancel(task, force=force))
        monkeypatch.setattr(driver, "_LEAVE", 10.0)  # a busy machine is slow
        tamper(lambda spec: any(time.sleep(0.05) for _ in itertools.repeat(0, 0 if spec.sparsity == 0.2 else 10**6)))
        stop = threading.Event()
        looks = driver.sweep_on_cluster(SPECS, session, store)
        with stoppable(stop):
            next(looks)
            if cancelled:
                stop.set()
                with pytest.raises(Cancelled):
                    list(looks)
            else:
                looks.close()
        assert asked  # without force, which comes last of all, where Ray has lost what it was asked
        assert asked == sorted(asked)
        assert not asked[0]
        assert idle()
        with Store(tmp_path / "s.sqlite") as other:
            assert all(other.claim(spec, origin(spec, session)) for spec in SPECS[2:])

    @pytest.mark.usefixtures("workers")
    def test_what_was_measured_before_serves_the_next_run(self, session, store):
        looks = driver.sweep_on_cluster(SPECS, session, store)
        early = next(looks)
        looks.close()
        assert early in list(driver.sweep_on_cluster(SPECS, session, store))

    @pytest.mark.usefixtures("workers")
    def test_tasks_that_fit_nowhere_are_waited_for_and_then_refused(self, session, monkeypatch, caplog):
        monkeypatch.setattr(driver, "_PATIENCE", 1.5)
        monkeypatch.setattr(driver, "_AGAIN", 0.2)
        with pytest.raises(itf.IntrafusionError, match="no machine of the Ray cluster has the 1 CPUs and 2 GPUs"):
            list(driver.sweep_on_cluster(SPECS, session, num_gpus=2))
        assert [record.message for record in caplog.records if "waiting for one" in record.message]

    @pytest.mark.usefixtures("workers")
    def test_workers_of_another_version_are_refused(self, session, monkeypatch):
        monkeypatch.setattr(driver, "code_version", lambda: "another")
        with pytest.raises(itf.IntrafusionError, match=r"cannot start \(one has another version of intrafusion"):
            list(driver.sweep_on_cluster(SPECS, session))
        assert idle()

    @pytest.mark.usefixtures("workers")
    def test_a_task_that_does_not_listen_is_ended(self, session, tamper, monkeypatch):
        tamper(lambda spec: time.sleep(0 if spec.sparsity == 0.2 else 60))
        monkeypatch.setattr(driver, "_LEAVE", 0.5)
        looks = driver.sweep_on_cluster(SPECS, session)
        next(looks)
        looks.close()
        assert idle()


class TestShares:
    @pytest.mark.parametrize(("gpus", "kind"), [(0, "cpu"), (1, "cuda")])
    def test_what_is_trained_there_is_of_the_kind_of_device_that_tasks_ask_for(self, session, gpus, kind):
        place = driver._Share(1, gpus).origin(SPECS[0], session)
        assert (place.kind, place.model, place.data) == (kind, *session.fingerprints(SPECS[0]))

    @pytest.mark.parametrize(
        ("cpus", "gpus", "count"),
        [(1, 0, 8), (3, 0, 2), (0.5, 0, 16), (0, 1, 2), (1, 1, 2), (1, 0.25, 8), (8, 1, 1), (9, 0, 0), (1, 3, 0)],
    )
    def test_count_the_tasks_of_a_machine(self, cpus, gpus, count):
        assert driver._Share(cpus, gpus).fits({"CPU": 8.0, "GPU": 2.0, "memory": 1e9}) == count

    @pytest.mark.parametrize(
        "asked", [{"num_cpus": -1}, {"num_cpus": 0}, {"num_gpus": 1.5}, {"num_gpus": float("inf")}], ids=str
    )
    def test_an_impossible_one_is_refused_before_anything_starts(self, session, monkeypatch, asked):
        monkeypatch.setattr(driver, "SESSION", None)
        with pytest.raises(itf.IntrafusionError, match="a task"):
            list(driver.sweep_on_cluster(SPECS, session, **asked))

    @pytest.mark.usefixtures("workers")
    def test_is_asked_for_by_every_task_which_uses_that_device(self, session, monkeypatch):
        asked: list[Any] = []

        class Task:
            def options(self, **options):
                asked.append(options)
                return self

            def remote(self, *arguments):
                asked.append(arguments[5:7])
                raise itf.IntrafusionError("seen enough")

        monkeypatch.setattr(ray, "remote", lambda function: Task())
        for share in ({}, {"num_cpus": 0.5, "num_gpus": 0.25}, {"num_cpus": 4}):
            with pytest.raises(itf.IntrafusionError, match="enough"):
                list(driver.sweep_on_cluster(SPECS, session, **share))
        assert asked == [
            {"num_cpus": 1, "num_gpus": 0, "max_retries": 0}, (1, "cpu"),
            {"num_cpus": 0.5, "num_gpus": 0.25, "max_retries": 0}, (1, "cuda"),
            {"num_cpus": 4, "num_gpus": 0, "max_retries": 0}, (4, "cpu"),
        ]  # fmt: skip

    @pytest.mark.gpu
    def test_two_workers_share_a_gpu(self, store):
        ray.shutdown()
        session = open_session(BASE, "cuda")
        found = last(driver.sweep_on_cluster(SPECS, session, store, num_cpus=0.5, num_gpus=0.5))
        assert numbers(found) == numbers(last(local.sweep(SPECS, session)))
        store.save_study("s", "", [(spec, origin(spec, session)) for spec in SPECS])
        assert store.study("s").devices == (torch.cuda.get_device_name(),)


class TestLosses:
    @pytest.mark.usefixtures("workers")
    def test_a_point_that_kills_its_workers_takes_no_others_with_it(self, session, tamper, caplog, monkeypatch):
        def first(spec, deadly=SPECS[3]):
            if spec == deadly:
                os._exit(1)

        tamper(first)
        monkeypatch.setattr(driver, "RETRIES", 2)
        found = list(driver.sweep_on_cluster(SPECS, session))
        failures = {f.spec: f.reason for f in found if isinstance(f, Failure)}
        assert set(failures) == {SPECS[3]}
        assert "lost 3 times (WorkerCrashedError" in failures[SPECS[3]]
        assert "\n" not in failures[SPECS[3]]
        assert {spec for spec, r in last(found).items() if r.complete} == {*SPECS} - {SPECS[3]}
        assert [record.message.rpartition("(")[2] for record in caplog.records if "was lost" in record.message] == [
            f"{n} of 2)" for n in (1, 2)
        ]

    def test_what_a_killed_machine_had_left_is_measured_by_the_other(self, workers, session, store, tamper, caplog, tmp_path):
        diary = tmp_path / "begun"

        def first(spec, diary=str(diary)):
            with open(diary, "a") as file:
                file.write(f"{ray.get_runtime_context().get_node_id()} {os.getpid()} {spec.key()}\n")
            time.sleep(0.3)

        tamper(first)
        specs = [spec.but(limit=50) for spec in SPECS]  # measured in one go
        found: list[Result | Failure] = []
        hit = ""
        for result in driver.sweep_on_cluster(specs, session, store):
            found.append(result)
            if not hit:
                node, pid, hit = next(line.split(" ", 2) for line in new_lines(diary) if '"merge": "drop"' in line)
                workers.remove_node(next(n for n in workers.worker_nodes if n.node_id == node), allow_graceful=False)
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)  # in the first of its two points
        assert numbers(last(found)) == numbers(last(local.sweep(specs, session)))
        assert store.get((spec, origin(spec, session)) for spec in specs) == last(found)
        assert len({line.split()[0] for line in diary.read_text().splitlines() if line.endswith(hit)}) == 2
        lost = [record.message for record in caplog.records if "a worker was lost" in record.message]
        assert any("retrying its 2 points (1 of 3)" in line for line in lost)
        assert len(found) == len(specs)


class TestConnecting:
    def test_no_ray_is_one_line(self, session, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(itf.IntrafusionError, match=r"Ray is not installed; run pip install 'intrafusion\[ray\]'"):
            list(driver.sweep_on_cluster(SPECS, session))

    def test_the_version_asked_for_is_the_one_tested(self):
        assert f"ray=={ray.__version__}" == connection.RAY
        assert f'"{connection.RAY}"' in (paths.ASSETS.parent / "pyproject.toml").read_text()

    @pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "127.0.0.1:99999", "nonsense", "ray://a:1"])
    def test_an_address_where_no_cluster_is_is_one_line(self, session, address):
        ray.shutdown()
        with pytest.raises(itf.IntrafusionError, match="Ray") as caught:
            list(driver.sweep_on_cluster(SPECS, session, address=address))
        assert "\n" not in str(caught.value)
        assert not ray.is_initialized()

    def test_an_address_that_does_not_answer_is_given_up(self, session, monkeypatch):
        ray.shutdown()
        monkeypatch.setattr(connection, "_CONNECT", 2.0)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
            with pytest.raises(itf.IntrafusionError, match=r"no Ray cluster answers at .* \(no answer in 2 s\)"):
                list(driver.sweep_on_cluster(SPECS, session))

    def test_a_cluster_is_joined_by_its_address_and_left(self, machines):
        ray.shutdown()
        with connection.SESSION.ray(machines.address, 0):
            assert ray.get_runtime_context().gcs_address == machines.address
            assert not connection.SESSION.alone
        assert not ray.is_initialized()

    def test_without_an_address_ray_starts_here_and_ends_with_the_study(self, session, monkeypatch):
        ray.shutdown()
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        looks = driver.sweep_on_cluster(SPECS[:2], session)
        first = threading.Thread(target=next, args=[looks])  # as in a page, where studies come and go in threads
        first.start()
        first.join()
        with pytest.raises(itf.IntrafusionError, match="no machine"):  # a second study joins in, and leaves Ray running
            list(driver.sweep_on_cluster(SPECS, session, num_cpus=1000))
        assert ray.is_initialized()
        assert set(last(looks)) == {*SPECS[:2]}
        assert not ray.is_initialized()


def test_a_worker_has_the_images_that_recoveries_learn_from(session):
    from intrafusion.studies.cluster.worker import Parts

    spec = BASE.but(recovery="perp-head", merge="calibrated", training=100)
    sent = Parts.of(session, [spec]).session("cpu")
    for ours, theirs in (
        (sent.training(spec), session.training(spec)),
        (sent.calibration(spec), session.calibration(spec)),
    ):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
