import hashlib
import io
import pickle
import socket
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from own_files import Touch

import intrafusion as itf
from intrafusion.data import datasets
from intrafusion.models import hub
from intrafusion.models.architectures import ResNet
from intrafusion.models.sources import builtin
from intrafusion.runtime.download import fetch, stream

BODY = bytes(range(256)) * 2500  # three chunks
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers each path with the raw bytes that `replies` holds for it; None stalls until the test is over."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: dict[str, bytes | None] = {}
        self.asked: list[str] = []
        self.over = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        reply = self.server.replies[self.path]
        if reply is None:
            self.server.over.wait(30)
        else:
            self.wfile.write(reply)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def ok(body: bytes, length: int | None = None) -> bytes:
    return b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body) if length is None else length, body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def url(server: Server) -> str:
    server.replies["/file.bin"] = ok(BODY)
    return server.url("/file.bin")


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("sha256", ["", DIGEST[:8], DIGEST], ids=["no digest", "beginning", "whole digest"])
def test_download_arrives_whole_in_a_new_folder_and_reports_progress(url, tmp_path, sha256):
    seen: list[tuple[int, int]] = []
    path = tmp_path / "new" / "folder" / "file.bin"
    assert fetch(url, path, sha256, lambda done, total: seen.append((done, total))) == path
    assert path.read_bytes() == BODY
    assert left_in(tmp_path) == ["file.bin"]
    assert len(seen) > 1
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (len(BODY), len(BODY))
    assert {total for _, total in seen} == {len(BODY)}


def test_total_is_zero_when_the_server_does_not_say(server, tmp_path):
    server.replies["/file.bin"] = b"HTTP/1.0 200 OK\r\n\r\n" + BODY
    seen = list(stream(server.url("/file.bin"), tmp_path / "file.bin", DIGEST))
    assert seen[-1] == (len(BODY), 0)
    assert (tmp_path / "file.bin").read_bytes() == BODY


def test_file_that_is_there_is_not_asked_for_again(server, url, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"mine")
    assert fetch(url, path, DIGEST) == path
    assert path.read_bytes() == b"mine"
    assert server.asked == []


BROKEN = {
    "not found": b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "server error": b"HTTP/1.0 503 Service Unavailable\r\n\r\n",
    "truncated": ok(BODY, len(BODY) + 10),
    "empty but announced": ok(b"", 10),
    "truncated chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nhello",
    "not HTTP": b"good morning\r\n\r\n",
    "no answer": b"",
    "stalled": None,
}


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN)
def test_broken_answer_is_one_line_and_leaves_nothing(server, tmp_path, reply):
    server.replies["/file.bin"] = reply
    url = server.url("/file.bin")
    with pytest.raises(itf.IntrafusionError) as caught:
        list(stream(url, tmp_path / "file.bin", timeout=0.3))
    assert "\n" not in str(caught.value)
    assert url in str(caught.value)
    assert left_in(tmp_path) == []


def test_wrong_checksum_is_one_line_and_leaves_nothing(url, tmp_path):
    with pytest.raises(itf.IntrafusionError, match="checksum") as caught:
        fetch(url, tmp_path / "file.bin", "0" * 8)
    assert "\n" not in str(caught.value)
    assert DIGEST[:16] in str(caught.value)
    assert left_in(tmp_path) == []


def test_refused_connection_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file.bin"
    with pytest.raises(itf.IntrafusionError, match="cannot download") as caught:
        fetch(url, tmp_path / "file.bin")
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == []


def test_cancelling_midway_leaves_nothing(url, tmp_path):
    progress = stream(url, tmp_path / "file.bin")
    done, total = next(progress)
    assert 0 < done < total
    assert len(left_in(tmp_path)) == 1
    progress.close()
    assert left_in(tmp_path) == []


def test_download_can_be_tried_again_after_a_failure(server, url, tmp_path):
    server.replies["/file.bin"] = ok(BODY, len(BODY) + 10)
    with pytest.raises(itf.IntrafusionError):
        fetch(url, tmp_path / "file.bin", DIGEST)
    server.replies["/file.bin"] = ok(BODY)
    assert fetch(url, tmp_path / "file.bin", DIGEST).read_bytes() == BODY


