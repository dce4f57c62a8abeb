"""A dashboard on a port of its own, and a visitor without a browser, who reads every byte that the server sends."""

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

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.Common_pb2 import FileURLs
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.sync.client import connect

ROOT = Path(__file__).parents[1]
PATIENCE = 120  # seconds, on a busy machine


@dataclass
class Server:
    """A running dashboard: where it listens, and the file of its stderr."""

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
        """What the health route says once it says this; fails when it says another thing in the end."""
        deadline = time.monotonic() + PATIENCE
        while True:
            said = json.loads(self.get("/health")[1])
            if said["status"] == status:
                return said
            assert said["status"] == "starting", said
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def events(self) -> list[dict[str, Any]]:
        """The lines of the log so far, each of which is one JSON object."""
        return [json.loads(line) for line in self.errors.read_text().splitlines()]

    def until_events(self, event: str, count: int) -> list[dict[str, Any]]:
        """The log's lines of one event once there are this many: they may be written after the answer that they tell of."""
        deadline = time.monotonic() + PATIENCE
        while len(found := [one for one in self.events() if one["event"] == event]) < count:
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found


@contextlib.contextmanager
def dashboard(folder: Path, *flags: str, app: Path = ROOT, **environment: str) -> Iterator[Server]:
    """Run `app` until the block ends. folder: for its log and what it keeps."""
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
    """A copy of the app that a test may damage."""
    for name in ("pages", "intrafusion", "assets", ".streamlit"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "app.py", folder)
    return folder


@dataclass
class Visitor:
    """Somebody at a page. messages: everything that the server has sent."""

    connection: Any
    messages: list[ForwardMsg] = field(default_factory=list)

    def open(self, query: str = "", page: str = "") -> list[ForwardMsg]:
        """Open a page by its address; what came until its script had ended."""
        asked = self.rerun(page)
        asked.rerun_script.query_string = query
        return self.send(asked)

    def again(self, fragment: str) -> list[ForwardMsg]:
        """Run one fragment of the page again."""
        asked = self.rerun("")
        asked.rerun_script.fragment_id = fragment
        return self.send(asked)

    def press(self, label: str, page: str) -> list[ForwardMsg]:
        """Press a button of the page."""
        elements = [m.delta.new_element for m in self.messages]
        (button,) = {e.button.id for e in elements if e.WhichOneof("type") == "button" and e.button.label == label}
        asked = self.rerun(page)
        asked.rerun_script.widget_states.widgets.add(id=button, trigger_value=True)
        return self.send(asked)

    @staticmethod
    def rerun(page: str) -> BackMsg:
        """What asks for a page, to be sent."""
        asked = BackMsg()
        asked.rerun_script.page_name = page
        return asked

    def send(self, asked: BackMsg) -> list[ForwardMsg]:
        """What came until the script had ended."""
        self.connection.send(asked.SerializeToString())
        return self.until_ended()

    def upload_place(self, name: str = "mine.npz") -> FileURLs:
        """Where a page that asks for a file is to send it."""
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
    """address: from which the visitor comes, one of this machine's."""
    connection = connect(
        f"ws://127.0.0.1:{server.port}/_stcore/stream", subprotocols=["streamlit"], max_size=None,  # type: ignore[list-item]
        source_address=(address, 0), additional_headers=headers, open_timeout=PATIENCE,
    )  # fmt: skip
    with connection:
        yield Visitor(connection)


def alerts(messages: list[ForwardMsg]) -> list[str]:
    """The words in the boxes of errors, warnings and notes."""
    return [m.delta.new_element.alert.body for m in messages if m.delta.new_element.WhichOneof("type") == "alert"]
