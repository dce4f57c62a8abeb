"""The dashboard as it is served: when it says that it is ready, who gets in, and what the bytes that it sends hold."""

import http.client
import os
import re
import socket
import subprocess
import sys
import time

import pytest
from places import ROOT
from visiting import alerts, copied, dashboard, visitor

from pages.shared.client_address import is_loopback

PAGES = (
    "", "learn", "importance", "transport", "curves", "sensitivity", "recovery", "training_lab", "landscape", "export",
    "your_own", "docs",
)  # fmt: skip
SECRET = "/srv/secret/of/the/server"
UPLOAD = "/_stcore/upload_file/nobody/1"
STREAM = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}  # fmt: skip
NOTES_LOOKUPS = """
import pathlib, sys
lookups = pathlib.Path(__file__).with_name("lookups")
lookups.touch()

def note(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
        with lookups.open("a") as file:
            print(args[1] if event == "socket.connect" else args[0], file=file)

sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A dashboard that all may reach, with one folder for its visitors."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "sitecustomize.py").write_text(NOTES_LOOKUPS)
    (folder / "open to all").mkdir()
    roots = {"INTRAFUSION_ROOTS": str(folder / "open to all"), "INTRAFUSION_UPLOAD_MB": "2"}
    roots["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    with dashboard(folder, "--server.address=0.0.0.0", **roots) as server:
        yield server


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A dashboard for this machine, three pages of which fail as nobody expects: a script, a fragment, a callback."""
    app = copied(tmp_path_factory.mktemp("app"))
    (app / "pages" / "learn.py").write_text(f"raise RuntimeError('no file at {SECRET}')\n")
    (app / "pages" / "landscape.py").write_text(
        "import streamlit as st\nfrom intrafusion import IntrafusionError\n\n"
        "@st.fragment\ndef fails(error):\n    st.info('so far')\n    if 'again' in st.session_state:\n        raise error\n\n"
        f"fails(IntrafusionError('choose another'))\nfails(OSError('{SECRET}'))\nst.session_state.again = True\n"
    )
    (app / "pages" / "recovery.py").write_text(
        f"import streamlit as st\n\ndef fails():\n    raise RuntimeError('{SECRET}')\n\nst.button('Press', on_click=fails)\n"
    )
    with dashboard(tmp_path_factory.mktemp("broken"), app=app) as server:
        yield server


def reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def status(server, path: str, host: bytes, **headers: str) -> int:
    """The status of the answer to a request that is sent as it is."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\n{lines}Host: ".encode() + host + b"\r\n\r\n")
        return int(connection.recv(100).split()[1])


def test_health_is_ready_once_the_default_model_has_answered(broken):
    code, said = broken.get("/health")
    assert (code, said) == (503, '{"status":"starting"}') or code == 200
    assert broken.until_health("ready")["seconds"] > 0
    assert broken.get("/health")[0] == 200
    assert [one["event"] for one in broken.events()][:2] == ["server started", "server ready"]


def test_a_damaged_default_model_never_says_ready(tmp_path):
    app = copied(tmp_path / "app")
    weights = app / "assets" / "digits-resnet.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with dashboard(tmp_path, app=app) as server:
        said = server.until_health("failed")
        assert set(said) == {"status", "id"}  # and neither paths nor a traceback
        time.sleep(0.5)
        assert server.get("/health")[0] == 503
        (error,) = server.until_events("error", 1)
        assert (error["id"], error["where"]) == (said["id"], "start")
        assert "digits-resnet.safetensors" in error["traceback"]


def test_a_number_of_proxies_that_is_none_ends_the_start_in_one_line():
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"INTRAFUSION_PROXIES": "two"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: INTRAFUSION_PROXIES must be the number of proxies in front, not 'two'"]


class TestErrors:
    def test_of_a_page_is_one_line_and_the_log_has_the_rest_under_its_id(self, broken):
        with visitor(broken) as reader:
            (said,) = alerts(reader.open(page="learn"))
        id = re.fullmatch(
            r"Something went wrong \(id ([0-9a-f]{8})\)\. The details are in the server's log under this id\.", said
        )[1]
        (error,) = [one for one in broken.events() if one.get("id") == id]
        assert (error["where"], error["type"]) == ("page", "RuntimeError")
        assert SECRET in error["traceback"]
        self._tells_nothing(reader)

    def test_of_a_fragment_is_one_line_as_well(self, broken):
        with visitor(broken) as reader:
            fragments = dict.fromkeys(m.delta.fragment_id for m in reader.open(page="landscape") if m.delta.fragment_id)
            ours, unexpected = (alerts(reader.again(fragment)) for fragment in fragments)
        assert ours == ["so far", "choose another"]
        assert unexpected[0] == "so far"
        assert unexpected[1].startswith("Something went wrong (id ")
        self._tells_nothing(reader)

    def test_of_a_callback_too(self, broken):
        with visitor(broken) as reader:
            assert alerts(reader.open(page="recovery")) == []
            (said,) = alerts(reader.press("Press", "recovery"))
        assert said.startswith("Something went wrong (id ")
        self._tells_nothing(reader)

    @staticmethod
    def _tells_nothing(reader):
        sent = b"".join(message.SerializeToString() for message in reader.messages)
        assert SECRET.encode() not in sent
        assert b"Traceback" not in sent
        assert b"RuntimeError" not in sent


class TestBoundToThisMachine:
    def test_it_listens_here_alone(self, broken):
        assert reaches("127.0.0.1", broken.port)
        assert not reaches("127.0.0.2", broken.port)  # another address of the same loopback

    def test_a_request_for_another_host_is_refused(self, broken):
        assert broken.get("/", Host="evil.example")[0] == 403
        assert broken.get("/", Host=f"localhost:{broken.port}")[0] == 200
        assert broken.get("/_stcore/stream", Host="evil.example", Origin="http://evil.example", **STREAM)[0] == 403

    def test_a_path_may_be_anywhere(self, broken, tmp_path):
        with visitor(broken) as reader:
            assert alerts(reader.open(f"weights={tmp_path}/w.pt"))[0].startswith(f"no file at {tmp_path}")

    @pytest.mark.parametrize("token", [None, "made up"])
    def test_an_upload_without_the_token_is_refused(self, broken, token):
        headers = {} if token is None else {"X-Xsrftoken": token, "Cookie": f"_streamlit_xsrf={token}"}
        assert broken.get(UPLOAD, "PUT", b"x", **headers)[0] == 403

    def test_no_telemetry(self, broken):
        with visitor(broken) as reader:
            session = next(m.new_session for m in reader.open() if m.WhichOneof("type") == "new_session")
        assert not session.config.gather_usage_stats


class TestBoundWider:
    def test_others_reach_it(self, wide):
        assert reaches("127.0.0.2", wide.port)
        assert wide.get("/", Host="dashboard.example")[0] == 200

    def test_a_page_elsewhere_is_refused_and_no_name_is_looked_up(self, wide):
        wide.until_health("ready")
        ours, *others = (
            status(wide, "/_stcore/stream", b"localhost", Origin=f"http://{name}", **STREAM)
            for name in ("localhost", "evil.example", "[", "localhost:1")
        )
        assert (ours, others) == (101, [403] * 3)
        lookups = (wide.errors.parent / "lookups").read_text()
        assert not re.search(r"8\.8\.8\.8|amazonaws|evil", lookups), lookups

    @pytest.mark.parametrize("host", [b"[", b"[]", b"a:b", b"a@b", b"\xff", b"a\r\nHost: b", b"a\x01", b"a\x7f"])
    def test_a_malformed_host_is_400_and_no_traceback(self, wide, host):
        wide.until_health("ready")
        assert status(wide, "/health", host) == status(wide, "/_stcore/stream", host, **STREAM) == 400
        assert "raceback" not in wide.errors.read_text()

    def test_a_websocket_with_headers_that_are_too_long_is_told_so(self, wide):
        wide.until_health("ready")
        assert status(wide, "/_stcore/stream", b"localhost", **STREAM, Cookie="a" * 20_000) == 431

    def test_no_path_of_the_server_is_in_any_byte_that_the_pages_send(self, wide):
        wide.until_health("ready")
        for page in PAGES:
            with visitor(wide) as reader:
                reader.open(page=page)
                assert not alerts(reader.messages), page
                sent = b"".join(message.SerializeToString() for message in reader.messages)
            found = re.search(rb".{0,60}((?<!:material)/(root|home|tmp|usr|opt)\b|site-packages|Traceback).{0,60}", sent)
            assert found is None, (page, found)
        for path in (
            "/",
            "/health",
            "/nothing",
            "/_stcore/host-config",
            "/_stcore/metrics",
            "/_stcore/agent/openapi.json",
        ):
            assert not re.search(r"(?<!:material)/(root|home|tmp|usr)/|site-packages", wide.get(path)[1]), path

    @pytest.mark.parametrize("query", ["weights={}", "data_path={}", "model=digits-mlp&weights={}"])
    def test_a_link_to_a_file_elsewhere_is_refused_alike_whether_it_is_there_or_not(self, wide, query, tmp_path):
        there, gone = tmp_path / "there.npz", tmp_path / "gone.npz"
        there.touch()
        with visitor(wide) as reader:
            said = [alerts(reader.open(query.format(path)))[0].replace(path.name, "FILE") for path in (there, gone)]
        assert said[0] == said[1]
        assert said[0].endswith("this server only opens files in the folders it was started with")

    def test_a_file_of_the_folder_may_be_named_and_so_may_weights(self, wide):
        with visitor(wide) as reader:
            (said,) = alerts(reader.open(f"weights={wide.errors.parent}/open to all/w.pt"))
            assert said.startswith("no file at")
            assert not alerts(reader.open("weights=random"))

    def test_no_code_is_offered(self, wide):
        with visitor(wide) as reader:
            sent = b"".join(message.SerializeToString() for message in reader.open(page="your_own"))
        assert b"At most 2 MiB, and 20 files per minute" in sent
        assert b"made by code" not in sent
        assert b"my_net:make" not in sent

    def test_uploads_are_bound_in_size_and_rate(self, wide):
        wide.until_health("ready")
        assert self._upload(wide, 4 << 20)[0] == 413
        assert self._upload(wide, None)[0] == 411
        codes = [self._upload(wide, 10, f"10.0.0.{number}")[0] for number in range(20)]  # which nobody believes
        assert codes == [403] * 20  # no widget asked for them
        code, words, wait = self._upload(wide, 10)
        assert code == 429
        assert words == f"Too many uploads: try again in {wait} seconds."
        assert 1 <= int(wait) <= 61
        assert [one["status"] for one in wide.until_events("upload refused", 23)] == [413, 411, *codes, 429]

    def test_what_no_widget_asked_for_is_not_taken(self, wide):
        wide.until_health("ready")
        health = http.client.HTTPConnection("127.0.0.1", wide.port, timeout=30)
        health.request("GET", "/_stcore/health")
        token = re.search("_streamlit_xsrf=([^;]+)", health.getresponse().headers["Set-Cookie"])[1]
        health.close()

        def put(address):
            body = b'--B\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\nx\r\n--B--\r\n'
            headers = {"X-Xsrftoken": token, "Cookie": f"_streamlit_xsrf={token}"}
            connection = http.client.HTTPConnection("127.0.0.1", wide.port, 30, ("127.0.0.5", 0))
            connection.request("PUT", address, body, headers | {"Content-Type": "multipart/form-data; boundary=B"})
            code = connection.getresponse().status
            connection.close()
            return code

        with visitor(wide) as reader:
            reader.open(page="overview")
            assert put(reader.upload_place().upload_url) == 403
            reader.open(page="your_own")
            address = reader.upload_place().upload_url
            assert [put(address), put(address), put(f"{address}0")] == [204, 403, 403]

    @staticmethod
    def _upload(server, size, forwarded="9.9.9.9"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        try:
            connection.putrequest("PUT", UPLOAD)
            connection.putheader("X-Forwarded-For", forwarded)
            connection.putheader(*(("Transfer-Encoding", "chunked") if size is None else ("Content-Length", str(size))))
            connection.endheaders()
            if size is not None and size < 100:
                connection.send(b"x" * size)
            response = connection.getresponse()
            return response.status, response.read().decode(), response.headers.get("Retry-After")
        finally:
            connection.close()

    def test_the_log_has_a_line_for_each_job_and_point(self, wide):
        with visitor(wide) as reader:
            reader.open("model=digits-mlp", page="curves")
            title = "curve of digits-mlp"
            deadline = time.monotonic() + 120
            while not (ended := [e for e in wide.events() if e["event"] == "job ended" and e["title"] == title]):
                assert time.monotonic() < deadline
                time.sleep(0.2)
        points = [e for e in wide.events() if e["event"] == "point" and e["model"] == "digits-mlp"]
        assert ended[0]["state"] == "done"
        assert len(points) == len({point["key"] for point in points}) == 18
        assert {"time", "level", "merge", "sparsity", "accuracy", "count", "seconds"} <= set(points[0])


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("localhost", True), ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("0.0.0.0", False), ("::", False),
        ("", False), (None, False), ("192.168.1.2", False), ("myhost", False), ("localhost.evil.example", False),
    ],
)  # fmt: skip
def test_what_is_this_machine_alone(address, loopback):
    assert is_loopback(address) is loopback
