"""The server around the pages: health route, access control, log, and handling of unexpected errors.

Nothing here imports torch, or the library, which imports torch, before the server listens. A thread imports the library
and loads the default model.
"""

import asyncio
import gc
import importlib
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

_TEND = 1.0  # seconds between two clean-ups after ended sessions
_began = time.monotonic()
_health: dict[str, Any] = {"status": "starting"}
APP = Path(__file__).parents[2] / "app.py"


def options() -> dict[str, Any]:
    """Return the arguments of `st.App`. Exit the process if INTRAFUSION_PROXIES is invalid, before serving anything."""
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
    # `streamlit run` binds to its configured address; the address of another ASGI server is not known here
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
    """Regularly release what belongs to ended sessions: their uploads and their jobs."""
    while True:
        await asyncio.sleep(_TEND)
        background = sys.modules.get("pages.shared.background_jobs")  # starts the jobs; not imported here, as it imports torch
        try:
            drop_left()
            if background is not None and hasattr(background, "tend"):
                background.tend()
        except Exception as error:  # the next round may succeed
            logging.getLogger("intrafusion").error("could not tend: %s", error)


def _say_where(address: str) -> None:
    """Print the address and open it in a browser, as `streamlit run` does for a plain script.

    Streamlit's own code would also look up the external address on the internet.
    """
    from streamlit import cli_util
    from streamlit.web.server import server_util

    url = server_util.get_url(server_util.get_display_address(address))
    print(f"\n  The dashboard is at\n\n  URL: {url}\n", flush=True)
    if not st.get_option("server.headless"):
        cli_util.open_browser(url)


@st.cache_resource
def import_slow_libraries() -> threading.Thread:
    """Import the slow libraries of the other pages in the background, once per server."""
    slow = (
        "sklearn.cluster",
        "scipy.stats",
        "intrafusion.reporting.figures.transport",
        "captum.attr",
    )

    def load() -> None:
        from intrafusion.pruning.transport.solvers import pot

        pot()
        for name in slow:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # Streamlit collects garbage after every script run: scanning all these objects would cost 0.2 s of CPU

    thread = threading.Thread(target=load)
    thread.start()
    return thread


def _warm_up() -> None:
    """Import the library and run the default model on some images. The health route reports the outcome."""
    try:
        from intrafusion.runtime import access, log, stale_files
    except BaseException:  # the library, and so its log, cannot be imported: the dying thread prints the traceback
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
    """Raise an error if the default model cannot be loaded or its accuracy on 20 images is below 80 %."""
    from intrafusion import PruneSpec, evaluate, load_data, load_model
    from intrafusion.models.hub import dataset_of

    found = evaluate(load_model(PruneSpec.model), load_data(dataset_of(PruneSpec.model)), limit=20)
    if found.accuracy < 0.8:
        raise RuntimeError(f"{PruneSpec.model} has {found.accuracy:.0%} of {found.count} images right")


def _hear() -> None:
    """Route the server's loggers, present and future, to the root handler. Streamlit gives each logger its own handler."""
    from streamlit import logger as of_streamlit

    def give_to_root(logger: logging.Logger) -> None:
        logger.handlers.clear()
        logger.propagate = True

    of_streamlit.setup_formatter = give_to_root
    for name in [*of_streamlit._loggers, "uvicorn"]:
        give_to_root(logging.getLogger(name))
    served = logging.getLogger("uvicorn.error")
    served.setLevel(logging.WARNING)  # otherwise each connection writes a line
    served.addFilter(lambda told: "completing handshake" not in str(told.msg))  # false alarm for a refused websocket
    for name in ("uvicorn.access", "streamlit.error_util"):  # URLs may contain paths; `sorry` logs the errors
        logging.getLogger(name).disabled = True


def _tell_less() -> None:
    """Stop Streamlit from sending the app's path and its git status to every browser. Our pages need neither."""
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
    """Stop Streamlit from looking up its own address on the internet for an unknown origin. `Door` checks origins."""
    from streamlit import net_util

    net_util.get_internal_ip = net_util.get_external_ip = lambda: None


def answer_errors() -> None:
    """Make `sorry` handle the errors of this script run, even if `st.App` does not run it."""
    context = get_script_run_ctx()
    if context is not None and context.on_script_error is None:
        context.on_script_error = sorry


def sorry(error: Exception) -> bool:
    """Show an error in one line, with the id of its log entry if it was unexpected. Return True to suppress Streamlit's own.

    Errors of fragments and callbacks come here directly, so an error may also be an expected one, shown by its own message.
    """
    from intrafusion.runtime import log
    from pages.shared import messages

    said, number = log.explain(error, "page")
    if number is not None:
        said = f"Something went wrong (id {number}). The details are in the server's log under this id."
    messages.error(said)
    return True
