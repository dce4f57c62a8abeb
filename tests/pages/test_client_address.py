"""Whose request it is, which host it names, and whether it comes from a page of ours: nothing is looked up."""

import socket

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse

from pages.shared.client_address import host_and_port, is_ours, proxies, reader
from pages.shared.request_guard import Door, KeepsPeer

FORWARDED = [
    (0, "127.0.0.1", ["9.9.9.9"], "127.0.0.1"),
    (0, "8.8.8.8", ["9.9.9.9"], "8.8.8.8"),
    (1, "127.0.0.1", ["9.9.9.9, 1.2.3.4"], "1.2.3.4"),  # who connected may have written the first one
    (1, "127.0.0.1", ["9.9.9.9", "1.2.3.4"], "1.2.3.4"),
    (1, "10.0.0.7", ["1.2.3.4:5555"], "1.2.3.4"),
    (1, "127.0.0.1", [], "127.0.0.1"),
    (1, "127.0.0.1", ["", "nobody"], "127.0.0.1"),
    (1, "127.0.0.1", ["9.9.9.9, "], "127.0.0.1"),
    (1, "8.8.8.8", ["1.2.3.4"], "8.8.8.8"),  # no proxy of ours
    (2, "127.0.0.1", ["9.9.9.9, 1.2.3.4, 10.0.0.1"], "1.2.3.4"),
    (2, "127.0.0.1", ["1.2.3.4"], "1.2.3.4"),
    (1, "::1", ["[2001:db8:1:2:3:4:5:6]:80"], "2001:db8:1:2::/64"),
    (0, "2001:db8:1:2:ffff::1", [], "2001:db8:1:2::/64"),
    (0, "fe80::1%eth0", [], "fe80::/64"),
    (0, "::ffff:1.2.3.4", [], "1.2.3.4"),
    (0, "", [], ""),
    (1, "", ["1.2.3.4"], "1.2.3.4"),  # a proxy at a Unix socket
]


@pytest.mark.parametrize(("count", "peer", "forwarded", "address"), FORWARDED)
def test_limits_hold_for_whom_the_outermost_proxy_of_ours_heard(count, peer, forwarded, address, monkeypatch):
    monkeypatch.setenv("INTRAFUSION_PROXIES", str(count))
    assert reader(peer, forwarded) == address


def test_no_proxy_is_believed_unless_it_is_said_and_a_bad_number_is_told(monkeypatch):
    monkeypatch.delenv("INTRAFUSION_PROXIES", raising=False)
    assert proxies() == 0
    monkeypatch.setenv("INTRAFUSION_PROXIES", "-1")
    with pytest.raises(ValueError, match="INTRAFUSION_PROXIES must be the number of proxies in front, not '-1'"):
        proxies()


MALFORMED = (
    "[", "[]", "]", "[::1", "::1", "[::1]x", "[::1]:", "[1.2.3.4]", "[::1%eth0]:80:80", "a:", "a:b", "a:0", "a:65536", "a:-1",
    "a:123456", "a b", "a\tb", "a/b", "a@b", "a,b", "a\\b", "a?b", "a#b", "ä", "a\x01", "", " ", "a" * 254, "a:٣",
)  # fmt: skip


@pytest.mark.parametrize("host", MALFORMED)
def test_a_malformed_host_is_told(host):
    with pytest.raises((ValueError, AttributeError)):
        host_and_port(host)


@pytest.mark.parametrize(
    ("host", "parts"),
    [
        ("localhost", ("localhost", None)), ("LocalHost:8501", ("localhost", 8501)), ("[::1]:80", ("::1", 80)),
        ("[0:0::1]", ("::1", None)), ("1.2.3.4:1", ("1.2.3.4", 1)), ("my_host.example.", ("my_host.example.", None)),
    ],
)  # fmt: skip
def test_a_host_is_a_name_and_a_port(host, parts):
    assert host_and_port(host) == parts


@pytest.mark.parametrize(
    ("origin", "host", "ours"),
    [
        ("http://localhost:8501", "localhost:8501", True), ("http://LOCALHOST:8501", "localhost:8501", True),
        ("https://dash.example", "dash.example", True), ("https://dash.example", "dash.example:443", True),
        ("http://[::1]:8501", "[::1]:8501", True), ("http://localhost:8502", "localhost:8501", False),
        ("http://evil.example", "localhost:8501", False), ("http://localhost.evil.example:8501", "localhost:8501", False),
        ("null", "localhost", False), ("", "localhost", False), ("http://", "localhost", False),
        ("http://[", "localhost", False), ("file://localhost", "localhost", False),
        ("http://me@localhost", "localhost", False), ("localhost", "localhost", False),
        ("https://allowed.example", "localhost", True), ("https://named.example:444", "localhost", True),
        ("https://allowed.example:444", "localhost", False), ("http://localhost", "[", False),
    ],
)  # fmt: skip
def test_an_origin_is_ours_when_it_is_the_host_or_allowed(origin, host, ours):
    assert is_ours(origin, host, ("https://allowed.example", "named.example")) is ours


@pytest.fixture
def door(monkeypatch):
    """An app behind the door that tells whose each request is; looking up a name fails."""

    async def tell(request):
        return PlainTextResponse(request.client.host)

    async def stream(websocket):
        await websocket.accept()
        await websocket.send_text(websocket.client.host)
        await websocket.close()

    def ask(*args, **options):
        pytest.fail(f"asked for {args}")

    monkeypatch.setenv("INTRAFUSION_PUBLIC", "1")
    app = Starlette(routes=[Route("/", tell, methods=["GET", "PUT"]), WebSocketRoute("/stream", stream)])
    client = TestClient(
        KeepsPeer(Door(app), "127.0.0.1"), client=("127.0.0.1", 1), headers={"Host": "dash.example"},
    )  # fmt: skip
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, ask)
    return client


class TestDoor:
    def test_whoever_connects_from_this_machine_is_no_proxy(self, door, monkeypatch):
        assert door.get("/", headers={"X-Forwarded-For": "9.9.9.9"}).text == "127.0.0.1"
        monkeypatch.setenv("INTRAFUSION_PROXIES", "1")
        assert door.get("/", headers={"X-Forwarded-For": "9.9.9.9, 1.2.3.4"}).text == "1.2.3.4"

    @pytest.mark.parametrize("host", [host for host in MALFORMED if host.isascii()])
    def test_a_malformed_host_is_400(self, door, host):
        assert door.get("/", headers={"Host": host}).status_code == 400

    def test_of_another_page_nothing_is_changed_and_all_is_read(self, door):
        there, here = {"Origin": "http://evil.example"}, {"Origin": "http://dash.example"}
        assert [door.put("/", headers=headers).status_code for headers in (there, here, {})] == [403, 200, 200]
        assert door.get("/", headers=there).status_code == 200

    def test_a_websocket_of_another_page_is_refused(self, door):
        with door.websocket_connect("/stream", headers={"Origin": "http://dash.example"}) as stream:
            assert stream.receive_text() == "127.0.0.1"
        for origin in ("http://evil.example", "null", "http://dash.example:81"):
            with (
                pytest.raises(WebSocketDenialResponse) as refused,
                door.websocket_connect("/stream", headers={"Origin": origin}),
            ):
                pass
            assert refused.value.status_code == 403

    def test_a_private_server_answers_to_this_machine_alone(self, door, monkeypatch):
        monkeypatch.delenv("INTRAFUSION_PUBLIC")
        assert door.get("/").status_code == 403
        assert door.get("/", headers={"Host": "localhost:80"}).status_code == 200
