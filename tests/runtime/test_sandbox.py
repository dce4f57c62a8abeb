"""Child processes for strangers' files: whatever happens in one is a line, in bounded time, and leaves nothing."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import own_files as files
import pytest

import intrafusion as itf
from intrafusion.models import hub
from intrafusion.runtime import sandbox
from intrafusion.runtime.cancellation import Cancelled, stoppable
from intrafusion.runtime.paths import home
from intrafusion.runtime.sandbox import MIB, Limits, drained, steps
from intrafusion.studies.uploads import take_data, take_program, take_weights

pytestmark = [
    pytest.mark.usefixtures("child"),
    pytest.mark.skipif(sys.platform != "linux", reason="limits and namespaces are Linux's"),
]
SMALL = Limits(seconds=2, grow=200 * MIB, file=4 * MIB, wall=30)


def child_of(folder: Path, task: str, limits: Limits = SMALL, **arguments):
    return steps(f"confined_tasks:{task}", folder, "x.pt2", limits, arguments, lambda line: None)


def marked(folder: Path) -> list[int]:
    return [int(path.name[3:]) for path in folder.glob("pid*")]


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_task_gets_its_arguments_tells_how_far_it_is_and_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_SERVER", "1")
    seen = []
    answer = drained(child_of(tmp_path, "tells", given=[1, "a", None]), lambda *step: seen.append(step))
    assert (answer["given"], seen) == ([1, "a", None], [(1, 2)])
    assert answer["temporary"] == str(tmp_path / "tmp")
    assert answer["flags"] == 1
    assert "SECRET_OF_THE_SERVER" not in answer["environment"]


HOSTILE = {
    "loops": "rejected x.pt2: checking it took more than 2 s of processor time",
    "allocates": "rejected x.pt2: checking it takes more than 200 MiB of memory",
    "allocates_and_hides_it": "more than 200 MiB",
    "shares_memory": "more than 200 MiB",
    "crashes": "rejected x.pt2: the process that checked it was killed (signal 11)",
    "kills_itself": "(signal 9)",
    "writes": "rejected x.pt2: cannot read it (OSError: [Errno 27] File too large)",
    "opens_files": "(OSError: [Errno 24] Too many open files",
    "prints": "rejected x.pt2: the process that checked it ended without a result",
    "prints_without_end": "without a result",
    "says_nonsense": "without a result",
    "says_deep_nonsense": "without a result",
    "leaves": "without a result",
    "answers_no_json": "without a result",
    "fails": "(TypeError: of no use)",
}


@pytest.mark.parametrize("task", HOSTILE)
def test_whatever_a_child_does_is_one_line(tmp_path, task):
    with pytest.raises(itf.IntrafusionError) as caught:
        drained(child_of(tmp_path, task))
    assert HOSTILE[task] in str(caught.value)
    assert str(caught.value).isprintable()
    (pid,) = marked(tmp_path)
    assert not runs(pid)
    assert (tmp_path / "large").stat().st_size <= SMALL.file if task == "writes" else True


def test_one_that_waits_is_ended_by_the_clock(tmp_path):
    with pytest.raises(itf.IntrafusionError, match="took more than 1 s"):
        drained(child_of(tmp_path, "waits", Limits(wall=1)))
    assert not any(map(runs, marked(tmp_path)))


def test_what_it_starts_ends_with_it(tmp_path):
    with contextlib.suppress(itf.IntrafusionError):  # whoever is not root may start nothing
        assert drained(child_of(tmp_path, "forks")) == "forked"
    assert marked(tmp_path)
    until(lambda: not any(map(runs, marked(tmp_path))))


def test_it_reaches_nothing_by_the_network(tmp_path):
    if not sandbox.is_alone():
        pytest.skip("this system permits no namespace")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        with pytest.raises(itf.IntrafusionError, match="Network is unreachable"):
            drained(child_of(tmp_path, "connects", port=server.getsockname()[1]))
        with pytest.raises(TimeoutError):
            server.accept()


def _has_landlock() -> bool:
    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) >= 3  # since when it knows of cutting files


@pytest.mark.skipif(not _has_landlock(), reason="this system has no Landlock of version 3")
def test_it_changes_nothing_outside_its_folder(tmp_path):
    (tmp_path / "child").mkdir()
    (tmp_path / "there").write_text("as it was")
    done = drained(child_of(tmp_path / "child", "writes_elsewhere", place=str(tmp_path)))
    assert done == ["own", "own, moved", "null", "read"]
    assert (tmp_path / "there").read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child", "there"]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="nothing to compare with")
def test_whether_it_is_alone_is_known():
    permitted = subprocess.run(["unshare", "--user", "--net", "true"], capture_output=True).returncode == 0
    assert sandbox.is_alone() == permitted


def test_cancelling_ends_it(tmp_path):
    stop, ended = threading.Event(), []

    def work() -> None:
        with stoppable(stop):
            try:
                drained(child_of(tmp_path, "waits"))
            except Cancelled:
                ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: marked(tmp_path))
    stop.set()
    thread.join(30)
    assert ended == [True]
    assert not any(map(runs, marked(tmp_path)))


def test_two_run_at_a_time_and_a_third_waits(tmp_path):
    stop, folders = threading.Event(), [tmp_path / str(number) for number in range(3)]

    def work(folder: Path) -> None:
        with stoppable(stop), pytest.raises(Cancelled):
            drained(child_of(folder, "waits"))

    threads = []
    for folder in folders:
        folder.mkdir()
        threads.append(threading.Thread(target=work, args=(folder,)))
        threads[-1].start()
        if len(threads) <= sandbox.CHILDREN:
            until(lambda: marked(folder))  # noqa: B023
    time.sleep(0.5)
    assert not (folders[-1] / "request.json").exists()
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert drained(child_of(folders[-1], "tells", given=1))["given"] == 1  # places are given back


def test_it_ends_with_a_parent_that_is_killed(tmp_path):
    code = (  # the package without its parts, which take seconds to import
        "import sys, types; m = types.ModuleType('intrafusion'); m.__path__ = [sys.argv[1]]; sys.modules['intrafusion'] = m\n"
        "from pathlib import Path; from intrafusion.runtime.sandbox import Limits, drained, steps\n"
        "drained(steps('confined_tasks:waits', Path(sys.argv[2]), 'x', Limits(), {}, print))"
    )
    where = os.pathsep.join(sys.path)
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(sandbox.__file__).parents[1]), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": where},
    )
    until(lambda: marked(tmp_path))
    assert all(map(runs, marked(tmp_path)))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not any(map(runs, marked(tmp_path))))


def test_what_a_child_hands_back_is_kept_and_nothing_else_stays(tmp_path):
    program = files.export(files.network(), tmp_path / "net.pt2")
    weights = files.save_state(tmp_path / "w.pt", {"ema": files.mlp_state()})
    assert take_program(program, "net") == "kept/net"
    assert take_weights(weights, "digits-mlp", "w") == "kept/w"
    assert take_data([files.pictures(tmp_path / "x.zip")], "x") == "kept/x"
    assert hub.load_model("kept/w").card.source == "weights w.pt"
    with pytest.raises(itf.IntrafusionError, match=r"^y\.pt has no state dict"):
        take_weights(files.save_state(tmp_path / "y.pt", [1]), "digits-mlp", "y")
    assert sorted(path.name for path in home().iterdir()) == ["images", "models"]
