"""The outermost middleware: it sets the client address of each request and refuses requests not sent by our own pages."""

import os
from typing import Any

import streamlit as st
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from pages.shared.client_address import host_and_port, is_loopback, is_ours, reader

_PEER = "intrafusion.peer"
_READS = ("GET", "HEAD", "OPTIONS")


class KeepsPeer(ProxyHeadersMiddleware):
    """uvicorn's ProxyHeadersMiddleware, which also records the real peer.

    The original lets any client on this machine state its own address.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope[_PEER] = (scope.get("client") or ("",))[0]
        await super().__call__(scope, receive, send)


def answer_all() -> None:
    """Patch uvicorn to answer malformed handshakes too, for example with a control character in a header.

    Without the patch uvicorn leaves them waiting.
    """
    hear = WebSocketsSansIOProtocol.data_received

    def answer(connection: WebSocketsSansIOProtocol, data: bytes) -> None:
        hear(connection, data)
        if connection.handshake_initiated or not connection.conn.handshake_exc or connection.transport.is_closing():
            return
        said = b"".join(connection.conn.data_to_send())  # set if headers are too long; empty if it is not a request
        connection.transport.write(said or b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.transport.close()

    WebSocketsSansIOProtocol.data_received = answer  # type: ignore[method-assign]


class Door:
    """Middleware that sets the request's `client` in the scope and refuses a wrong Host or Origin.

    It refuses a malformed Host, and a Host that names another machine unless the server is public. That keeps a foreign web
    page (by DNS rebinding) and an undeclared proxy from opening what only the person at this machine may open. For
    websockets and for requests that change something, it also refuses the Origin of a foreign page.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self.app
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            peer = scope.get(_PEER) or (scope.get("client") or ("",))[0]
            scope["client"] = reader(peer, headers.getlist("x-forwarded-for")), 0
            answer = _refusal(scope, headers) or self.app
        await answer(scope, receive, send)


def _refusal(scope: Scope, headers: Headers) -> PlainTextResponse | None:
    hosts = headers.getlist("host")  # empty for HTTP/1.0, which some probes use
    try:
        if len(hosts) > 1:
            raise ValueError
        name = host_and_port(hosts[0])[0] if hosts else None
    except (ValueError, AttributeError):
        return PlainTextResponse("The Host of this request is malformed.", 400)
    is_private = os.environ.get("INTRAFUSION_PUBLIC", "0") in ("", "0")
    if is_private and name and not is_loopback(name):
        return PlainTextResponse("This server accepts only local requests. Set INTRAFUSION_PUBLIC=1 to accept others.", 403)
    acts = scope["type"] == "websocket" or scope["method"] not in _READS
    origins = headers.getlist("origin") if acts and st.get_option("server.enableCORS") else ()
    if not all(is_ours(origin, hosts[0] if hosts else "", _allowed()) for origin in origins):
        return PlainTextResponse("This server accepts only requests from its own pages.", 403)
    return None


def _allowed() -> tuple[str, ...]:
    """Return the origins and host names that the server's configuration allows."""
    from streamlit import config

    named = config.is_manually_set("browser.serverAddress")
    address = (st.get_option("browser.serverAddress"),) if named else ()
    return *(origin.strip() for origin in st.get_option("server.corsAllowedOrigins")), *address
