"""Event log on stderr, one line each: JSON for programs or text for people, as $INTRAFUSION_LOG says (json, text or off).

An event has a name and fields. Unexpected errors are logged with their traceback under an id, and only the id is shown. If the
variable is not set, the command line writes tracebacks to a file, `tracebacks.log` among the downloads.
"""

import json
import logging
import logging.handlers
import os
import queue
import secrets
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TextIO

from intrafusion.errors import IntrafusionError, check_choice, is_out_of_memory, reason
from intrafusion.runtime.paths import home

KINDS = ("json", "text", "off")
_log = logging.getLogger("intrafusion")
_WAITING = 10_000  # most lines queued for stderr; further lines are dropped rather than block the work
_TEXT = "%(levelname)s:%(name)s:%(message)s"
_FILE = 1 << 20  # most bytes of the traceback file, and of its one backup


def start(default: str | None = None) -> None:
    """Configure logging as $INTRAFUSION_LOG says, else as `default`; None for a command line's default.

    That default logs warnings as text and tracebacks to a file, because the code that logs an error also reports it to the
    user. Raises IntrafusionError if the variable is not one of KINDS.
    """
    kind = os.environ.get("INTRAFUSION_LOG") or default
    if kind is None or kind not in KINDS:
        plain = logging.StreamHandler(sys.stderr)
        plain.setFormatter(_Text(_TEXT))
        plain.addFilter(lambda record: not record.exc_info)
        logging.basicConfig(level=logging.WARNING, handlers=[plain, _Tracebacks()])
        if kind is not None:
            check_choice("INTRAFUSION_LOG", kind, KINDS)
        return
    handler = _Off() if kind == "off" else _Lines(sys.stderr)
    handler.setFormatter(_Json() if kind == "json" else _Text(_TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    _log.setLevel(logging.INFO)


def say(text: object) -> None:
    """Show a message to the command line's user, on stderr; if the log there is JSON, log it as an event."""
    if any(isinstance(handler.formatter, _Json) for handler in logging.getLogger().handlers):
        event("message", message=str(text))
    else:
        print(text, file=sys.stderr)


def event(name: str, /, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Log an event. error: the exception whose traceback to include. fields: JSON-able, and no secrets."""
    _log.log(level, name, exc_info=error, extra={"fields": fields})


def unexpected(error: BaseException, where: str, /, **fields: Any) -> str:
    """Log an unexpected error; return the id of its log entry, which a page may show."""
    number = secrets.token_hex(4)
    event("error", logging.ERROR, error, id=number, where=where, type=type(error).__name__, **fields)
    return number


def where() -> str:
    """Return where the traceback of the last logged error is, as text."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Tracebacks):
            return "could not be written" if handler.failed else f"is in {handler.baseFilename}"
        if isinstance(handler, _Off):
            return "is logged if INTRAFUSION_LOG is text or json"
    return "is in the log"


def explain(error: BaseException, where: str, /, **fields: Any) -> tuple[str, str | None]:
    """Return why something failed, in one line, and the id of its log entry if it was unexpected, else None."""
    expected = isinstance(error, IntrafusionError) or is_out_of_memory(error)
    return reason(error), None if expected else unexpected(error, where, **fields)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_row(record), default=str)


class _Text(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        return super().formatMessage(record) + "".join(f" {k}={json.dumps(v, default=str)}" for k, v in fields.items())


def _row(record: logging.LogRecord) -> dict[str, Any]:
    said: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
    }
    if (fields := getattr(record, "fields", None)) is not None:
        said |= {"event": record.getMessage(), **fields}
    else:  # logged by another library
        said |= {"event": "message", "logger": record.name, "message": record.getMessage()}
    if record.exc_info and record.exc_info[1] is not None:
        said["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
    return said


class _Off(logging.NullHandler):
    """Handler for when no log is wanted."""


class _Tracebacks(logging.handlers.RotatingFileHandler):
    """Writes a command line's tracebacks to a file that is created with the first one. failed: whether writing has failed."""

    def __init__(self) -> None:
        super().__init__(home() / "tracebacks.log", maxBytes=_FILE, backupCount=1, encoding="utf-8", delay=True)
        self.failed = False
        self.setFormatter(_Text(f"%(asctime)s {_TEXT}"))
        self.addFilter(lambda record: bool(record.exc_info))

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # opening the file then fails with the same error
            home().mkdir(parents=True, exist_ok=True)
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self.failed = True


class _Lines(logging.Handler):
    """Writes lines from its own thread, so that work never waits for the reader of stderr."""

    def __init__(self, stream: TextIO):
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str] = queue.Queue(_WAITING)
        threading.Thread(target=self._write, daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # a logging failure must not fail the work
            line = json.dumps({"level": "error", "event": "log", "message": f"a line was lost: {type(error).__name__}"})
        with suppress(queue.Full):
            self._lines.put_nowait(line)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            with suppress(OSError, ValueError):  # nobody reads, or stderr is closed
                self._stream.write(f"{line}\n")
                self._stream.flush()
            self._lines.task_done()

    def flush(self) -> None:
        """Wait up to a second for the last lines to be written; `logging` calls this at exit."""
        deadline = time.monotonic() + 1
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)
