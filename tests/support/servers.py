"""Dashboard servers for tests that kill or share them, and page clients without a browser."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from places import ROOT
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

PATIENCE = 240  # time-out in seconds, only reached if something is wrong
PROGRESS = re.compile(
    r'(\d+) of (\d+) points on [\d,]+ images: ([^"\x00-\x1f]*)'
)  # the progress text of pages that run studies


@contextmanager
def served(store: Path, command: tuple[str, ...] = (sys.executable,)) -> Iterator[tuple[subprocess.Popen, int]]:
    """Start a server on a free port, with its results in this file, without waiting for it. Kill it at the end of the block.

    command: the command that runs Python. The server's output goes to a file beside the store.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*command, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={port}"]
    env = {**os.environ, "INTRAFUSION_STORE": str(store), "OMP_NUM_THREADS": "1"}
    with store.with_name(f"{store.name}.log").open("a") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


class Tab:
    """A browser tab on a page, without a browser: `look` reruns the page and returns the text that it sends.

    page: the address, such as "curves?model=digits-mlp". Raises OSError or WebSocketException if the server has stopped.
    """

    def __init__(self, port: int, page: str):
        self._page, _, self._query = page.partition("?")
        self._open = ExitStack()
        address = f"ws://127.0.0.1:{port}/_stcore/stream"
        self._socket = self._open.enter_context(connect(address, max_size=None, ping_interval=None))

    def close(self) -> None:
        self._open.close()

    def look(self) -> str:
        """Rerun the page, as a reload does. Return everything that it sends until it has finished, as text."""
        asked = BackMsg()
        asked.rerun_script.query_string, asked.rerun_script.page_name = self._query, self._page
        self._socket.send(asked.SerializeToString())
        told = []
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            message = ForwardMsg.FromString(self._socket.recv(timeout=PATIENCE))
            if message.WhichOneof("type") == "script_finished":
                return "\n".join(told)
            told.append(str(message))
        raise TimeoutError(f"{self._page} did not end")

    def progress(self) -> tuple[int, int, str]:
        """Return the points done, all points, and the study's state as text, as the page shows them; (0, 0, "") before."""
        found = PROGRESS.findall(self.look())
        return (int(found[-1][0]), int(found[-1][1]), found[-1][2]) if found else (0, 0, "")


GONE = (OSError, WebSocketException)  # errors that a tab raises if its server was killed
