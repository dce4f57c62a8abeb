"""Limits on uploads to a public server: only files a widget requested, of bounded size and rate, for a bounded time."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from streamlit.runtime import exists, get_instance
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.uploaded_file_manager import UploadFileUrlInfo

_PATH = "/_stcore/upload_file/"
_WIDGET = "file_uploader_state_value"  # the value type of an uploader widget
_LONGEST = 300.0  # most seconds for one upload
_LEFT = 30.0  # seconds that files stay after their session has disconnected; it may reconnect
_EXPECTED = 4096  # most files that are expected but have not arrived

_expected: OrderedDict[tuple[str, str], None] = OrderedDict()  # (session, file id) of expected uploads
_owners: dict[str, str] = {}  # session with files -> its address
_left: dict[str, float] = {}  # session with files -> the time when it was first seen disconnected


class Uploads:
    """Middleware that limits uploads: the size of a file, the rate per address, and the amount held in memory.

    An upload that no widget requested is refused before its first byte is read. `expect` records the requested files.
    """

    def __init__(self, app: ASGIApp, is_starting: Callable[[], bool]):
        self.app, self._is_starting = app, is_starting
        self._rate: Any = None
        self._coming: list[tuple[str, int]] = []  # (address, bytes) of uploads in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "PUT" or _PATH not in scope["path"]:
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        refusal = self._refusal(request)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        one = _reader(request), int(request.headers.get("content-length") or 0)
        self._coming.append(one)
        try:
            await asyncio.wait_for(self.app(scope, receive, send), _LONGEST)
        except TimeoutError:  # a response is only sent after the whole file, so none has been sent
            await _refused(408, "This upload took too long.")(scope, receive, send)
        finally:
            self._coming.remove(one)

    def _refusal(self, request: Request) -> PlainTextResponse | None:
        if self._is_starting():
            return PlainTextResponse("The server is starting: try again in a few seconds.", 503, {"Retry-After": "5"})
        from intrafusion.runtime import access

        if not access.is_public():
            return None
        most, who = access.upload_mib() * access.MIB, _reader(request)
        self._rate = self._rate or access.Rate(access.UPLOADS, 4 * most)
        text = request.headers.get("content-length", "")
        if not (text.isascii() and text.isdecimal()):
            return _refused(411, "The request does not state the size of the file.")
        size = int(text[:20])
        if size > most + access.MIB:  # the size includes the multipart framing
            return _refused(413, f"A file must not exceed {access.upload_mib()} MiB.")
        wait = self._rate.wait(who, size)
        if wait:
            seconds = str(int(wait) + 1)
            return _refused(429, f"Too many uploads: try again in {seconds} seconds.", {"Retry-After": seconds})
        session, _, file = request.url.path.rpartition(_PATH)[2].partition("/")
        if (session, file) not in _expected:
            return _refused(403, "No page of this server requested this file.")
        mine, everybody = self._held(who)
        of_one, of_all = (times * most for times in access.HELD)
        if mine + size > of_one or everybody + size > of_all:
            return _refused(429, "Too many uploaded files are waiting: close other pages, or try again in a minute.")
        del _expected[session, file]
        _owners[session] = who
        return None

    def _held(self, who: str) -> tuple[int, int]:
        """Return the bytes in memory and in transit: of one address, and of all."""
        held = [(_owners.get(session, ""), size) for session, size in _files().items()] + self._coming
        return sum(size for owner, size in held if owner == who), sum(size for _, size in held)


def expect() -> None:
    """Patch Streamlit to record the file ids that it hands out to sessions with an uploader widget."""
    give = MemoryUploadedFileManager.get_upload_urls

    def remember(manager: Any, session_id: str, file_names: Sequence[str]) -> list[UploadFileUrlInfo]:
        given = give(manager, session_id, file_names)
        if _has_uploader(session_id):
            for one in given:
                _expected[session_id, one.file_id] = None
            while len(_expected) > _EXPECTED:
                _expected.popitem(last=False)
        return given

    MemoryUploadedFileManager.get_upload_urls = remember  # type: ignore[method-assign]


def drop_left(now: float | None = None) -> None:
    """Remove the files of sessions that have ended. Call it every few seconds."""
    now = time.monotonic() if now is None else now
    if not exists():
        return
    runtime = get_instance()
    for session in _files():
        if runtime.is_active_session(session):
            _left.pop(session, None)
        elif now - _left.setdefault(session, now) >= _LEFT:
            runtime.uploaded_file_mgr.remove_session_files(session)
    for known in (_left, _owners):
        for session in known.keys() - _files().keys():
            del known[session]


def _files() -> dict[str, int]:
    """Return the bytes of the files in memory, by session."""
    storage = get_instance().uploaded_file_mgr.file_storage  # type: ignore[attr-defined]
    return {session: sum(len(file.data) for file in list(files.values())) for session, files in list(storage.items())}


def _has_uploader(session: str) -> bool:
    """Return whether the page that a session shows has an uploader widget."""
    found = get_instance()._session_mgr.get_active_session_info(session)
    if found is None:
        return False
    known = found.session.session_state._new_widget_state.widget_metadata
    return any(widget.value_type == _WIDGET for widget in list(known.values()))


def _reader(request: Request) -> str:
    return request.client.host if request.client else ""


def _refused(status: int, words: str, headers: dict[str, str] | None = None) -> PlainTextResponse:
    from intrafusion.runtime import log

    log.event("upload refused", logging.WARNING, status=status, reason=words)
    return PlainTextResponse(words, status, headers)
