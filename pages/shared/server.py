"""The server around the pages: health, who may come in, a log, and what becomes of errors that nobody expected.

Nothing here imports torch, or the library that does, before the server listens: a thread does so, and loads the default model.
"""

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import streamlit as st
import uvicorn.config
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from streamlit.runtime.scriptrunner import get_script_run_ctx

from pages.shared.client_address import is_loopback, proxies
from pages.shared.request_guard import Door, KeepsPeer, answer_all
from pages.shared.upload_guard import Uploads, drop_left, expect

_TEND = 1.0  # seconds between two looks at who has gone
_began = time.monotonic()
_health: dict[str, Any] = {"status": "starting"}
APP = Path(__file__).parents[2] / "app.py"


def options() -> dict[str, Any]:
    """What `st.App` is to be made with. Ends the process where the environment makes no sense, before it serves anybody."""
    try:
        proxies()
    except ValueError as error:
        sys.exit(f"error: {error}")
    uvicorn.config.ProxyHeadersMiddleware = KeepsPeer  # type: ignore[misc,assignment]
    answer_all()
    return {
        "routes": [Route("/health", _tell_health)],
        "middleware": [Middleware(Door), Middleware(Uploads, is_starting=lambda: _health["status"] == "starting")],
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
    _ask_nobody()
    expect()
    threading.Thread(target=_warm_up, daemon=True).start()
    if by_streamlit:
        _say_where(address or "0.0.0.0")
    tending = asyncio.create_task(_tend())
    yield
    tending.cancel()


async def _tend() -> None:
    """Now and then let go of what belongs to sessions that have gone."""
    while True:
        await asyncio.sleep(_TEND)
        shell = sys.modules.get("pages.shared.app_state")  # which starts jobs, and imports torch
        try:
            drop_left()
            if shell is not None and hasattr(shell, "tend"):
                shell.tend()
        except Exception as error:  # the next look may do
            logging.getLogger("intrafusion").error("could not tend: %s", error)


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
        from intrafusion.runtime import access, log, stale_files
    except BaseException:  # the library does not load, and so neither does its log: the thread's end has the traceback
        _health.update(status="failed")
        raise
    try:
        log.start("json")
        stale_files.remove_once()
        _hear()
        log.event(
            "server started",
            public=access.is_public(),
            roots=len(access.roots()),
            upload_mib=access.upload_mib(),
            proxies=proxies(),
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
    from intrafusion.models.hub import dataset_of

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
    served = logging.getLogger("uvicorn.error")
    served.setLevel(logging.WARNING)  # else each reader who comes is a line
    served.addFilter(lambda told: "completing handshake" not in str(told.msg))  # of a refused websocket, which is complete
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


def _ask_nobody() -> None:
    """Streamlit asks the internet for its own address where it does not know an origin. Ours are known, see `Door`."""
    from streamlit import net_util

    net_util.get_internal_ip = net_util.get_external_ip = lambda: None


def answer_errors() -> None:
    """Let `sorry` answer what goes wrong in this run of a script, also where it is not `st.App` that runs it."""
    context = get_script_run_ctx()
    if context is not None and context.on_script_error is None:
        context.on_script_error = sorry


def sorry(error: Exception) -> bool:
    """Show one line with the id under which the log has the error; Streamlit shows nothing of its own then.

    Of a fragment or a callback it comes here first, and may be one that says itself what to do.
    """
    from intrafusion.runtime import log
    from pages.shared import messages

    said, number = log.explain(error, "page")
    if number is not None:
        said = f"Something went wrong (id {number}). The details are in the server's log under this id."
    messages.error(said)
    return True
