"""The server around the pages: health, limits on uploads, a log, and what becomes of errors that nobody expected.

Nothing here imports torch, or the library that does, before the server listens: a thread does so, and loads the default model.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import streamlit as st
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from streamlit.runtime.scriptrunner import get_script_run_ctx

_began = time.monotonic()
_health: dict[str, Any] = {"status": "starting"}
APP = Path(__file__).parents[2] / "app.py"


def options() -> dict[str, Any]:
    """What `st.App` is to be made with."""
    return {
        "routes": [Route("/health", _tell_health)],
        "middleware": [Middleware(_Hosts), Middleware(_Uploads)],
        "lifespan": _lifespan,
        "on_script_error": sorry,
    }


@asynccontextmanager
async def _lifespan(app: st.App) -> AsyncIterator[None]:
    # `streamlit run` binds where its configuration says; what another ASGI server binds is not known here
    by_streamlit = Path(sys.argv[0]).resolve() == APP.resolve()
    address = st.get_option("server.address") if by_streamlit else None
    if not is_loopback(address):
        os.environ["INTRAFUSION_PUBLIC"] = "1"
    _tell_less()
    threading.Thread(target=_warm_up, daemon=True).start()
    if by_streamlit:
        _say_where(address or "0.0.0.0")
    yield


def is_loopback(address: str | None) -> bool:
    """Whether only this machine reaches a server that is bound here; no address means all of them."""
    if address == "localhost":
        return True
    try:
        return ip_address(address or "").is_loopback
    except ValueError:  # another name may mean anything
        return False


def _say_where(address: str) -> None:
    """Print the address and open it, as `streamlit run` does for a script alone; it also asks the internet for its own."""
    from streamlit import cli_util
    from streamlit.web.server import server_util

    url = server_util.get_url(server_util.get_display_address(address))
    print(f"\n  The dashboard is at\n\n  URL: {url}\n", flush=True)
    if not st.get_option("server.headless"):
        cli_util.open_browser(url)


def _warm_up() -> None:
    """Import the library, and let the default model answer some images; the health route says how that went."""
    try:
        from intrafusion import access, leftovers, log
    except BaseException:  # the library does not load, and so neither does its log: the thread's end has the traceback
        _health.update(status="failed")
        raise
    try:
        log.start("json")
        leftovers.remove_once()
        _hear()
        log.event(
            "server started", public=access.is_public(), roots=len(access.roots()), upload_mib=access.upload_mib()
        )
        _answer()
    except Exception as error:
        _health.update(status="failed", id=log.unexpected(error, "start"))
        return
    seconds = round(time.monotonic() - _began, 2)
    _health.update(status="ready", seconds=seconds)
    log.event("server ready", seconds=seconds)


def _answer() -> None:
    """Raise an error where the default model cannot be loaded, or answers as no sound one does."""
    from intrafusion import PruneSpec, evaluate, load_data, load_model
    from intrafusion.zoo import dataset_of

    found = evaluate(load_model(PruneSpec.model), load_data(dataset_of(PruneSpec.model)), limit=20)
    if found.accuracy < 0.8:
        raise RuntimeError(f"{PruneSpec.model} has {found.accuracy:.0%} of {found.count} images right")


def _hear() -> None:
    """Let the server's loggers, those to come as well, write by the root's handler: Streamlit gives each one of its own."""
    from streamlit import logger as of_streamlit

    def give_to_root(logger: logging.Logger) -> None:
        logger.handlers.clear()
        logger.propagate = True

    of_streamlit.setup_formatter = give_to_root
    for name in [*of_streamlit._loggers, "uvicorn"]:
        give_to_root(logging.getLogger(name))
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # else each reader who comes is a line
    for name in ("uvicorn.access", "streamlit.error_util"):  # addresses may hold paths; `sorry` logs errors
        logging.getLogger(name).disabled = True


def _tell_less() -> None:
    """Streamlit tells every browser where the app lies and which of its files were changed. Ours need neither."""
    from streamlit.runtime.app_session import AppSession

    made = AppSession._create_new_session_message

    def without_path(*args: Any, **options: Any) -> Any:
        message = made(*args, **options)
        message.new_session.main_script_path = APP.name
        return message

    AppSession._create_new_session_message = without_path
    AppSession._handle_git_information_request = lambda session: None


async def _tell_health(request: Request) -> JSONResponse:
    status = 200 if _health["status"] == "ready" else 503
    return JSONResponse(dict(_health), status, {"Cache-Control": "no-store"})


def answer_errors() -> None:
    """Let `sorry` answer what goes wrong in this run of a script, also where it is not `st.App` that runs it."""
    context = get_script_run_ctx()
    if context is not None and context.on_script_error is None:
        context.on_script_error = sorry


def sorry(error: Exception) -> bool:
    """Show one line with the id under which the log has the error; Streamlit shows nothing of its own then.

    Of a fragment or a callback it comes here first, and may be one that says itself what to do.
    """
    from intrafusion import log
    from pages.common import telling

    said, number = log.explain(error, "page")
    if number is not None:
        said = f"Something went wrong (id {number}). The details are in the server's log under this id."
    telling.error(said)
    return True


class _Hosts:
    """Refuses what names another host than this machine, unless the server is public.

    So neither a web page elsewhere, by a name of its own that it lets mean this machine, nor a proxy that nobody spoke of
    opens what only the person here may.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self.app
        if scope["type"] in ("http", "websocket") and os.environ.get("INTRAFUSION_PUBLIC", "0") in ("", "0"):
            host = urlsplit(f"//{Headers(scope=scope).get('host', '')}").hostname
            if host and not is_loopback(host):
                answer = PlainTextResponse(
                    "This server is for its own machine. Set INTRAFUSION_PUBLIC=1 for others.", 403
                )
        await answer(scope, receive, send)


class _Uploads:
    """Bounds on what strangers upload: the size of a file, and how much an address sends in a minute."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.rate: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self.app
        if scope["type"] == "http" and scope["method"] == "PUT" and "/_stcore/upload_file/" in scope["path"]:
            answer = self._refusal(Request(scope)) or self.app
        await answer(scope, receive, send)

    def _refusal(self, request: Request) -> PlainTextResponse | None:
        if _health["status"] == "starting":
            return PlainTextResponse("The server is starting: try again in a few seconds.", 503, {"Retry-After": "5"})
        from intrafusion import access

        if not access.is_public():
            return None
        most = access.upload_mib() * access.MIB
        self.rate = self.rate or access.Rate(access.UPLOADS, 4 * most)
        size = request.headers.get("content-length", "")
        if not size.isdecimal():
            return _refused(411, "Say how large the file is.")
        if int(size) > most + access.MIB:  # what frames the file counts
            return _refused(413, f"A file may have at most {access.upload_mib()} MiB.")
        wait = self.rate.wait(request.client.host if request.client else "", int(size))
        if wait:
            seconds = str(int(wait) + 1)
            return _refused(429, f"Too many uploads: try again in {seconds} seconds.", {"Retry-After": seconds})
        return None


def _refused(status: int, words: str, headers: dict[str, str] | None = None) -> PlainTextResponse:
    from intrafusion import log

    log.event("upload refused", logging.WARNING, status=status, reason=words)
    return PlainTextResponse(words, status, headers)