def test_parent_that_is_a_file_is_one_line(server, url, tmp_path):
    (tmp_path / "taken").write_text("a file")
    for path in (tmp_path / "taken" / "file.bin", tmp_path / "taken" / "deeper" / "file.bin"):
        with pytest.raises(itf.IntrafusionError, match="cannot download") as caught:
            fetch(url, path)
        assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == ["taken"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root may write to")
def test_unwritable_folder_is_one_line(url):
    with pytest.raises(itf.IntrafusionError, match="cannot download") as caught:
        fetch(url, Path("/proc/intrafusion/file.bin"))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_one_line_and_leaves_nothing(url, tmp_path, monkeypatch):
    part = tmp_path / ".file.bin.part"
    part.symlink_to("/dev/full")
    monkeypatch.setattr("intrafusion.runtime.download.part_of", lambda path: part)
    with pytest.raises(itf.IntrafusionError, match="No space left") as caught:
        fetch(url, tmp_path / "file.bin")
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == []


class TestRelease:
    """Published CIFAR weights, as chenyaofo spells them: `downsample` and `fc`."""

    name = "cifar10-resnet32"

    @pytest.fixture(autouse=True)
    def _release(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_weights) -> None:
        torch.manual_seed(0)
        self.network = random_weights(ResNet(5, (16, 32, 64), 10, shortcut="projection"))
        theirs = {
            key.replace(".shortcut.", ".downsample.").replace("linear.", "fc."): value
            for key, value in self.network.state_dict().items()
        }
        buffer = io.BytesIO()
        torch.save(theirs, buffer)
        file = f"resnet/cifar10_resnet32-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pt"
        server.replies[f"/releases/{file}"] = ok(buffer.getvalue())
        monkeypatch.setitem(builtin._RELEASES, self.name, file)
        monkeypatch.setattr(builtin, "_CHENYAOFO", server.url("/releases"))
        monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path))

    def test_load_model_downloads_once_and_renames_the_keys(self, server, tmp_path):
        seen: list[tuple[int, int]] = []
        assert not hub.is_local(self.name)
        model = itf.load_model(self.name, progress=lambda done, total: seen.append((done, total)))
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(model(images), self.network(images))
        assert seen[-1][0] == seen[-1][1] > 0
        assert hub.is_local(self.name)
        itf.load_model(self.name)
        assert len(server.asked) == 1

    def test_card_has_the_normalisation_of_the_release(self):
        card = itf.load_model(self.name).card
        assert card.mean == (0.4914, 0.4822, 0.4465)
        assert card.std == (0.2023, 0.1994, 0.2010)
        assert "chenyaofo" in card.source
        assert card.licence

    def test_stream_weights_fetches_what_load_model_reads(self, server):
        done, total = list(hub.stream_weights(self.name))[-1]
        assert done == total
        itf.load_model(self.name)
        assert len(server.asked) == 1

    def test_exchanged_weights_are_refused_and_not_kept(self, server, tmp_path):
        (path,) = server.replies
        server.replies[path] = ok(BODY)
        with pytest.raises(itf.IntrafusionError, match="checksum"):
            itf.load_model(self.name)
        assert left_in(tmp_path) == []


