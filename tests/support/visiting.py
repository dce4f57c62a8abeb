"""A dashboard on a free port, and a visitor without a browser that receives all messages of the server."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from places import ROOT
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.Common_pb2 import FileURLs
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.sync.client import connect

PATIENCE = 240  # time-out in seconds, for a busy machine


@dataclass
class Server:
    """A running dashboard: its port, the file of its stderr, and its process."""

    port: int
    errors: Path
    process: subprocess.Popen

    def get(self, path: str, method: str = "GET", data: bytes | None = None, **headers: str) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def until_health(self, status: str) -> dict[str, Any]:
        """Wait until the health route reports this status and return its answer. Fail if it ends in another status."""
        deadline = time.monotonic() + PATIENCE
        while True:
            said = json.loads(self.get("/health")[1])
            if said["status"] == status:
                return said
            assert said["status"] == "starting", said
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def events(self) -> list[dict[str, Any]]:
        """Return the lines of the log so far, each one JSON object."""
        return [json.loads(line) for line in self.errors.read_text().splitlines()]

    def until_events(self, event: str, count: int) -> list[dict[str, Any]]:
        """Wait for this many log lines of one event and return them. A line may be written after the response it describes."""
        deadline = time.monotonic() + PATIENCE
        while len(found := [one for one in self.events() if one["event"] == event]) < count:
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found


@contextlib.contextmanager
def dashboard(folder: Path, *flags: str, app: Path = ROOT, **environment: str) -> Iterator[Server]:
    """Run `app` until the block ends. folder: for its log and its kept files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = folder / "kept here"
    known = {"INTRAFUSION_HOME": str(home), "INTRAFUSION_STORE": str(home / "studies.sqlite")}
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={port}"]
    errors = folder / f"stderr-{port}"
    with errors.open("w") as log:
        process = subprocess.Popen(
            [*command, *flags], cwd=app, env=os.environ | known | environment, stdout=subprocess.DEVNULL, stderr=log
        )
    server = Server(port, errors, process)
    try:
        for _ in range(4 * PATIENCE):
            with contextlib.suppress(OSError):
                server.get("/_stcore/health")
                break
            assert process.poll() is None, errors.read_text()
            time.sleep(0.25)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def copied(folder: Path) -> Path:
    """Copy the app into a folder, so that a test may damage it."""
    for name in ("pages", "intrafusion", "assets", ".streamlit"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "app.py", folder)
    return folder


@dataclass
class Visitor:
    """A visitor of a page. messages: everything that the server has sent."""

    connection: Any
    messages: list[ForwardMsg] = field(default_factory=list)

    def open(self, query: str = "", page: str = "") -> list[ForwardMsg]:
        """Open a page by its address. Return the messages until its script has ended."""
        asked = self.rerun(page)
        asked.rerun_script.query_string = query
        return self.send(asked)

    def again(self, fragment: str) -> list[ForwardMsg]:
        """Rerun one fragment of the page. Return the messages until its script has ended."""
        asked = self.rerun("")
        asked.rerun_script.fragment_id = fragment
        return self.send(asked)

    def press(self, label: str, page: str) -> list[ForwardMsg]:
        """Press a button of the page. Return the messages until its script has ended."""
        elements = [m.delta.new_element for m in self.messages]
        (button,) = {e.button.id for e in elements if e.WhichOneof("type") == "button" and e.button.label == label}
        asked = self.rerun(page)
        asked.rerun_script.widget_states.widgets.add(id=button, trigger_value=True)
        return self.send(asked)

    @staticmethod
    def rerun(page: str) -> BackMsg:
        """Return a message that requests a page, for `send`."""
        asked = BackMsg()
        asked.rerun_script.page_name = page
        return asked

    def send(self, asked: BackMsg) -> list[ForwardMsg]:
        """Send a message. Return the messages until the script has ended."""
        self.connection.send(asked.SerializeToString())
        return self.until_ended()

    def upload_place(self, name: str = "mine.npz") -> FileURLs:
        """Return the URLs to which a page uploads a file of this name."""
        asked, told = BackMsg(), ForwardMsg()
        asked.file_urls_request.file_names.append(name)
        self.connection.send(asked.SerializeToString())
        while told.WhichOneof("type") != "file_urls_response":
            told.ParseFromString(self.connection.recv(timeout=PATIENCE))
        return told.file_urls_response.file_urls[0]

    def until_ended(self) -> list[ForwardMsg]:
        came: list[ForwardMsg] = []
        while not came or not _is_end(came[-1]):
            message = ForwardMsg()
            message.ParseFromString(self.connection.recv(timeout=PATIENCE))
            came.append(message)
        self.messages += came
        return came


def _is_end(message: ForwardMsg) -> bool:
    return message.WhichOneof("type") == "script_finished" and message.script_finished in (
        message.FINISHED_SUCCESSFULLY,
        message.FINISHED_FRAGMENT_RUN_SUCCESSFULLY,
    )


@contextlib.contextmanager
def visitor(server: Server, address: str = "127.0.0.1", **headers: str) -> Iterator[Visitor]:
    """Connect a visitor to a server. address: the visitor's address, one of this machine's."""
    connection = connect(
        f"ws://127.0.0.1:{server.port}/_stcore/stream", subprotocols=["streamlit"], max_size=None,  # type: ignore[list-item]
        source_address=(address, 0), additional_headers=headers, open_timeout=PATIENCE,
    )  # fmt: skip
    with connection:
        yield Visitor(connection)


def alerts(messages: list[ForwardMsg]) -> list[str]:
    """Return the texts of the error, warning and info boxes."""
    return [m.delta.new_element.alert.body for m in messages if m.delta.new_element.WhichOneof("type") == "alert"]