class TestCifarArchive:
    """torchvision's layout with two images a batch."""

    @pytest.fixture(autouse=True)
    def _archive(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision.datasets import CIFAR10

        self.pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
        files: dict[str, object] = {"batches.meta": {"label_names": list(datasets.CIFAR10_CLASSES)}}
        for number, (name, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list]):
            rows = slice(2 * number, 2 * number + 2)
            files[name] = {"data": self.pixels[rows].reshape(2, -1), "labels": [number, number + 1]}
        packed = {name: pickle.dumps(content) for name, content in files.items()}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, content in packed.items():
                entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        self.archive = buffer.getvalue()

        def md5(content: bytes) -> str:
            return hashlib.md5(content).hexdigest()

        class Tiny(CIFAR10):
            url = server.url("/cifar-10-python.tar.gz")
            tgz_md5 = md5(self.archive)
            train_list = [[name, md5(packed[name])] for name, _ in CIFAR10.train_list]  # noqa: RUF012
            test_list = [[name, md5(packed[name])] for name, _ in CIFAR10.test_list]  # noqa: RUF012
            meta = CIFAR10.meta | {"md5": md5(packed["batches.meta"])}

        server.replies["/cifar-10-python.tar.gz"] = ok(self.archive)
        monkeypatch.setattr(datasets, "_cifar_class", lambda name: Tiny)
        monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path / "home"))

    @pytest.mark.parametrize(("split", "rows", "labels"), [
        ("train", slice(0, 10), [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]),
        ("test", slice(10, 12), [5, 6]),
    ])  # fmt: skip
    def test_download_is_unpacked_and_read(self, server, capsys, split, rows, labels):
        images = itf.load_data("cifar10", split, download=True)
        assert np.array_equal(images.images.numpy(), self.pixels[rows])
        assert images.labels.tolist() == labels
        assert images.classes == datasets.CIFAR10_CLASSES
        assert capsys.readouterr().out == ""  # stdout belongs to `--json`
        itf.load_data("cifar10", split)
        itf.load_data("cifar10", split, download=True)
        assert len(server.asked) == 1

    def test_archive_lies_where_load_data_looks(self, server):
        assert list(datasets.stream_cifar("cifar10"))[-1] == (len(self.archive), len(self.archive))
        assert len(itf.load_data("cifar10")) == 2
        assert len(server.asked) == 1

    def test_torchvision_folder_is_a_path(self, tmp_path, server):
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "cifar-10-python.tar.gz").write_bytes(self.archive)
        assert len(itf.load_data("cifar10", "train", path=folder)) == 10
        assert server.asked == []

    @pytest.fixture
    def batches(self, tmp_path):
        """The folder of the batches, unpacked."""
        with tarfile.open(fileobj=io.BytesIO(self.archive)) as archive:
            archive.extractall(tmp_path / "mine", filter="data")
        return tmp_path / "mine" / "cifar-10-batches-py"

    @pytest.mark.parametrize("place", ["itself", "around it", "renamed", "current directory"])
    def test_the_folder_of_the_batches_is_a_path(self, batches, monkeypatch, place):
        path = batches
        if place == "around it":
            path = batches.parent
        if place == "renamed":
            path = batches.rename(batches.with_name("my batches"))
        if place == "current directory":
            monkeypatch.chdir(batches)
            path = Path()
        images = itf.load_data("cifar10", path=path)
        assert np.array_equal(images.images.numpy(), self.pixels[10:])
        assert (images.labels.tolist(), images.classes) == ([5, 6], datasets.CIFAR10_CLASSES)
        assert itf.load_calibration("cifar10", path, limit=None).labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]

    @pytest.mark.parametrize("name", ["test_batch", "data_batch_3", "batches.meta"])
    def test_batches_of_another_checksum_are_never_unpickled(self, batches, tmp_path, name):
        (batches / name).write_bytes(pickle.dumps(Touch(tmp_path / "sentinel")))
        for path in (batches, batches.parent):
            with pytest.raises(itf.IntrafusionError, match="no usable cifar10") as caught:
                itf.load_data("cifar10", path=path)
            assert "\n" not in str(caught.value)
        assert not (tmp_path / "sentinel").exists()

    def test_nothing_is_downloaded_unasked(self, server):
        with pytest.raises(itf.IntrafusionError, match="download=True") as caught:
            itf.load_data("cifar10")
        assert "\n" not in str(caught.value)
        assert server.asked == []

    def test_damaged_archive_is_refused_without_a_download(self, server, tmp_path):
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "cifar-10-python.tar.gz").write_bytes(self.archive[:-20])
        with pytest.raises(itf.IntrafusionError) as caught:
            itf.load_data("cifar10", path=folder)
        assert "\n" not in str(caught.value)
        assert server.asked == []

    def test_failed_download_is_one_line_and_leaves_nothing(self, server, tmp_path):
        server.replies["/cifar-10-python.tar.gz"] = ok(self.archive, len(self.archive) + 1)
        with pytest.raises(itf.IntrafusionError, match="cannot download") as caught:
            itf.load_data("cifar10", download=True)
        assert "\n" not in str(caught.value)
        assert left_in(tmp_path) == []
